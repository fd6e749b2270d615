"""Tensors to all other ranks of a gloo group, each out of the memory it is in, without a word between two of them.

A gloo broadcast agrees on every tensor anew, which costs a third of the time at 4 MB a tensor. Receivers of a line have
asked for everything at once, so that what is sent goes on its way as it comes.
"""

from __future__ import annotations

import threading
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist

TAG = 0
_On = tuple[torch.Tensor, list[dist.Work]]  # its way: the tensor must live until these are done


class Line:
    """Sends in order. gloo tells of the end of a send only those who wait for it: a thread of the line's own does."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._queue: SimpleQueue[_On | None] = SimpleQueue()
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
        works = [self._group.send([tensor], rank, TAG) for rank in range(1, self._group.size())]
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
