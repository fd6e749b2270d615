"""Tensors on their way to all other ranks of a group, each out of the memory it is in.

A gloo broadcast agrees on every tensor anew, which costs a third of the time at 4 MB a tensor. Receivers of a line have
asked for everything at once, so that what is sent goes on its way as it comes.
"""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist

_Leaving = tuple[torch.Tensor, list[dist.Work]]  # the tensor must live until these are done


class Broadcasts:
    """Broadcasts in order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._leaving: list[tuple[torch.Tensor, dist.Work]] = []

    def send(self, tensor: torch.Tensor) -> int:
        """Send a contiguous tensor; its bytes."""
        self._leaving.append((tensor, self._group.broadcast([tensor], _from_rank_0())))
        return tensor.nbytes

    def close(self) -> None:
        """Wait until everything has arrived."""
        for _, work in self._leaving:
            work.wait()

    def drop(self) -> None:
        """Let go of the group and of what is under way: each work keeps the connections open."""
        self._leaving.clear()
        del self._group


class Line:
    """Sends to one rank after the other, in order.

    gloo tells of the end of a send only those who wait for it: a thread of the line's own does.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._queue: SimpleQueue[_Leaving | None] = SimpleQueue()
        self._left, self._arrived = 0, 0  # bytes; each is changed by one thread
        self.broken = False
        self._thread = threading.Thread(target=self._wait, daemon=True)  # gloo may wait for long when a peer is gone
        self._thread.start()

    @property
    def under_way(self) -> int:
        """Bytes that have not arrived yet."""
        return self._left - self._arrived

    def send(self, tensor: torch.Tensor) -> int:
        """Send a contiguous tensor; its bytes."""
        works = [self._group.send([tensor], rank, 0) for rank in range(1, self._group.size())]
        self._left += tensor.nbytes
        self._queue.put((tensor, works))
        return tensor.nbytes

    def close(self) -> None:
        """Wait until everything has arrived."""
        self._queue.put(None)
        self._thread.join()

    def drop(self) -> None:
        """Let go of the group and of what is under way: each work keeps the connections open."""
        del self._group
        try:
            while True:
                self._queue.get_nowait()
        except Empty:
            self._queue.put(None)

    def _wait(self) -> None:
        while (item := self._queue.get()) is not None:
            tensor, works = item
            try:
                for work in works:
                    work.wait()
            except RuntimeError:  # a peer is gone, or the group's deadline has passed; the engines' answers say more
                self.broken = True
                return
            self._arrived += tensor.nbytes
            del item, tensor, works  # while it waits for the next


def _from_rank_0() -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options
