"""``megatron-opd doctor`` as a command: real servers right and mixed up, and a signal amid its work."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import psutil

from runs import COMMAND, ROOT, TOY, Servers


def test_right_servers_pass_and_a_mixed_up_one_is_the_only_failure(servers: Servers, tmp_path: Path) -> None:
    mixed_up = [item.replace(servers.math, servers.code) if "math" in item else item for item in servers.attach()]
    argv = [str(COMMAND), "doctor", str(TOY), "--json", f"output={tmp_path}", *mixed_up]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    told = json.loads(done.stdout)
    assert done.returncode == 1 and told["ok"] is False, done.stdout + done.stderr
    shaken = [(one["state"], one["found"]) for one in told["checks"] if one["check"] == "handshakes"]
    assert [state for state, _ in shaken] == ["ok", "failed", "ok"]  # rollout, math, code
    assert shaken[1][1].startswith("A server of teachers.math serves another model")
    assert [one["check"] for one in told["checks"] if one["state"] == "failed"] == ["handshakes"]


def test_a_signal_ends_it_and_every_process_of_its_checks(tmp_path: Path) -> None:
    argv = [str(COMMAND), "doctor", str(TOY), f"output={tmp_path}"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    own = psutil.Process(process.pid)
    while not (children := own.children(recursive=True)):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
