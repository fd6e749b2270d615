"""The endless order in which prompts are drawn, and what their rollouts told of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_opd.config import LazyConfig
from megatron_opd.data.pass_rates import PassRates
from megatron_opd.errors import DataError
from megatron_opd.recipe.balance import random_keys
from megatron_opd.recipe.difficulty import BetaPosterior
from megatron_opd.records import Outcome, Prompt


@dataclass(frozen=True, eq=False)
class Known:
    """What a run has learned of n prompts."""

    prompts: Sequence[Prompt]  # [n]
    graded: np.ndarray  # [n] int64, rollouts with a known outcome
    passes: np.ndarray  # [n] int64


class PromptStream:
    """Every epoch is a seeded permutation of all prompts, each as often as its ``repeats`` says.

    stream = PromptStream(prompts, seed=0)
    batch = stream.take(64)
    stream.observe([(prompt.id, Outcome.CORRECT) for prompt in batch])
    resumed = PromptStream(prompts, seed=0)
    resumed.restore(stream.state())  # draws what ``stream`` draws next
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, prior: tuple[float, float] = (1.0, 1.0)) -> None:
        if not prompts:
            raise DataError("A stream needs at least one prompt", got=0, expected="1 or more")
        self.prompts = prompts
        self._index = {prompt.id: i for i, prompt in enumerate(prompts)}
        self._seed = seed % 2**64  # numpy refuses negative seeds
        self._position = 0
        self._prior = prior
        self.posterior = BetaPosterior(len(prompts), *prior)
        self._repeats = np.array([prompt.repeats for prompt in prompts])
        self._repeated = np.repeat(np.arange(len(prompts)), self._repeats)
        self._epoch, self._order = 0, self._permutation(0)

    @property
    def position(self) -> int:
        """Prompts drawn so far, over all epochs."""
        return self._position

    @property
    def epoch(self) -> int:
        """Epochs completed so far."""
        return self._position // len(self._repeated)

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts; may cross the end of an epoch."""
        return [self._next() for _ in range(count)]

    def draw(self, count: int) -> list[tuple[str, Prompt]]:
        """The same, each with the name that ``find`` takes."""
        return [(prompt.id, prompt) for prompt in self.take(count)]

    def find(self, name: str) -> Prompt:
        """A prompt that was drawn before."""
        return self.prompts[self._index[name]]

    def __contains__(self, name: str) -> bool:
        """Whether there is a prompt of this id."""
        return name in self._index

    def observe(self, outcomes: Iterable[tuple[str, Outcome]]) -> None:
        """Count what became of rollouts: the id of each one's prompt and its outcome. Unknown ones count nothing."""
        graded = [(self._index[prompt], outcome) for prompt, outcome in outcomes if outcome != Outcome.UNKNOWN]
        if graded:
            index, passed = np.array(graded, dtype=np.int64).T
            self.posterior.update(index, passed, np.ones_like(passed))

    def pass_counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Graded rollouts and passes of each prompt, in file order, both [n] int64."""
        passes = self.posterior.alpha - self._prior[0]
        failures = self.posterior.beta - self._prior[1]
        return np.rint(passes + failures).astype(np.int64), np.rint(passes).astype(np.int64)

    def known(self) -> Known:
        """What outcomes have told, for all prompts."""
        return Known(self.prompts, *self.pass_counts())

    def state(self) -> dict[str, np.ndarray]:
        """What ``restore`` of a stream with the same prompts and seed needs."""
        return {"position": np.array(self._position), **self.posterior.state_dict()}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go to a position. Raises DataError and changes nothing when the state does not fit these prompts."""
        if "position" not in state:
            fix = "set data.stream and data.mixture as they were, or start anew with existing=archive"
            raise DataError("The saved position is of another kind of stream", got=", ".join(state), fix=fix)
        position = int(state["position"])
        if position < 0:
            raise DataError("A stream cannot start before its beginning", got=position, expected="0 or more")
        self.posterior.load_state_dict({name: state[name] for name in ("alpha", "beta")})
        self._position = position

    def _next(self) -> Prompt:
        epoch, index = divmod(self._position, len(self._repeated))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._permutation(epoch)
        self._position += 1
        return self.prompts[self._order[index]]

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(self._repeated)


class LazyStream(PromptStream):
    """Each draw prefers prompts that the student sometimes solves, as far as its own rollouts have shown it.

    The weight of a prompt is ``BetaPosterior.weights`` times its ``repeats``. A draw of n takes n different prompts
    (all of them, then again, where there are fewer): those with the largest log(u) / weight, u uniform by a hash of
    seed, position and prompt (Efraimidis and Spirakis, 2006). Cost of a draw: a sort of all prompts.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, lazy: LazyConfig, known: PassRates | None) -> None:
        """``known``: pass counts to begin with; prompts that are not in it start at the prior."""
        super().__init__(prompts, seed, lazy.prior)
        self._power = lazy.power
        if known is not None:
            found = [(self._index[name], row) for row, name in enumerate(known.ids) if name in self._index]
            index, rows = np.array(found, dtype=np.int64).reshape(-1, 2).T
            self.posterior.update(index, known.passes[rows], known.graded[rows])

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts, by weight."""
        drawn: list[Prompt] = []
        while len(drawn) < count:
            wanted = min(count - len(drawn), len(self.prompts))
            drawn += [self.prompts[i] for i in self._draw(wanted)]
            self._position += wanted
        return drawn

    def _draw(self, count: int) -> list[int]:
        weights = self.posterior.weights(self._power) * self._repeats
        keys = random_keys(self._seed, self._position, np.arange(len(self.prompts)))
        uniform = (keys.astype(np.float64) + 0.5) / 2.0**64
        return np.argsort(np.log(uniform) / weights, kind="stable")[::-1][:count].tolist()


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A hash of all prompts, in order: the cursor of a stream means nothing without them."""
    found = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        found.update(f"{prompt.id}|{prompt.domain}|{prompt.repeats}|{prompt.token_ids}|{prompt.answer}\n".encode())
    return found.hexdigest()
