"""Starts one sandbox, waits for it, ends it and reads what it wrote."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Literal

from megatron_opd.errors import ProcessError

Level = Literal["bubblewrap", "namespaces", "limits"]
RUNNER = Path(__file__).with_name("inside") / "runner.py"
MEMORY_BYTES = 512 << 20  # address space of one process
FILE_BYTES = 4 << 20  # largest file or answer
ANSWER_BYTES = 64 << 20  # all answers together
SCRATCH_BYTES = 64 << 20  # scratch folder, where it is a file system of its own
HOME = "/tmp/home"  # the working folder, as ``inside/confine.py`` makes it
SYSTEM = ["/usr", "/lib", "/lib64", "/bin"]  # shared libraries


@dataclass(frozen=True, slots=True)
class Request:
    """What to run."""

    mode: Literal["calls", "programs", "assertions"]
    source: str  # the response's code
    inputs: list = field(default_factory=list)  # calls: the arguments of each; programs: what each reads
    fn_name: str = ""  # the function to call; assertions: the only one they may call, "" for all
    prelude: str = ""  # assertions: trusted code that is run before the response's, and before the tests
    tests: str = ""  # assertions: test code, which the response never sees


@dataclass(frozen=True, slots=True)
class Run:
    """Rows in order, as ``inside/runner.py`` describes them, and how the sandbox ended, one clause."""

    rows: list[list]
    end: str


def run(request: Request, level: Level, time_limit_s: float) -> Run:
    """Run it within ``time_limit_s`` of wall time.

    Raises ProcessError if the sandbox itself fails; whatever the response does to itself is part of the Run.
    """
    public = asdict(request) | {
        "cpu_s": int(time_limit_s) + 1,
        "memory_bytes": MEMORY_BYTES,
        "file_bytes": FILE_BYTES,
        "answer_bytes": ANSWER_BYTES,
        "scratch_bytes": SCRATCH_BYTES,
        "threads": level != "limits",
        "packages": sysconfig.get_path("purelib"),
    }
    secret = {"tests": public.pop("tests")}
    first = json.dumps(public).encode()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="opd-code-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as answers,
            tempfile.TemporaryFile() as log,
        ):
            stdin.write(first + json.dumps(secret).encode())
            stdin.flush()
            end = _run_to_end(level, len(first), folder, (stdin, answers, log), time_limit_s)
            return _read(answers, log, end)
    except OSError as error:
        raise ProcessError("The sandbox cannot run", got=error) from error


def command(level: Level, size: int, folder: str) -> list[str]:
    """The command line. ``size``: bytes of the public part of descriptor 0; ``folder``: empty, deleted afterwards."""
    visible = visible_paths()
    python = [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", str(RUNNER), level, str(size), folder]
    if level != "bubblewrap":
        return [*python, *visible]
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise ProcessError("The sandbox cannot run", got="no bwrap on the PATH", fix="install bubblewrap")
    if os.geteuid() == 0:
        raise ProcessError("The sandbox cannot run", got="root, whose processes the kernel does not count")
    options = "--unshare-all --as-pid-1 --die-with-parent --cap-drop ALL --uid 65534 --gid 65534".split()
    options += ["--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", "/tmp"]
    for path in visible:
        options += ["--ro-bind", path, path]
    for name in ("null", "zero", "urandom", "random"):
        options += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    return [bwrap, *options, "--dir", HOME, "--remount-ro", "/", "--chdir", HOME, *python]


def visible_paths() -> list[str]:
    """What a sandbox with its own file system can read: the system's libraries, Python and its packages, the runner."""
    wanted = [*SYSTEM, sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("purelib"), str(RUNNER.parent)]
    existing = sorted({path for path in wanted if os.path.exists(path)})
    kept: list[str] = []
    for path in existing:
        if not any(Path(path).is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


def _run_to_end(level: Level, size: int, folder: str, files: tuple[IO[bytes], ...], time_limit_s: float) -> str:
    """Run the process, kill all of its group and tell how it ended."""
    stdin, answers, log = files
    home = folder if level == "limits" else HOME
    environment = {"PATH": os.defpath, "HOME": home, "TMPDIR": home, "OPENBLAS_NUM_THREADS": "1"}
    argv = command(level, size, folder)
    process = subprocess.Popen(
        argv, stdin=stdin, stdout=answers, stderr=log, cwd=folder, env=environment, start_new_session=True
    )
    try:
        in_time = _wait(process, time_limit_s)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # not reaped yet, so the number is still its own
        code = process.wait()
    if not in_time:
        return f"timed out after {time_limit_s:g} s"
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    """Wait for the end without reaping; False if it takes longer."""
    descriptor = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return bool(poll.poll(seconds * 1000))
    finally:
        os.close(descriptor)


def _read(answers: IO[bytes], log: IO[bytes], end: str) -> Run:
    """Parse the complete rows after "ready"."""
    answers.seek(0)
    data = answers.read(ANSWER_BYTES)
    if not data:  # even if it timed out: that says something about the machine, not about the code
        log.seek(0)
        raise ProcessError("The sandbox did not start", got=f"{end}: {log.read(2000).decode(errors='replace')}")
    if len(data) >= ANSWER_BYTES:
        end = f"answers of more than {ANSWER_BYTES} bytes"
    rows: list[list] = []
    for line in data.split(b"\n")[1:-1]:
        try:
            rows.append(json.loads(line))
        except RecursionError:  # nested as deep as the runner could just write
            return Run([*rows, ["ended", "unreadable answer"]], end)
    return Run(rows, end)
