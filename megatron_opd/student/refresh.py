"""Weight refresh, trainer side: the student's weights reach the rollout engines, and are proven there.

The weights are gathered tensor by tensor under their Hugging Face names, so no rank ever holds a second model, and the
first rank sends them in buckets (``transports``); a vision tower that is frozen stays here. Afterwards each engine must
name the new version, and its log-probs of a fixed probe sequence, with an image if the student reads any, must equal
the trainer's: a wrong name map, a lost tensor, another tower or a stale cache stops the run here and not in the
learning curve.

    any engine --answers nothing----------------> out, tried again at the next refresh
               --says that it failed------------> sent everything once more, then out
               --other version or log-probs-----> out
               --all well-----------------------> live

An engine that is out is half updated at worst: its requests are aborted, and nobody may ask it for responses until a
later refresh has found it live. docs/refresh.md tells it at length.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from megatron_opd.config import RefreshConfig
from megatron_opd.engines.weights import WeightClient
from megatron_opd.errors import OpdError, RefreshError
from megatron_opd.runtime.http import TransientError
from megatron_opd.student.build import Student
from megatron_opd.student.export import hf_weights
from megatron_opd.student.probe import Probe, image_probe, text_probe
from megatron_opd.student.step import sequence_logprobs
from megatron_opd.student.transports import TRANSPORTS, Place, Sent, Transport
from megatron_opd.student.transports.base import each, soon
from megatron_opd.student.vision.images import ImageReader

logger = logging.getLogger(__name__)

TRIES = 3  # for an engine that says itself that it failed, or that was in a group with one that did
PAUSE_S = 1.0  # between two looks at engines of which none answers


@dataclass(frozen=True)
class Refreshed:
    """How one refresh went; the same type on every rank, filled on the first."""

    seconds: float = 0.0
    bytes: int = 0
    probe_difference: float = 0.0  # largest of all live engines
    live: tuple[str, ...] = ()  # URLs
    out: dict[str, str] = field(default_factory=dict)  # URL -> why


class WeightRefresh:
    """The way from one student to its rollout engines. Made by ``connect``; every rank calls ``push``."""

    def __init__(
        self, config: RefreshConfig, probe: Probe, engines: Sequence[WeightClient], transport: Transport | None
    ) -> None:
        self._config, self._engines = config, tuple(engines)
        self._transport = transport  # None on other ranks than the first
        self._probe = probe
        self._versions: dict[WeightClient, str] = {}  # of engines that were found live

    @classmethod
    def connect(
        cls,
        config: RefreshConfig,
        engines: Sequence[WeightClient],
        place: Place,
        vocab_size: int,
        images: ImageReader | None = None,
    ) -> WeightRefresh:
        """engines: all there are, on the first rank; none on the others. images: of a student that reads any."""
        keep = images.folder if images is not None and engines else None
        probe = text_probe(vocab_size) if images is None else image_probe(vocab_size, images.vision, keep)
        return cls(config, probe, engines, TRANSPORTS[config.mode](config, place) if engines else None)

    async def close(self) -> None:
        """Let the engines forget what they know of the trainer: one that the run was attached to goes on."""
        if self._transport is not None:
            await self._transport.close()

    async def push(self, student: Student, version: int) -> Refreshed:
        """Send all weights as ``version`` and compare the probe. Every rank calls it.

        Returns when at least one engine is live. Raises RefreshError when every engine that can be reached has other
        weights than the trainer afterwards, or when none could be reached for ``recovery_s``.
        """
        if self._transport is None:
            return self._take_part(student)
        began = time.monotonic()
        while True:
            attempt = _Attempt()
            await self._attempt(student, version, attempt)
            seconds = time.monotonic() - began
            ours = sequence_logprobs(student, self._probe.token_ids, self._probe.images)
            await self._verify(attempt, ours, version)
            for engine, error in attempt.out.items():
                logger.warning("the engine %s is out of rotation: %s", engine.url, error)
            _share(student, not attempt.differences)
            if attempt.differences:
                break
            late = time.monotonic() - began > self._config.recovery_s
            reason = next((error for error in attempt.out.values() if late or not _may_return(error)), None)
            if reason is not None:
                raise reason
        return Refreshed(
            seconds=seconds,
            bytes=attempt.bytes,
            probe_difference=max(attempt.differences.values()),
            live=tuple(engine.url for engine in self._engines if engine in attempt.differences),
            out={engine.url: error.what for engine, error in attempt.out.items()},
        )

    def _take_part(self, student: Student) -> Refreshed:
        """What the other ranks do: they help to gather, as often as the first rank says."""
        again = True
        while again:
            while again:
                for _ in hf_weights(student, learning=True):  # keeps nothing
                    pass
                again = _share(student)
            sequence_logprobs(student, self._probe.token_ids, self._probe.images)
            again = _share(student)
        return Refreshed()

    # ---------------------------------------------------------------- sending

    async def _attempt(self, student: Student, version: int, attempt: _Attempt) -> None:
        """Send until every engine has the weights or is out."""
        waiting = await self._look(attempt)
        while True:
            weights = hf_weights(student, learning=True)
            sent = await self._deliver(waiting, weights, version)
            for _ in weights:  # what a failure left: the other ranks gather to the end
                pass
            attempt.bytes = max(attempt.bytes, sent.bytes)
            attempt.sent += [engine for engine in waiting if engine not in sent.failed]
            waiting = self._sort_out(sent, attempt)
            _share(student, bool(waiting))
            if not waiting:
                return

    async def _look(self, attempt: _Attempt) -> list[WeightClient]:
        """Engines that answer; waits for the first one. Raises RefreshError after ``recovery_s``."""
        deadline = time.monotonic() + self._config.recovery_s
        while True:
            failed = await each(self._engines, self._check_known)
            if len(failed) < len(self._engines):
                attempt.out = dict(failed)
                return [engine for engine in self._engines if engine not in failed]
            if time.monotonic() > deadline:
                raise RefreshError(
                    "No rollout engine can be reached",
                    where=", ".join(engine.url for engine in self._engines),
                    got=f"for {self._config.recovery_s:g} s: {next(iter(failed.values()))}",
                    fix="look at the engines' logs",
                )
            await asyncio.sleep(PAUSE_S)

    async def _check_known(self, engine: WeightClient) -> None:
        """Raise when an engine does not answer. One that has been restarted knows nothing of what was agreed upon."""
        version = await soon(engine, engine.weight_version())
        if version != self._versions.get(engine):
            self._transport.forget(engine)

    async def _deliver(
        self, engines: Sequence[WeightClient], weights: Iterator[tuple[str, torch.Tensor]], version: int
    ) -> Sent:
        """One pass, while responses under way are paused as the config says. Those of an engine that fails are lost."""
        mode = self._config.pause
        if mode == "none":
            sent = await self._transport.send(engines, weights, version, flush=True)
            await _abort(sent.failed)
            return sent
        failed = await each(engines, lambda engine: engine.pause(mode))
        paused = [engine for engine in engines if engine not in failed]
        sent = Sent(failed=failed)
        try:
            if paused:
                # With running requests in the cache it cannot be emptied.
                sent = await self._transport.send(paused, weights, version, flush=mode != "in_place")
                sent.failed |= failed
        finally:
            await _abort(sent.failed)
            sent.failed |= await each(paused, WeightClient.resume)
        return sent

    @staticmethod
    def _sort_out(sent: Sent, attempt: _Attempt) -> list[WeightClient]:
        """Engines that get another try; the others that failed are out."""
        again = []
        for engine, error in sent.failed.items():
            attempt.tries[engine] += 1
            if _may_return(error) or attempt.tries[engine] == TRIES:
                attempt.out[engine] = error
            else:
                again.append(engine)
        return again

    # -------------------------------------------------------------- verifying

    async def _verify(self, attempt: _Attempt, ours: np.ndarray, version: int) -> None:
        """Compare every engine that was sent the weights with the trainer, and engines with each other."""
        digests: dict[WeightClient, tuple[int, str]] = {}  # layout and checksum

        async def check(engine: WeightClient) -> None:
            await self._check_version(engine, version)
            attempt.differences[engine] = await self._check_probe(engine, ours, version)
            if len(attempt.sent) > 1 and (digest := await engine.weights_checksum()) is not None:
                digests[engine] = await engine.tensor_parallel(), digest

        wrong = await each(attempt.sent, check)
        wrong |= _disagreeing({engine: digest for engine, digest in digests.items() if engine not in wrong})
        await _abort(wrong)
        attempt.out |= wrong
        for engine in wrong:
            attempt.differences.pop(engine, None)
        self._versions = dict.fromkeys(attempt.differences, str(version))

    async def _check_version(self, engine: WeightClient, version: int) -> None:
        live = await engine.weight_version()
        if live != str(version):
            raise RefreshError(
                "The rollout engine did not take the new weight version",
                where=engine.url,
                got=live,
                expected=version,
            )

    async def _check_probe(self, engine: WeightClient, ours: np.ndarray, version: int) -> float:
        probe = self._probe
        theirs = await engine.sequence_logprobs(probe.token_ids, probe.images)
        same = ours.shape == theirs.shape
        difference = float(np.abs(ours - theirs)[probe.compared].max()) if same else float("nan")
        if not difference <= self._config.probe_tolerance:  # also true for NaN
            fix = "compare the precision of student and engine (student.dtype, engine.dtype), then the name map"
            if probe.images:
                fix += "; then the vision tower, and whether the engine keeps what it makes of images (docs/refresh.md)"
            raise RefreshError(
                "After a weight refresh the rollout engine's log-probs are not the trainer's",
                where=f"{engine.url}, weight version {version}, probe of {len(ours) + 1} tokens",
                got=f"largest difference {difference:.3g}",
                expected=f"at most {self._config.probe_tolerance:g}",
                fix=fix,
            )
        return difference


@dataclass
class _Attempt:
    """One attempt to give all engines the weights, as far as it has come."""

    bytes: int = 0
    sent: list[WeightClient] = field(default_factory=list)  # these say that they have them
    differences: dict[WeightClient, float] = field(default_factory=dict)  # of the probe; these have proven it
    out: dict[WeightClient, OpdError] = field(default_factory=dict)
    tries: Counter[WeightClient] = field(default_factory=Counter)


def _may_return(error: OpdError) -> bool:
    """Whether it was silence: an engine that is started again may be well then, one that answers wrongly will not."""
    return isinstance(error, TransientError)


def _disagreeing(digests: dict[WeightClient, tuple[int, str]]) -> dict[WeightClient, OpdError]:
    """All engines of a layout in which not all have the same weights: nobody knows which of them are right."""
    found: dict[WeightClient, OpdError] = {}
    for layout in {layout for layout, _ in digests.values()}:
        same = {engine: digest for engine, (other, digest) in digests.items() if other == layout}
        if len(set(same.values())) > 1:
            for engine, digest in same.items():
                expected = "the same for all of " + ", ".join(other.url for other in same)
                what = "Rollout engines have different weights after one refresh"
                found[engine] = RefreshError(what, where=engine.url, got=digest, expected=expected)
    return found


async def _abort(engines: Iterable[WeightClient]) -> None:
    """End the requests of engines whose weights are no version's: not one token of theirs may be trained on."""
    for engine, error in (await each(engines, lambda engine: soon(engine, engine.abort_all()))).items():
        logger.info("the requests of %s could not be aborted: %s", engine.url, error)


def _share(student: Student, value: bool = False) -> bool:
    """The first rank's ``value``, on all ranks."""
    flag = torch.tensor([value], dtype=torch.int32, device=student.device)
    dist.broadcast(flag, src=0)
    return bool(flag)
