"""Whether a server that has worked still answers anything: one that hangs does not end, so nobody else would notice."""

from __future__ import annotations

from concurrent.futures import Executor, Future

from megatron_opd.runtime.supervision import ANSWER_S, responds

ASK_EVERY_S = 5.0


class Pulse:
    """One server, asked by a thread: who asks one that hangs has to wait for it, and a supervisor must not.

    pulse = Pulse("http://127.0.0.1:30000/ready", threads)
    pulse.silence_s(now=100)  # 0.0, and the first question is on its way
    pulse.silence_s(now=105)  # 0.0 when that was answered; else a second question is on its way
    pulse.silence_s(now=110)  # 5.0 when neither was answered: seconds between questions without an answer in between

    Time in which nobody asked, because this process or the whole machine slept, is not silence: the answer to the next
    question ends it.
    """

    def __init__(self, url: str, threads: Executor, every_s: float = ASK_EVERY_S) -> None:
        self._url, self._threads, self._every_s = url, threads, every_s
        self._answer_s = max(every_s, ANSWER_S)
        self._question: Future[bool] | None = None
        self._asked: float | None = None  # when that was, or the last one
        self._silent_since: float | None = None  # the first question of a row without answers
        self._silence_s = 0.0

    def silence_s(self, now: float) -> float:
        """Take the answer, if one is there; ask, if it is time. ``now``: monotonic."""
        if self._question is not None and self._question.done():
            self._note(self._question.result())
            self._question = None
        if self._question is None and (self._asked is None or now - self._asked >= self._every_s):
            self._asked, self._question = now, self._threads.submit(responds, self._url, self._answer_s)
        return self._silence_s

    def _note(self, answered: bool) -> None:
        if answered:
            self._silent_since, self._silence_s = None, 0.0
            return
        if self._silent_since is None:
            self._silent_since = self._asked
        self._silence_s = self._asked - self._silent_since
