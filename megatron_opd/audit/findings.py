"""What the numbers say, in words: one sentence with its number for each rule that applies.

Thresholds are conventions. Only where a rate is compared, with chance or over time, two standard errors decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_opd.audit.diagnose import Diagnosis, Violation
from megatron_opd.audit.formats import nats, percent, ratio, size
from megatron_opd.audit.numbers import Numbers
from megatron_opd.audit.read import Rollouts
from megatron_opd.config import CalibrationConfig, Config

Level = Literal["act", "look", "note", "fine"]
_LEVELS: tuple[Level, ...] = ("act", "look", "note", "fine")


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence. act: something is wrong; look: worth a look; note: good to know; fine: as it should be."""

    level: Level
    domain: str | None  # None: of the whole run
    text: str


def findings(diagnosis: Diagnosis, rollouts: Rollouts, config: Config) -> list[Finding]:
    """All findings, the most pressing first."""
    found = [Finding(level, None, text) for level, text in _settings(config)]
    for domain, numbers in diagnosis.by_domain.items():
        own = [item for item in diagnosis.violations if rollouts.domain[item.wrong] == domain]
        sentences = [
            *_order(numbers),
            *_calibration(numbers, config.calibration),
            *_groups(numbers),
            *_losses(numbers),
            *_responses(numbers),
            *_loops(own, rollouts),
            *_depth(numbers),
            *_trend(diagnosis.early.get(domain), diagnosis.late.get(domain)),
        ]
        found += [Finding(level, domain, text) for level, text in sentences]
    return sorted(found, key=lambda item: _LEVELS.index(item.level))


Sentences = Iterator[tuple[Level, str]]


def _settings(config: Config) -> Sentences:
    if config.calibration is None:
        yield "note", "There is no calibration: the teacher's advantage is trained on as it is."
    elif config.calibration.method == "none":
        yield "note", "Calibration only reports (calibration.method is none): nothing was shifted or masked."
    if config.objective.placebo:
        yield "note", "Calibration saw permuted outcomes (objective.placebo): a control, not a recipe."


def _order(numbers: Numbers) -> Sentences:
    order, error = numbers.order, numbers.auc_error
    if order.auc is None:
        yield (
            "look",
            "n/a: no group has both a right and a wrong scored rollout, so the teacher's order cannot be told, and "
            "calibration has nothing to compare.",
        )
        return
    begin = (
        f"The teacher's return orders right above wrong in {percent(order.auc)} of pairs "
        f"(standard error {'n/a' if error is None else f'{100 * error:.1f} points'})"
    )
    end = (
        f" Every right rollout is above every wrong one in {percent(order.consistency)} of mixed groups; "
        f"a random order would reach {percent(numbers.chance_consistency)}."
    )
    if error is None:
        yield "note", f"{begin}: too few mixed groups to tell it from chance.{end}"
    elif order.auc < 0.5 - 2 * error:
        yield (
            "act",
            f"{begin}: below chance, the teacher prefers wrong answers. Check the verifier and the teacher.{end}",
        )
    elif order.auc <= 0.5 + 2 * error:
        yield "look", f"{begin}: not distinguishable from chance.{end}"
    elif order.auc < 0.6:
        yield "look", f"{begin}: close to chance.{end}"
    elif order.auc < 0.75:
        yield "note", f"{begin}: a weak order.{end}"
    else:
        yield "fine", f"{begin}: a clear order.{end}"


def _calibration(numbers: Numbers, options: CalibrationConfig | None) -> Sentences:
    if options is None or options.method == "none" or numbers.order.auc is None:
        return
    if options.method != "shift":
        removed = percent(numbers.filtered_share)
        yield "note", f"The margin mask (and the sign filter, if on) kept {removed} of scored rollouts from training."
        return
    before, after, deviation = numbers.order.mean_gap, numbers.mean_gap_after, numbers.deviation
    text = (
        f"Calibration moved {percent(numbers.changed_groups)} of mixed groups and their mean margin from "
        f"{nats(before)} to {nats(after)} nats per token; returns deviate by {size(deviation)} within a group"
    )
    moved = after - before
    if deviation and moved > 3 * deviation:
        yield (
            "look",
            f"{text}. That is {moved / deviation:.1f} deviations: the shift hardly depends on the teacher any more and "
            "acts like a constant outcome reward (docs/calibration.md, P7). Try a smaller calibration.delta, or "
            "calibration.delta_unit=sigma.",
        )
    else:
        yield "note", f"{text}."
    if options.max_shift is None and numbers.max_offset > 2:
        largest = size(numbers.max_offset)
        yield "look", f"The largest offset is {largest} nats per token: an outlier. Set calibration.max_shift."


