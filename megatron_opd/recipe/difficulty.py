"""Difficulty-aware balancing: how often each prompt appears, from how often the student solves it. Pure numpy.

Offline: the student answers every prompt N times, a prompt's difficulty is its number of passes c in 0 .. N, and bins
of the histogram over c are raised by repeating prompts; no prompt is ever deleted. Lazy: a Beta posterior for each
prompt learns from the training rollouts themselves, at no extra rollout.

Source: Uni-OPD (arXiv 2605.03677): N = 8; a U-shaped histogram is raised at 1 .. N-1, a mirrored J at 1 .. N. The
paper gives neither the rule that tells the shapes apart nor the height to raise to: both are this project's.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.balance import random_keys, rank_within

Shape = Literal["U", "J", "mirrored_J", "flat"]
Level = Literal["largest", "ends"]

HEAVY = 2.0  # an end is heavy from this many times the mean of the bins between the ends
DOMINANT = 4.0  # of two heavy ends, one that holds this many times the other hides it


def pass_histogram(passes: np.ndarray, samples: int) -> np.ndarray:
    """Number of prompts with c passes of ``samples`` (N), [N + 1] int64, for ``passes`` [n] integer in 0 .. N.

    Only prompts with N graded samples belong here: a prompt with an unknown outcome has no c. Raises DataError (a
    ValueError) for passes of another type or out of range.
    """
    if samples < 1:
        raise DataError("samples per prompt cannot be used", got=samples, expected=">= 1")
    if not _is_integer_vector(passes):
        raise DataError("passes cannot be used", got=_describe(passes), expected="an integer array of one dimension")
    if len(passes) and not 0 <= passes.min() <= passes.max() <= samples:
        raise DataError("passes out of range", got=f"{passes.min()} .. {passes.max()}", expected=f"0 .. {samples}")
    return np.bincount(passes, minlength=samples + 1)


def detect_shape(counts: np.ndarray) -> Shape:
    """Shape of a histogram over c = 0 .. N, [N + 1]; the scale of the counts does not matter.

        heavy(end)   counts[end] > 0 and counts[end] >= 2 * mean(counts[1 .. N-1])
        "U"          both ends heavy, neither at least 4 times the other
        "mirrored_J" the hard end c = 0 is heavy, and the easy end is not or is hidden by it
        "J"          the easy end c = N is heavy, and the hard end is not or is hidden by it
        "flat"       no end heavy; also no prompt at all, or N = 1, where there is no middle to raise

    A uniform distribution of pass rates fills all bins equally for every N, hence is flat. Reversing the counts
    exchanges "J" and "mirrored_J". It is a rule, not a significance test: below some 100 prompts it follows the noise.
    """
    if len(counts) < 3:
        return "flat"
    hard, easy, middle = float(counts[0]), float(counts[-1]), float(np.mean(counts[1:-1]))
    hard_heavy = hard > 0 and hard >= HEAVY * middle
    easy_heavy = easy > 0 and easy >= HEAVY * middle
    if hard_heavy and easy_heavy:
        if hard >= DOMINANT * easy:
            return "mirrored_J"
        return "J" if easy >= DOMINANT * hard else "U"
    if hard_heavy:
        return "mirrored_J"
    return "J" if easy_heavy else "flat"


def upsample_range(shape: Shape, samples: int) -> range:
    """Pass counts whose bins are raised, for N = ``samples``.

    U: 1 .. N-1 and mirrored J: 1 .. N, as the paper. J: 0 .. N-1, the mirror image, and flat: none, are this project's.
    """
    ranges = {
        "U": range(1, samples),
        "mirrored_J": range(1, samples + 1),
        "J": range(samples),
        "flat": range(0),
    }
    if shape not in ranges:
        raise ConfigError("no such histogram shape", got=shape, expected=" or ".join(ranges))
    return ranges[shape]


def target_histogram(counts: np.ndarray, raised: range, level: Level) -> np.ndarray:
    """Wanted number of appearances of each bin, [N + 1] int64, from the prompts ``counts`` [N + 1] of each bin.

        wanted[c] = max(counts[c], height) for c in ``raised``, else counts[c]
        height    = "largest": the largest bin in ``raised``
                    "ends": the mean of the end bins 0 and N that are not in ``raised``, halves rounded up

    An empty ``raised`` wants what is there. "ends" with both ends raised has no height, and raises ConfigError.
    """
    wanted = counts.astype(np.int64)
    if not len(raised):
        return wanted
    ends = [int(counts[c]) for c in (0, len(counts) - 1) if c not in raised]
    if level == "largest":
        height = int(counts[raised.start : raised.stop].max())
    elif level == "ends" and ends:
        height = (2 * sum(ends) + len(ends)) // (2 * len(ends))
    else:
        raise ConfigError(
            "the histogram cannot be raised to this level",
            got=f"{level} for the bins {raised.start} .. {raised.stop - 1}",
            expected="largest, or ends where an end is not raised",
        )
    wanted[raised.start : raised.stop] = np.maximum(wanted[raised.start : raised.stop], height)
    return wanted


def repeats(passes: np.ndarray, samples: int, target: np.ndarray, max_repeats: int, seed: int = 0) -> np.ndarray:
    """How often each prompt appears, [n] int64, 1 .. ``max_repeats``.

    passes [n]: c of each prompt; target [samples + 1] integer: wanted appearances of each bin (``target_histogram``, or
    any other). A bin of k >= 1 prompts gets exactly

        total = min(max(target, k), k * max_repeats)

    appearances: nothing is deleted where the target is lower, and an empty bin stays empty. Its prompts share them
    evenly: all have floor(total / k), and total mod k of them one more (largest remainder, where all remainders are
    equal), drawn by a hash of ``seed`` and the prompt's position. Raises ConfigError or DataError (ValueErrors).
    """
    if max_repeats < 1:
        raise ConfigError("max_repeats cannot be used", got=max_repeats, expected=">= 1")
    counts = pass_histogram(passes, samples)
    if not _is_integer_vector(target) or len(target) != samples + 1:
        raise DataError(
            "the target cannot be used", got=_describe(target), expected=f"an integer array [{samples + 1}]"
        )
    total = np.clip(target, counts, counts * max_repeats)
    share, extra = np.divmod(total, np.maximum(counts, 1))
    drawn = rank_within(passes, random_keys(seed, np.arange(len(passes))))
    return share[passes] + (drawn < extra[passes])


class BetaPosterior:
    """Pass rate of each prompt as Beta(alpha, beta), learned from graded rollouts; lives as long as a run.

    alpha, beta: [n] float64, > 0, the prior's value plus the passes and the failures seen. The student changes while
    it learns and old rollouts are never forgotten: the mean lags behind a fast learner.
    """

    def __init__(self, prompts: int, prior_alpha: float = 1.0, prior_beta: float = 1.0) -> None:
        """All ``prompts`` start at the prior; Beta(1, 1) is uniform. Raises ConfigError for a prior that is not > 0."""
        if not (0 < prior_alpha < math.inf and 0 < prior_beta < math.inf):
            raise ConfigError(
                "the prior cannot be used", got=(prior_alpha, prior_beta), expected="two finite numbers > 0"
            )
        self.alpha = np.full(prompts, float(prior_alpha))
        self.beta = np.full(prompts, float(prior_beta))

    def update(self, prompt_index: np.ndarray, passes: np.ndarray, graded: np.ndarray) -> None:
        """Adds ``passes`` of ``graded`` rollouts, all [k] integer, to the prompts at ``prompt_index``, repeats allowed.

        Rollouts of unknown outcome are in neither number. Raises DataError and changes nothing for an index out of
        range, a length that differs, or passes outside 0 .. graded.
        """
        for name, values in (("prompt_index", prompt_index), ("passes", passes), ("graded", graded)):
            if not _is_integer_vector(values) or len(values) != len(prompt_index):
                expected = f"an integer array [{len(prompt_index)}]"
                raise DataError(f"{name} cannot be used", got=_describe(values), expected=expected)
        if ((prompt_index < 0) | (prompt_index >= len(self.alpha))).any():
            raise DataError("no such prompt", got=prompt_index.tolist()[:5], expected=f"0 .. {len(self.alpha) - 1}")
        if ((passes < 0) | (passes > graded)).any():
            bad = int(np.flatnonzero((passes < 0) | (passes > graded))[0])
            raise DataError(
                "these are no pass counts", got=f"{passes[bad]} of {graded[bad]} in row {bad}", expected="0 .. graded"
            )
        np.add.at(self.alpha, prompt_index, passes)
        np.add.at(self.beta, prompt_index, graded.astype(np.int64) - passes)

    def mean(self) -> np.ndarray:
        """Expected pass rate alpha / (alpha + beta), [n]."""
        return self.alpha / (self.alpha + self.beta)

    def weights(self, power: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
        """Expected weight of each prompt, [n] > 0, with power = (a, b), both finite and >= 0:

            E[p^a (1 - p)^b] = B(alpha + a, beta + b) / B(alpha, beta)        B: the Beta function

        It is never 0, so that a prompt the student has always solved, or never, is still drawn now and then. Weights
        are relative: divide by their sum to draw prompts. Source: PACED (arXiv 2603.11178), which weighs by
        p^a (1 - p)^b, a = b = 1 in its later versions; the expectation under the posterior is this project's.
        """
        a, b = power
        if not (0 <= a < math.inf and 0 <= b < math.inf):
            raise ConfigError("the powers of the weight cannot be used", got=power, expected="two finite numbers >= 0")
        return np.exp(_log_beta(self.alpha + a, self.beta + b) - _log_beta(self.alpha, self.beta))

    def state_dict(self) -> dict[str, np.ndarray]:
        """All there is to save, as copies."""
        return {"alpha": self.alpha.copy(), "beta": self.beta.copy()}

    def load_state_dict(self, state: dict[str, np.ndarray]) -> None:
        """Continues from ``state_dict``. Raises DataError and changes nothing when it does not fit these prompts."""
        if set(state) != {"alpha", "beta"}:
            raise DataError("the saved pass rates cannot be used", got=sorted(state), expected="alpha and beta")
        for name, values in state.items():
            if values.shape != self.alpha.shape or not (np.isfinite(values) & (values > 0)).all():
                expected = f"{len(self.alpha)} finite numbers > 0"
                raise DataError(
                    f"the saved pass rates cannot be used: {name}", got=_describe(values), expected=expected
                )
        self.alpha = state["alpha"].astype(np.float64)
        self.beta = state["beta"].astype(np.float64)


def _log_beta(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    log_gamma = np.frompyfunc(math.lgamma, 1, 1)
    return (log_gamma(alpha) + log_gamma(beta) - log_gamma(alpha + beta)).astype(np.float64)


def _is_integer_vector(values: object) -> bool:
    return isinstance(values, np.ndarray) and values.ndim == 1 and values.dtype.kind in "iu"


def _describe(values: object) -> str:
    return f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
