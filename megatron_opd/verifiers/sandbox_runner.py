"""The process that runs untrusted code; ``sandbox`` starts it as ``python -I -S`` and tells what it protects.

Reads a JSON request from descriptor 0 and writes rows of JSON to descriptor 1:
``["ready", null]``, then ``["load", error]``, or ``["value", returned]`` or ``["error", error]`` for each call.
Imports as little as possible: its start is most of the cost of a verification.
"""

import _thread
import json
import os
import resource
import signal
import sys

NOBODY = 65534
OPEN_FILES = 32
FORBIDDEN = frozenset(
    "os.fork os.forkpty os.posix_spawn os.exec os.system subprocess.Popen pty.spawn "
    "os.kill os.killpg signal.pthread_kill socket.__new__ ctypes.dlopen ctypes.dlsym".split()
)


def leave_root():
    """Become nobody, unless nobody cannot read the standard library or this user namespace has no such user."""
    os.chown(".", NOBODY, NOBODY)
    try:
        os.seteuid(NOBODY)
        readable = os.access(json.__file__, os.R_OK, effective_ids=True)
        os.seteuid(0)
        if readable:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError:
        return


def confine(request):
    """Set every limit; nothing of the response has been loaded yet."""
    if os.geteuid() == 0:
        leave_root()
    limits = {
        resource.RLIMIT_CPU: request["cpu_s"],
        resource.RLIMIT_AS: request["memory_bytes"],
        resource.RLIMIT_FSIZE: request["file_bytes"],
        resource.RLIMIT_NOFILE: OPEN_FILES,
        resource.RLIMIT_NPROC: 0,  # no further process; has no effect on root
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))
    signal.alarm(request["cpu_s"] + 1)  # ends this process even if the one that should kill it has died
    sys.modules["_posixsubprocess"] = None  # starts processes without an audit event
    _thread.start_new_thread = refuse_thread  # RLIMIT_NPROC refuses threads too, but not to root: one rule for all
    sys.addaudithook(refuse)


def refuse(event, _arguments):
    """Audit hook: raise in the caller's face."""
    if event in FORBIDDEN:
        raise PermissionError(f"{event} is not allowed")


def refuse_thread(*_arguments):
    """Stands in for ``_thread.start_new_thread``."""
    raise PermissionError("threads are not allowed")


def take_descriptors():
    """Move the channel away from descriptor 1, send prints to the log, and leave nothing to read on descriptor 0."""
    channel = os.fdopen(os.dup(1), "w", encoding="ascii", buffering=1)
    os.dup2(2, 1)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    return channel


def load(source, fn_name):
    """Execute the response as a module and return its function, or the method of its class Solution."""
    module = type(sys)("response")
    sys.modules["response"] = module  # dataclasses look their module up
    exec(compile(source, "response.py", "exec", dont_inherit=True), module.__dict__)
    if not hasattr(module, fn_name) and hasattr(module, "Solution"):
        return getattr(module.Solution(), fn_name)
    return getattr(module, fn_name)


def describe(error):
    """One line about an exception."""
    return f"{type(error).__name__}: {error}"[:500]


def main():
    """Serve one request."""
    request = json.loads(sys.stdin.buffer.read())
    channel = take_descriptors()
    confine(request)

    def send(kind, content):
        channel.write(json.dumps([kind, content]) + "\n")

    send("ready", None)
    try:
        function = load(request["source"], request["fn_name"])
    except BaseException as error:  # noqa: BLE001 - sys.exit while loading is the response's mistake too
        send("load", describe(error))
        return
    for arguments in request["inputs"]:
        try:
            row = json.dumps(["value", function(*arguments)])
        except BaseException as error:  # noqa: BLE001 - whatever it raises is the result of this call
            row = json.dumps(["error", describe(error)])
        channel.write(row + "\n")


if __name__ == "__main__":
    main()
    os._exit(0)  # no exit handlers of the response
