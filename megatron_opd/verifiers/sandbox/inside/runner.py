"""The sandbox's own process: forked by ``forker``, or started by path, ``python -I -S runner.py LEVEL BYTES FOLDER``.

Descriptor 0 is a file: BYTES of JSON that the response may know, then JSON that it may not. Rows of JSON go to
descriptor 1, ``["ready"]`` first; prints go to descriptor 2. The response runs in children of this process, which are
forked before the secret part is read.
"""

from __future__ import annotations

import builtins
import json
import os
import signal
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import confine  # noqa: E402 - found through the line above
import plain  # noqa: E402
import untrusted  # noqa: E402

sys.path.remove(HERE)


# What a call may raise in the tests. Not StopIteration: it would end a test's loop over calls as if all were done.
ERRORS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (
        *(ArithmeticError, OverflowError, ZeroDivisionError, LookupError, IndexError, KeyError, AttributeError),
        *(MemoryError, NameError, NotImplementedError, OSError, RecursionError, TypeError, ValueError),
    )
}


class Gone(BaseException):
    """The response's process ended or broke the protocol. Not an Exception: tests must not catch it by chance."""


class Child:
    """The response's process, as the tests see it."""

    def __init__(self, request: dict) -> None:
        mine, theirs = os.pipe(), os.pipe()
        self.limit = request["file_bytes"]
        self.gone = ""
        self.pid = os.fork()
        if not self.pid:
            try:
                untrusted.serve(request, mine[0], theirs[1])
            finally:
                os._exit(0)  # no exit handlers of the response
        os.close(mine[0])
        os.close(theirs[1])
        self.calls, self.replies = mine[1], os.fdopen(theirs[0], "rb")

    def read(self) -> list:
        """Its next row. Raises Gone."""
        line = self.replies.readline(self.limit)
        try:
            if line.endswith(b"\n"):
                row = json.loads(line)
                if isinstance(row, list) and len(row) >= 2 and row[0] in ("loaded", "load", "value", "error"):
                    return row
            self.gone = "unreadable answer" if line else ""
        except (ValueError, RecursionError):
            self.gone = "unreadable answer"
        if len(line) >= self.limit:
            self.gone = f"an answer of more than {self.limit} bytes"
        if not self.gone:
            self.gone = how_it_ended(os.waitpid(self.pid, 0)[1])
        raise Gone(self.gone)

    def call(self, name: str, arguments: object, options: object) -> list:
        """Let it call a function with encoded arguments. Raises Gone."""
        line = json.dumps([name, arguments, options]).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self.calls, line) :]
        except BrokenPipeError:
            pass  # reading tells how it ended
        return self.read()


def how_it_ended(status: int) -> str:
    """One clause about a process that ended too early."""
    if os.WIFSIGNALED(status):
        return f"ended by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exited with code {os.waitstatus_to_exitcode(status)} before it answered"


def run_calls(request: dict, _secret: bytes, send: object) -> None:
    """One row for each call, ``["value", encoded]`` or ``["error", text]``; ``["ended", clause]`` if it dies."""
    child = Child(request)
    try:
        kind, content, *_ = child.read()
        if kind != "loaded":
            send("load", content)
            return
        for arguments in request["inputs"]:
            row = child.call(request["fn_name"], plain.encode(arguments), {"dict": []})
            send(row[0], row[-1])
    except Gone as end:
        send("ended", str(end))


def run_programs(request: dict, _secret: bytes, send: object) -> None:
    """One row for each input, ``["out", printed, error]``; every input gets a fresh process."""
    for text in request["inputs"]:
        stdin, stdout, errors = (os.memfd_create(name) for name in ("stdin", "stdout", "errors"))
        os.write(stdin, text.encode(errors="surrogateescape"))
        os.lseek(stdin, 0, os.SEEK_SET)
        child = os.fork()
        if not child:
            untrusted.run_program(request, stdin, stdout, errors)
        status = os.waitpid(child, 0)[1]
        printed = os.pread(stdout, request["file_bytes"], 0).decode(errors="replace")
        error = os.pread(errors, 1000, 0).decode(errors="replace")
        send("out", printed, error or (how_it_ended(status) if status else ""))
        for descriptor in (stdin, stdout, errors):
            os.close(descriptor)


def run_assertions(request: dict, read_secret: object, send: object) -> None:
    """Run test code here, with functions that are called there: ``["passed", ""]`` or ``["failed", clause]``."""
    child = Child(request)
    tests = ""
    try:
        kind, content, *_ = child.read()
        if kind != "loaded":
            send("load", content)
            return
        tests = json.loads(read_secret())["tests"]
        namespace: dict[str, object] = {"__name__": "tests"}
        exec(request["prelude"], namespace)
        wanted = request["fn_name"]
        names = [wanted] if wanted else [name for name in content if not hasattr(builtins, name)]
        namespace |= {name: stand_in(child, name) for name in names}
        exec(compile(tests, "tests.py", "exec"), namespace)
    except BaseException as error:  # noqa: BLE001 - every way to fail a test
        send("failed", child.gone or clause(error, tests))
        return
    send(*(("failed", child.gone) if child.gone else ("passed", "")))


def stand_in(child: Child, name: str) -> object:
    """A function for the tests that runs in the response's process; values are copied, so none of its types arrive."""

    def function(*arguments: object, **options: object) -> object:
        row = child.call(name, plain.encode(arguments), plain.encode(options))
        if row[0] == "error":
            raise ERRORS.get(str(row[1]), RuntimeError)(row[-1])
        try:
            return plain.decode(row[1])
        except (ValueError, TypeError, RecursionError) as error:
            child.gone = "unreadable answer"
            raise Gone(child.gone) from error

    return function


def clause(error: BaseException, tests: str) -> str:
    """What failed, with the line of the test."""
    line, trace, lines = "", error.__traceback__, tests.splitlines()
    while trace:
        if trace.tb_frame.f_code.co_filename == "tests.py" and trace.tb_lineno <= len(lines):
            line = lines[trace.tb_lineno - 1].strip()
        trace = trace.tb_next
    return f"{untrusted.describe(error)} in: {line}"


MODES = {"calls": run_calls, "programs": run_programs, "assertions": run_assertions}


def main(level: str, size: int, folder: str, visible: list[str]) -> None:
    """Serve one request."""
    request = json.loads(os.pread(0, size, 0))
    signal.alarm(request["cpu_s"] + 1)  # ends this process even if the one that should kill it has died
    channel, source = os.dup(1), os.dup(0)
    os.dup2(2, 1)
    if level == "namespaces":
        confine.enter_namespaces(folder, visible, request["scratch_bytes"])
    else:
        confine.leave_root()
    confine.set_limits(request["cpu_s"], 2 * request["memory_bytes"], request["answer_bytes"])
    sys.path.append(request["packages"])
    os.environ.pop("PWD", None)  # of bwrap

    def send(*row: object) -> None:
        line = json.dumps(row).encode() + b"\n"
        while line:
            line = line[os.write(channel, line) :]

    def read_secret() -> bytes:
        return os.pread(source, os.fstat(source).st_size - size, size)

    send("ready")
    MODES[request["mode"]](request, read_secret, send)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], [])
    os._exit(0)
