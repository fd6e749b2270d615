"""From pass rates to the number of appearances of each prompt, domain by domain. The rules are in recipe.difficulty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.config import DifficultyConfig
from megatron_opd.data.pass_rates import PassRates
from megatron_opd.recipe.difficulty import (
    Shape,
    detect_shape,
    pass_histogram,
    repeats,
    target_histogram,
    upsample_range,
)


@dataclass(frozen=True, eq=False)
class DomainWeights:
    """The histogram of one domain over c = 0 .. N passes, before and after."""

    domain: str
    counts: np.ndarray  # [N + 1] int64, prompts
    shape: Shape  # of counts
    raised: range  # bins that are raised
    target: np.ndarray  # [N + 1] int64, wanted appearances
    appearances: np.ndarray  # [N + 1] int64, of an epoch; the cap on repeats may keep it below the target
    left_alone: int  # prompts with an unknown outcome: in no bin, and once in an epoch
    passes: int  # of all graded samples
    graded: int

    @property
    def prompts(self) -> int:
        return int(self.counts.sum()) + self.left_alone

    @property
    def epoch(self) -> int:
        """Appearances in an epoch, of all prompts of the domain."""
        return int(self.appearances.sum()) + self.left_alone


def weigh(rates: PassRates, options: DifficultyConfig, seed: int) -> tuple[np.ndarray, list[DomainWeights]]:
    """How often each prompt appears, [n] int64 >= 1, and why, a row for each domain by name.

    Prompts whose samples are not all graded have no c: they appear once. Nothing is deleted.
    """
    domains, samples = np.array(rates.domains), options.samples
    full = rates.graded == rates.samples
    times, rows = np.ones(len(rates.ids), dtype=np.int64), []
    for domain in sorted(set(rates.domains)):
        here = domains == domain
        passes = rates.passes[here & full]
        counts = pass_histogram(passes, samples)
        shape = detect_shape(counts)
        raised = upsample_range(shape, samples)
        target = target_histogram(counts, raised, options.level)
        times[here & full] = repeats(passes, samples, target, options.max_repeats, seed)
        rows.append(
            DomainWeights(
                domain=domain,
                counts=counts,
                shape=shape,
                raised=raised,
                target=target,
                appearances=np.bincount(passes, weights=times[here & full], minlength=samples + 1).astype(np.int64),
                left_alone=int((here & ~full).sum()),
                passes=int(rates.passes[here].sum()),
                graded=int(rates.graded[here].sum()),
            )
        )
    return times, rows


def name_of(shape: Shape) -> str:
    """The shape as a person says it."""
    return {"U": "U-shaped", "J": "J-shaped", "mirrored_J": "mirrored J", "flat": "flat"}[shape]


def raised_bins(raised: range) -> str:
    """The raised bins as a person says it."""
    return f"c = {raised.start} .. {raised.stop - 1} raised" if len(raised) else "nothing raised"
