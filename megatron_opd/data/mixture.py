"""Prompts of several domains in fixed shares, whatever the numbers of their records are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megatron_opd.data.file_stream import FileStream
from megatron_opd.data.stream import Known, PromptStream
from megatron_opd.errors import DataError
from megatron_opd.records import Outcome, Prompt


class MixedStream:
    """One stream for each domain; each draw is of the domain that is furthest behind its share.

    So after n draws a domain has had fewer than share * n + 1; of two domains each also more than share * n - 1, of
    more of them hardly less. A domain whose records are used up begins its next epoch; the others do not wait for it.
    """

    def __init__(self, parts: Sequence[PromptStream | FileStream], shares: Sequence[float]) -> None:
        """``shares``: one > 0 for each part; only their ratios count."""
        self._parts = parts
        self._shares = np.array(shares, dtype=np.float64) / np.sum(shares)
        self._credit = np.zeros(len(parts))  # draws that a part is behind its share

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        return [prompt for _, prompt in self.draw(count)]

    def draw(self, count: int) -> list[tuple[str, Prompt]]:
        """The same, each with the name that ``find`` takes."""
        turns = [self._turn() for _ in range(count)]
        drawn = [iter(part.draw(turns.count(number))) for number, part in enumerate(self._parts)]
        return [(f"{number}:{name}", prompt) for number in turns for name, prompt in [next(drawn[number])]]

    def find(self, name: str) -> Prompt:
        """A prompt that was drawn before."""
        number, _, own = name.partition(":")
        return self._parts[int(number)].find(own)

    def observe(self, outcomes: Iterable[tuple[str, Outcome]]) -> None:
        """Hand outcomes to the streams that know the prompts."""
        outcomes = list(outcomes)
        for part in self._parts:
            if isinstance(part, PromptStream):
                part.observe([(name, outcome) for name, outcome in outcomes if name in part])

    def known(self) -> Known | None:
        """What the parts have learned of their prompts, one after the other; null where one keeps nothing."""
        known = [part.known() for part in self._parts]
        if any(one is None for one in known):
            return None
        prompts = [prompt for one in known for prompt in one.prompts]
        return Known(
            prompts, np.concatenate([one.graded for one in known]), np.concatenate([one.passes for one in known])
        )

    def state(self) -> dict[str, np.ndarray]:
        """What ``restore`` of a stream of the same parts needs."""
        parts = {f"{i}.{name}": value for i, part in enumerate(self._parts) for name, value in part.state().items()}
        return parts | {"credit": self._credit.copy()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go to a position. Raises DataError when the state is of other parts."""
        credit = state.get("credit")
        if credit is None or credit.shape != self._credit.shape:
            fix = "set data.mixture as it was, or start anew with existing=archive"
            raise DataError("The saved position is of another mixture", got=", ".join(state), fix=fix)
        for number, part in enumerate(self._parts):
            own = f"{number}."
            part.restore({name.removeprefix(own): value for name, value in state.items() if name.startswith(own)})
        self._credit = credit.copy()

    def _turn(self) -> int:
        """Whose turn it is; of equals the first."""
        self._credit += self._shares
        number = int(np.argmax(np.round(self._credit, 9)))  # equal shares stay equal after sums of floats
        self._credit[number] -= 1
        return number
