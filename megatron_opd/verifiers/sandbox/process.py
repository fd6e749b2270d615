"""Starts sandboxes and reads what they wrote."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import weakref
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Literal

from megatron_opd.errors import ProcessError

Level = Literal["bubblewrap", "namespaces", "limits"]
INSIDE = Path(__file__).with_name("inside")
PYTHON_OPTIONS = ["-I", "-S", "-X", "utf8"]  # -I and -S: no file of the user is imported
BARE = {"PATH": os.defpath, "OPENBLAS_NUM_THREADS": "1"}  # no environment variable of ours
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


class Sandbox:
    """Runs requests one after the other, each in a fresh process. Started at the first one; closed when collected."""

    def __init__(self, level: Level) -> None:
        self.level = level
        self._forker: _Forker | None = None

    def run(self, request: Request, time_limit_s: float) -> Run:
        """Run it within ``time_limit_s`` of wall time.

        Raises ProcessError if the sandbox itself fails; whatever the response does to itself is part of the Run.
        """
        public = asdict(request) | {
            "cpu_s": int(time_limit_s) + 1,
            "memory_bytes": MEMORY_BYTES,
            "file_bytes": FILE_BYTES,
            "answer_bytes": ANSWER_BYTES,
            "scratch_bytes": SCRATCH_BYTES,
            "threads": self.level != "limits",
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
                end = self._carry_out(order(self.level, len(first), folder, time_limit_s), (stdin, answers, log))
                return _read(answers, log, end)
        except OSError as error:
            raise ProcessError("The sandbox cannot run", got=error) from error

    def _carry_out(self, task: dict, files: tuple[IO[bytes], ...]) -> str:
        """How the sandbox ended. Raises OSError or ProcessError."""
        if self._forker is None:
            self._forker = _Forker()
        end = self._forker.carry_out(task, files)
        if end is None:
            self._forker = None  # the next run starts another
            raise ProcessError("The sandbox cannot run", got="the process that starts it has died")
        return end


class _Forker:
    """The process of ``inside/forker.py``."""

    def __init__(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        arguments = [str(theirs.fileno()), str(os.getpid())]
        command = [python(), *PYTHON_OPTIONS, str(INSIDE / "forker.py"), *arguments]
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=BARE, pass_fds=[theirs.fileno()]
            )
        self._socket = mine
        weakref.finalize(self, _close, mine, self._process)

    def carry_out(self, task: dict, files: tuple[IO[bytes], ...]) -> str | None:
        """How the sandbox ended; None if this process has died."""
        try:
            socket.send_fds(self._socket, [json.dumps(task).encode()], [file.fileno() for file in files])
            reply = self._socket.recv(4096)
        except (BrokenPipeError, ConnectionResetError):
            return None
        return json.loads(reply) if reply else None


def _close(connection: socket.socket, process: subprocess.Popen) -> None:
    connection.close()  # it reads the end, and ends
    process.wait()


def python() -> str:
    """The interpreter itself, not a link to it from a virtual environment."""
    return os.path.realpath(sys.executable)


def order(level: Level, size: int, folder: str, time_limit_s: float) -> dict:
    """What the forker needs. ``size``: bytes of the public part of descriptor 0; ``folder``: empty, deleted later."""
    home = folder if level == "limits" else HOME
    visible = visible_paths() if level != "limits" else []
    return {
        "level": level,
        "size": size,
        "folder": folder,
        "time_limit_s": time_limit_s,
        "environment": {"HOME": home, "TMPDIR": home},
        "visible": visible,
        "command": bubblewrap(size, visible) if level == "bubblewrap" else None,
    }


def bubblewrap(size: int, visible: list[str]) -> list[str]:
    """The command line of bwrap. Raises ProcessError where it cannot be used."""
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
    command = [python(), *PYTHON_OPTIONS, str(INSIDE / "runner.py"), "bubblewrap", str(size), HOME]
    return [bwrap, *options, "--dir", HOME, "--remount-ro", "/", "--chdir", HOME, *command]


@cache
def visible_paths() -> list[str]:
    """What a sandbox with its own file system can read: the system's libraries, Python and its packages, the runner."""
    wanted = [*SYSTEM, sys.base_prefix, sys.base_exec_prefix, sysconfig.get_path("purelib"), str(INSIDE)]
    existing = sorted({path for path in wanted if os.path.exists(path)})
    kept: list[str] = []
    for path in existing:
        if not any(Path(path).is_relative_to(other) for other in kept):
            kept.append(path)
    return kept


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
