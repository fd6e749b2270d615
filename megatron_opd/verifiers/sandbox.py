"""Runs an untrusted Python function in a process of its own.

Protected:

* Expected outputs never enter the other process: it returns values over a private channel and the caller compares
  them, so printing, exiting, ``__eq__`` tricks or even writing to the channel cannot make a wrong function right.
* Endless loops and sleeps: limits of CPU and wall time, then the whole process group is killed.
* Memory, file size, number of open files, core dumps: resource limits that the runner sets on itself before it loads
  the code. What the code prints goes to a file with the same size limit; an overflow is an error of the code.
* New processes, threads, signals to others, sockets and foreign functions are refused by an audit hook, and new
  processes by a resource limit as well. A runner that starts as root becomes nobody where that user can read Python.
* No environment variables, no inherited descriptors, an empty working folder that is deleted afterwards.

Not protected: reading the files that the user can read, a prompt file with its answers among them (everything, for
root where nobody cannot read Python); writing where the user can write, until the disk is full; and determined attacks
on the interpreter itself, which get past an audit hook: they can then use the network, send signals, and, as root,
leave a process behind that survives the kill of its group. Namespaces are what closes these.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from megatron_opd.errors import ProcessError

RUNNER = Path(__file__).with_name("sandbox_runner.py")
MEMORY_BYTES = 512 << 20  # address space of the runner
FILE_BYTES = 4 << 20  # largest file it can write: its answers, its prints, its own files


@dataclass(frozen=True, slots=True)
class Answer:
    """What one call gave: a value, or the text of an error."""

    value: object = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Run:
    """What the calls gave, in order; fewer answers than calls if the process ended early."""

    answers: list[Answer]
    end: str = ""  # how the process ended, one clause
    load_error: str = ""  # why the code could not be loaded; then there are no answers


def run_function(source: str, fn_name: str, inputs: list[list], time_limit_s: float) -> Run:
    """Load ``source`` and call ``fn_name`` once with each list of arguments.

    Raises ProcessError if the sandbox itself fails; whatever the code does to itself is part of the Run.
    """
    request = {
        "source": source,
        "fn_name": fn_name,
        "inputs": inputs,
        "cpu_s": int(time_limit_s) + 1,
        "memory_bytes": MEMORY_BYTES,
        "file_bytes": FILE_BYTES,
    }
    try:
        with (
            tempfile.TemporaryDirectory(prefix="opd-code-", ignore_cleanup_errors=True) as folder,
            tempfile.TemporaryFile() as stdin,
            tempfile.TemporaryFile() as answers,
            tempfile.TemporaryFile() as log,
        ):
            stdin.write(json.dumps(request).encode())
            stdin.seek(0)
            end = _run_to_end(folder, stdin, answers, log, time_limit_s)
            return _read(answers, log, end)
    except OSError as error:
        raise ProcessError("The sandbox cannot run", got=error) from error


def _run_to_end(folder: str, stdin: IO[bytes], answers: IO[bytes], log: IO[bytes], time_limit_s: float) -> str:
    """Run the process, kill all of its group and tell how it ended."""
    command = [
        sys.executable,
        "-I",
        "-S",
        "-X",
        "utf8",
        str(RUNNER),
    ]  # -I: neighbours named math and code are not found
    environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder}
    process = subprocess.Popen(
        command, stdin=stdin, stdout=answers, stderr=log, cwd=folder, env=environment, start_new_session=True
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
    return f"exited with code {code} before it answered"


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
    """Parse the runner's rows: ready, then load or one of value and error for each call."""
    answers.seek(0)
    data = answers.read(FILE_BYTES)
    if not data:  # even if it timed out: that says something about the machine, not about the code
        log.seek(0)
        raise ProcessError("The sandbox did not start", got=f"{end}: {log.read(2000).decode(errors='replace')}")
    if len(data) >= FILE_BYTES:
        end = f"answers of more than {FILE_BYTES} bytes"
    parsed: list[Answer] = []
    for line in data.split(b"\n")[1:-1]:  # all complete rows after "ready"
        try:
            kind, content = json.loads(line)
        except (ValueError, TypeError, RecursionError):  # only code that found the channel writes such rows
            return Run(parsed, end="unreadable answer")
        if kind == "load":
            return Run([], load_error=str(content))
        parsed.append(Answer(error=str(content)) if kind == "error" else Answer(value=content))
    return Run(parsed, end)
