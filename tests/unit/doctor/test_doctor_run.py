"""One check hurts no other: it may raise, die, hang and leave processes behind."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import psutil

from megatron_opd.doctor.collective import check_all_reduce
from megatron_opd.doctor.command import checks
from megatron_opd.doctor.finding import Check, Finding, ok
from megatron_opd.doctor.run import run_check
from megatron_opd.errors import ConfigError, ProcessError


def found(work, limit_s: float = 30) -> Finding:
    (finding,) = run_check(Check("name", limit_s, work))
    return finding


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_what_it_finds_and_what_it_raises() -> None:
    assert found(lambda: [ok("name", "well")]) == Finding("name", "ok", "well")

    def refuse():
        raise ConfigError("Wrong", where="a.b", got=3, expected=4, fix="set it")

    assert found(refuse) == Finding("name", "failed", "Wrong (a.b): 3", "4", "set it")
    assert found(lambda: 1 / 0).found == "ZeroDivisionError: division by zero"


def test_one_that_dies_is_told_with_its_last_words() -> None:
    def die():
        os.write(2, b"first\nSegmentation fault\n")
        os.kill(os.getpid(), 9)

    assert found(die).found == "the check died (signal 9): Segmentation fault"


def test_an_error_of_a_process_is_told_with_the_last_line_of_its_output() -> None:
    def fail():
        subprocess.run(["sh", "-c", "echo why it failed >&2"], check=True)
        raise ProcessError("A process did not start", got="exit code 1")

    assert found(fail).found == "A process did not start: exit code 1; why it failed"


def test_one_that_hangs_is_ended_with_all_that_it_began(tmp_path: Path) -> None:
    def hang():
        child = subprocess.Popen(["sh", "-c", "trap '' TERM; sleep 300"], start_new_session=True)
        (tmp_path / "pid").write_text(str(child.pid))
        time.sleep(300)
        return []

    assert found(hang, limit_s=1).found == "no result in time"
    assert gone(int((tmp_path / "pid").read_text()))


def test_what_a_good_one_leaves_behind_is_ended_too(tmp_path: Path) -> None:
    def leave():
        child = subprocess.Popen(["sleep", "300"], start_new_session=True)
        (tmp_path / "pid").write_text(str(child.pid))
        return [ok("name", "well")]

    assert found(leave).state == "ok"
    assert gone(int((tmp_path / "pid").read_text()))


def test_all_reduce_over_the_student_s_ranks(settings) -> None:
    (finding,) = run_check(Check("all-reduce", 120, lambda: check_all_reduce(settings("student.device=cpu"))))
    assert finding.state == "ok" and finding.found.startswith("2 ranks, gloo: 16.8 MB in ")


def test_all_reduce_that_fails(settings, monkeypatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    (finding,) = run_check(Check("all-reduce", 120, lambda: check_all_reduce(settings("student.device=cpu"))))
    assert finding.state == "failed" and "rank" in finding.found and "GLOO_SOCKET_IFNAME" in finding.fix


def test_too_many_ranks_for_this_machine(settings, only) -> None:
    finding = only(check_all_reduce(settings("student.device=cpu", "student.data_parallel=5000")))
    assert finding.state == "skipped" and "10000 ranks" in finding.found


def test_without_a_config_the_machine_is_checked_all_the_same() -> None:
    names = [check.name for check in checks(None)]
    assert names == ["python", "packages", "torch", "GPUs", "sandbox", "others"]
