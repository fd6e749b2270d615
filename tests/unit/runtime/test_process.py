"""Processes are never left running, however a run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from megatron_opd.errors import ConfigError
from megatron_opd.runtime.env import LAUNCHER
from megatron_opd.runtime.ports import free_port, take_port
from megatron_opd.runtime.process import start

# A supervisor that starts a child, which starts a grandchild; both ignore SIGTERM when told to.
SUPERVISOR = """
    import os, signal, subprocess, sys, time
    from pathlib import Path
    from megatron_opd.runtime.process import adopt_orphans, start, stop_all
    adopt_orphans()
    child = "import signal, subprocess, sys, time\\n"
    child += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\n" if {stubborn} else ""
    child += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\\n"
    child += "print(p.pid, flush=True)\\n"
    child += "sys.exit() if {orphan} else time.sleep(600)\\n"
    log = Path({log!r})
    started = start("child", [sys.executable, "-c", child], dict(os.environ), log)
    while not log.read_text().endswith("\\n"):
        time.sleep(0.02)
    began = time.monotonic()
    stop_all(grace_s=0.5)
    print(started.process.pid, log.read_text().split()[0], time.monotonic() - began)
"""


@pytest.mark.parametrize(("stubborn", "orphan"), [(False, False), (True, False), (False, True)])
def test_stop_all_ends_children_grandchildren_and_orphans(tmp_path: Path, stubborn: bool, orphan: bool) -> None:
    code = textwrap.dedent(SUPERVISOR).format(stubborn=stubborn, orphan=orphan, log=str(tmp_path / "log"))
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    child, grandchild, seconds = output.split()
    assert not psutil.pid_exists(int(child)) and not psutil.pid_exists(int(grandchild))
    assert float(seconds) < 5


ENDS_ONE = """
    import os, sys, time
    from pathlib import Path
    from megatron_opd.runtime.process import adopt_orphans, start, stop
    adopt_orphans()
    leaf = "import subprocess, sys, time\\n"
    leaf += "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\\n"
    leaf += "print(p.pid, flush=True)\\n"
    logs = [Path({folder!r}) / name for name in ("one", "other", "orphan")]
    tails = ["time.sleep(600)", "time.sleep(600)", ""]
    started = [start(log.name, [sys.executable, "-c", leaf + tail], dict(os.environ), log)
               for log, tail in zip(logs, tails)]
    while not all(log.read_text().endswith("\\n") for log in logs):
        time.sleep(0.02)
    started[2].process.wait()
    stop(started[0], grace_s=0.5)
    stop(started[2], grace_s=0.5)
    print(*(child.process.pid for child in started), *(log.read_text().strip() for log in logs))
"""


def test_stop_ends_one_child_with_all_that_came_of_it_and_no_other(tmp_path: Path) -> None:
    code = textwrap.dedent(ENDS_ONE).format(folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    one, other, _, of_one, of_other, of_orphan = map(int, done.stdout.split())
    try:
        assert not any(map(psutil.pid_exists, (one, of_one, of_orphan)))
        assert all(map(psutil.pid_exists, (other, of_other)))
    finally:
        for pid in (other, of_other):
            if psutil.pid_exists(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    child = "from megatron_opd.runtime.process import die_with_parent\ndie_with_parent()\n"
    child += "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)"
    parent = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}])"
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True)
    pid = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_last_lines_of_a_log_are_kept_for_the_error(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "print('\\n'.join(map(str, range(100)))); raise SystemExit(3)"]
    child = start("child", argv, dict(os.environ), tmp_path / "log")
    child.process.wait()
    assert child.returncode == 3 and child.last_lines(2) == "98\n99"


def test_a_port_in_use_is_an_error_that_names_the_key() -> None:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            take_port(port, "coordinator.port")
    assert "coordinator.port" in str(caught.value) and str(port) in str(caught.value)
    free = free_port()
    assert take_port(0, "x") > 0 and take_port(free, "x") == free


def test_a_rank_whose_launcher_is_gone_ends_at_once() -> None:
    code = "from megatron_opd.runtime.process import die_with_parent; die_with_parent(); print('lives')"
    for parent, returncode in ((os.getpid(), 0), (os.getpid() + 1, -signal.SIGKILL)):
        environment = os.environ | {LAUNCHER: str(parent)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (returncode, b"lives\n" if returncode == 0 else b"")
