"""The endless order in which prompts are drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_opd.errors import DataError
from megatron_opd.records import Prompt


class PromptStream:
    """Every epoch is a seeded permutation of all prompts; the state is one number, the prompts drawn so far.

    stream = PromptStream(prompts, seed=0)
    batch = stream.take(64)
    resumed = PromptStream(prompts, seed=0)
    resumed.restore(stream.state())  # draws what ``stream`` draws next
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        if not prompts:
            raise DataError("A stream needs at least one prompt", got=0, expected="1 or more")
        self._prompts = prompts
        self._seed = seed % 2**64  # numpy refuses negative seeds
        self._position = 0
        self._epoch, self._order = 0, self._permutation(0)

    @property
    def position(self) -> int:
        """Prompts drawn so far, over all epochs."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epochs completed so far."""
        return self._position // len(self._prompts)

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; may cross the end of an epoch."""
        return [self._next() for _ in range(count)]

    def state(self) -> int:
        """What ``restore`` of a stream with the same prompts and seed needs."""
        return self._position

    def restore(self, state: int) -> None:
        """Go to a position."""
        if state < 0:
            raise DataError("A stream cannot start before its beginning", got=state, expected="0 or more")
        self._position = state

    def _next(self) -> Prompt:
        epoch, index = divmod(self._position, len(self._prompts))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        self._position += 1
        return self._prompts[self._order[index]]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(len(self._prompts))
