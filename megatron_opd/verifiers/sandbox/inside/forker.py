"""Forks one sandbox for each request, which costs a third of starting Python: ``python -I -S forker.py SOCKET``.

SOCKET is a descriptor of a stream of packets. A packet is a JSON of ``Order`` and carries three descriptors, for the
sandbox's 0 to 2; the answer is a JSON text that tells how the sandbox ended. Nothing of any response or test is ever
read here: only the forked process reads its descriptor 0.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import traceback

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)

import confine  # noqa: E402 - found through the line above
import runner  # noqa: E402

sys.path.remove(HERE)

PRELOADED = "collections copy functools heapq itertools math operator random re string typing bisect"
LONGEST_ORDER = 1 << 17


def serve(orders: socket.socket) -> None:
    """Carry out orders until the other end closes."""
    while True:
        packet, descriptors, _, _ = socket.recv_fds(orders, LONGEST_ORDER, 3)
        if not packet:
            return
        order = json.loads(packet)
        process = os.fork()
        if not process:
            orders.close()
            become_sandbox(order, descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        orders.send(json.dumps(wait(process, order["time_limit_s"])).encode())


def become_sandbox(order: dict, descriptors: list[int]) -> None:
    """In the forked process. Never returns."""
    try:
        confine.call("prctl", confine.PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(order["folder"])
        os.environ.update(order["environment"])
        if order["command"]:
            os.execve(order["command"][0], order["command"], os.environ)
        runner.main(order["level"], order["size"], order["folder"], order["visible"])
        os._exit(0)
    except BaseException:  # noqa: BLE001 - into the sandbox's log
        traceback.print_exc()
    finally:
        os._exit(1)


def wait(process: int, seconds: float) -> str:
    """Wait for a sandbox, kill all of its group and tell how it ended."""
    descriptor = os.pidfd_open(process)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    in_time = poll.poll(seconds * 1000)
    os.close(descriptor)
    for kill in (os.killpg, os.kill):  # the second one for a process that had no time to make its group
        try:
            kill(process, signal.SIGKILL)  # not reaped yet, so the number is still its own
        except ProcessLookupError:
            continue
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if not in_time:
        return f"timed out after {seconds:g} s"
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def main(descriptor: int, parent: int) -> None:
    """Serve the socket with this number, and end with the parent."""
    confine.call("prctl", confine.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        return
    for name in PRELOADED.split():  # what responses import
        __import__(name)
    gc.freeze()
    serve(socket.socket(fileno=descriptor))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