def _groups(numbers: Numbers) -> Sentences:
    mixed = numbers.order.mixed_share
    if mixed is not None and mixed < 0.3:
        yield (
            "look",
            f"Only {percent(mixed)} of groups are mixed; in the others there is nothing to calibrate. Prompts "
            "are too easy or too hard: see the difficulty below, `megatron-opd difficulty` and data.lazy.",
        )
    if numbers.kept_share < 0.5:
        yield (
            "look",
            f"Balancing kept {percent(numbers.kept_share)} of rollouts: over half of the sampling is lost. Widen "
            "balance.tolerance, or draw prompts of middle difficulty.",
        )


def _losses(numbers: Numbers) -> Sentences:
    if numbers.dropped:
        level = "act" if numbers.dropped_share > 0.05 else "look"
        yield (
            level,
            f"{numbers.dropped:,} rollouts ({percent(numbers.dropped_share)}) were lost to failed teacher calls.",
        )
    if numbers.unknown:
        level = "look" if numbers.unknown_share > 0.05 else "note"
        yield level, f"{numbers.unknown:,} rollouts ({percent(numbers.unknown_share)}) could not be graded."
    if numbers.masked_share is not None and numbers.masked_share > 0.01:
        yield (
            "look",
            f"{percent(numbers.masked_share)} of tokens are masked because the log-probs of teacher and student are "
            "too far apart (loss.max_gap): the models may see different text.",
        )


def _responses(numbers: Numbers) -> Sentences:
    if numbers.truncated_share > 0.1:
        yield (
            "look",
            f"{percent(numbers.truncated_share)} of responses were cut at the token limit: they are rarely right "
            "and cost most. Raise rollout.max_new_tokens, or look for loops.",
        )
    if numbers.repetition > 0.2:
        yield "look", f"{percent(numbers.repetition)} of 4-grams repeat an earlier one of the same response: loops."


def _loops(own: Sequence[Violation], rollouts: Rollouts) -> Sentences:
    looping = sum(1 for item in own if rollouts.truncated[item.wrong] or rollouts.repetition[item.wrong] > 0.5)
    if own and 3 * looping >= len(own):
        yield (
            "look",
            f"In {looping} of the {len(own)} worst order violations shown the wrong rollout was cut at the limit "
            "or repeats itself: the teacher finds the next turn of a loop likely, so its return is near 0.",
        )


def _depth(numbers: Numbers) -> Sentences:
    first, last = numbers.depth[0], numbers.depth[-1]
    if first is not None and last is not None and abs(last) > 2 * abs(first):
        yield (
            "note",
            f"The gap grows along the response, from {nats(first)} in its first to {nats(last)} nats per token in its "
            "last quarter: the teacher disagrees more with what the student wrote the longer it gets.",
        )


def _trend(early: Numbers | None, late: Numbers | None) -> Sentences:
    if early is None or late is None:
        return
    if early.correct_error is not None and late.correct_error is not None:
        change, error = late.correct_ratio - early.correct_ratio, math.hypot(early.correct_error, late.correct_error)
        level, verb = ("note", "moved within its error") if abs(change) <= 2 * error else _rise_or_fall(change)
        yield (
            level,
            f"The correct ratio {verb}: {percent(early.correct_ratio)} in the first third of the steps, "
            f"{percent(late.correct_ratio)} in the last (standard error of the difference {100 * error:.1f} points).",
        )
    if early.entropy is not None and late.entropy is not None and late.entropy < 0.5 * early.entropy:
        yield "look", f"The entropy fell to less than half, from {size(early.entropy)} to {size(late.entropy)} nats."
    if late.length > 1.5 * early.length or late.length < early.length / 1.5:
        yield "look", f"The mean length went from {size(early.length)} to {size(late.length)} tokens."
    if early.auc_error is not None and late.auc_error is not None:
        change = late.order.auc - early.order.auc
        if abs(change) > 2 * math.hypot(early.auc_error, late.auc_error):
            yield (
                "note" if change > 0 else "look",
                f"Pairwise AUC, which is taken before the shift, went from {ratio(early.order.auc)} in the first "
                f"third to {ratio(late.order.auc)} in the last.",
            )


def _rise_or_fall(change: float) -> tuple[Level, str]:
    return ("fine", "rose") if change > 0 else ("look", "fell")
