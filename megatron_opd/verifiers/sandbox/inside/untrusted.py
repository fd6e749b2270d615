"""The process that loads and runs the response. Nothing it sends is believed, and it holds no expected answers."""

from __future__ import annotations

import _posixsubprocess
import _thread
import atexit
import json
import os
import signal
import sys
import types
from collections.abc import Callable

import confine
import plain

TASKS = 8  # processes and threads of the sandbox's user


def serve(request: dict, calls: int, replies: int) -> None:
    """Load the response, then answer calls until the other end closes. Both numbers are descriptors."""
    settle(request, {calls, replies})
    reader = os.fdopen(calls, "rb")
    writer = os.fdopen(replies, "w", encoding="ascii")

    def reply(*row: object) -> None:
        writer.write(json.dumps(row) + "\n")
        writer.flush()

    try:
        functions = load(request)
    except BaseException as error:  # noqa: BLE001 - sys.exit while loading is the response's mistake too
        reply("load", describe(error))
        return
    reply("loaded", sorted(functions))
    for line in reader:
        name, arguments, options = json.loads(line)
        try:
            row = json.dumps(
                ["value", plain.encode(functions[name](*plain.decode(arguments), **plain.decode(options)))]
            )
        except BaseException as error:  # noqa: BLE001 - whatever it raises is the result of this call
            row = json.dumps(["error", type(error).__name__, describe(error)])
        writer.write(row + "\n")
        writer.flush()


def load(request: dict) -> dict[str, Callable]:
    """Execute the response as a module; its public functions and classes, with methods of class Solution as well."""
    module = types.ModuleType("response")
    sys.modules["response"] = sys.modules["__main__"] = module  # dataclasses look their module up
    for part in ("prelude", "source"):
        exec(compile(request.get(part, ""), "response.py", "exec", dont_inherit=True), module.__dict__)
    functions = {name: value for name, value in vars(module).items() if name[0] != "_" and callable(value)}
    wanted = request.get("fn_name")
    if wanted and wanted not in functions:
        owner = module.Solution() if hasattr(module, "Solution") else module
        functions[wanted] = getattr(owner, wanted)
    return functions


def run_program(request: dict, stdin: int, stdout: int, errors: int) -> None:
    """Run the response as a program; what it raises goes to ``errors``. The numbers are descriptors. Never returns."""
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    settle(request, {errors}, keep_stdin=True)
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(request["source"], "response.py", "exec", dont_inherit=True), module.__dict__)
        finish_program()
    except SystemExit as end:
        finish_program()
        if end.code not in (None, 0):
            os.write(errors, describe(end).encode())
    except BaseException as error:  # noqa: BLE001 - whatever it raises is the result
        os.write(errors, (describe(error) or "?").encode(errors="replace"))
    finally:
        os._exit(0)


def finish_program() -> None:
    """What the interpreter does at its end: wait for threads, run exit handlers, write what is buffered."""
    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()


def settle(request: dict, keep: set[int], keep_stdin: bool = False) -> None:
    """Set every limit and close every descriptor but 0 to 2 and ``keep``; nothing of the response is loaded yet."""
    if not keep_stdin:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor in set(range(3, 64)) - keep:
        try:
            os.close(descriptor)
        except OSError:  # it was not open
            continue
    confine.call("prctl", confine.PR_SET_PDEATHSIG, signal.SIGKILL)
    confine.set_limits(request["cpu_s"], request["memory_bytes"], request["file_bytes"])
    confine.limit_tasks(TASKS if request["threads"] else 0)
    for name in [name for name in sys.modules if "ctypes" in name]:
        sys.modules[name] = None  # this process has loaded it before the hook
    _posixsubprocess.fork_exec = refuse_process
    if not request["threads"]:
        _thread.start_new_thread = refuse_thread
    for name in ("confine", "plain", "untrusted", "runner", "forker", "socket", "__main__"):
        sys.modules.pop(name, None)
    sys.addaudithook(refuse)


def refuse(event: str, arguments: tuple) -> None:
    """Audit hook: raise in the caller's face. The names are constants of its code, which nobody may exchange."""
    if event == "object.__setattr__" and arguments[1] == "__code__":
        raise PermissionError("to exchange the code of a function is not allowed")
    # fmt: off
    if event in (
        "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen", "pty.spawn",
        "os.kill", "os.killpg", "signal.pthread_kill", "socket.__new__", "ctypes.dlopen", "ctypes.dlsym",
    ):
        raise PermissionError(f"{event} is not allowed")
    # fmt: on


def refuse_thread(*_arguments: object) -> None:
    """Stands in for ``_thread.start_new_thread`` where the kernel does not count the threads of this user."""
    raise PermissionError("threads are not allowed")


def refuse_process(*_arguments: object) -> None:
    """Stands in for ``_posixsubprocess.fork_exec``, which starts processes without an audit event."""
    raise PermissionError("processes are not allowed")


def describe(error: BaseException) -> str:
    """One line about an exception."""
    return f"{type(error).__name__}: {error}"[:500]
