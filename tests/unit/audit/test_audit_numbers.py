"""The numbers of the audit against slow formulas over the records that the files were written from."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from audit_case import Drawn
from trajectories import DROP_REASON, SAMPLES, run_config, write_run

from megatron_opd.audit.diagnose import diagnose, violations
from megatron_opd.audit.numbers import numbers
from megatron_opd.audit.read import read_rollouts, trajectory_files
from megatron_opd.recipe.diagnostics import step_diagnostics
from megatron_opd.records import Calibrated, Outcome, Verified

Groups = dict[int, tuple[list[float], list[float]]]


def calibrated(drawn: Drawn, domain: str) -> list[Calibrated]:
    items = [item for step in drawn.steps for item in step.calibrated]
    return [item for item in items if item.scored.teacher == domain]


def sampled(drawn: Drawn, domain: str) -> list[Verified]:
    return [item for step in drawn.steps for item in step.verified if item.rollout.prompt.domain == domain]


def returns_by_group(items: list[Calibrated], *, after: bool = False) -> Groups:
    """Returns of the wrong and of the right rollouts of each group."""
    groups: Groups = defaultdict(lambda: ([], []))
    for item in items:
        outcome = item.scored.verified.outcome
        if outcome != Outcome.UNKNOWN and math.isfinite(item.mean_gap):
            value = item.mean_gap + (item.offset if after else 0.0)
            groups[item.scored.verified.rollout.group][outcome].append(value)
    return groups


def mixed(groups: Groups) -> list[tuple[list[float], list[float]]]:
    return [(wrong, right) for wrong, right in groups.values() if wrong and right]


@pytest.mark.parametrize("domain", ["math", "code"])
def test_the_order_is_that_of_all_pairs_one_by_one(drawn: Drawn, domain: str) -> None:
    found, groups = drawn.diagnosis.by_domain[domain], returns_by_group(calibrated(drawn, domain))
    pairs = [(b > a) + (b == a) / 2 for wrong, right in mixed(groups) for a in wrong for b in right]
    assert len(mixed(groups)) > 20 and len(mixed(groups)) < len(groups)  # the data tests something
    assert found.order.auc == pytest.approx(sum(pairs) / len(pairs))
    assert found.order.consistency == pytest.approx(np.mean([min(b) >= max(a) for a, b in mixed(groups)]))
    assert found.order.mean_gap == pytest.approx(np.mean([np.mean(b) - np.mean(a) for a, b in mixed(groups)]))
    assert found.order.mixed_share == pytest.approx(len(mixed(groups)) / len(groups))
    assert found.deviation == pytest.approx(np.mean([np.std(a + b) for a, b in mixed(groups)]))
    after = mixed(returns_by_group(calibrated(drawn, domain), after=True))
    assert found.mean_gap_after == pytest.approx(np.mean([np.mean(b) - np.mean(a) for a, b in after]))


@pytest.mark.parametrize("domain", ["math", "code"])
def test_chance_is_the_share_of_orders_in_which_all_right_ones_come_last(drawn: Drawn, domain: str) -> None:
    def share(wrong: list[float], right: list[float]) -> float:
        places = range(len(wrong) + len(right))
        draws = list(itertools.combinations(places, len(right)))
        return sum(min(draw) == len(wrong) for draw in draws) / len(draws)

    groups = mixed(returns_by_group(calibrated(drawn, domain)))
    expected = np.mean([share(wrong, right) for wrong, right in groups])
    assert drawn.diagnosis.by_domain[domain].chance_consistency == pytest.approx(expected)


def bootstrap(parts: list[float], wholes: list[float]) -> float:
    """Deviation of sum of parts / sum of wholes when whole groups are drawn again."""
    draws = np.random.default_rng(0).integers(0, len(parts), (4000, len(parts)))
    return (np.array(parts)[draws].sum(axis=1) / np.array(wholes)[draws].sum(axis=1)).std()


def test_the_error_of_the_auc_is_about_that_of_drawing_groups_again(drawn: Drawn) -> None:
    groups = mixed(returns_by_group(calibrated(drawn, "math")))
    wins = [sum((b > a) + (b == a) / 2 for a in wrong for b in right) for wrong, right in groups]
    expected = bootstrap(wins, [len(wrong) * len(right) for wrong, right in groups])
    assert drawn.diagnosis.by_domain["math"].auc_error == pytest.approx(expected, rel=0.1)


def test_the_error_of_the_correct_ratio_is_about_that_of_drawing_groups_again(drawn: Drawn) -> None:
    groups: dict[int, list[int]] = defaultdict(list)
    for item in sampled(drawn, "math"):
        groups[item.rollout.group] += [item.outcome] if item.outcome != Outcome.UNKNOWN else []
    expected = bootstrap([sum(group) for group in groups.values()], [len(group) for group in groups.values()])
    found = drawn.diagnosis.by_domain["math"]
    assert found.correct_error == pytest.approx(expected, rel=0.1)
    naive = math.sqrt(found.correct_ratio * (1 - found.correct_ratio) / (found.correct + found.incorrect))
    assert found.correct_error > 1.5 * naive  # rollouts of a group resemble each other


@pytest.mark.parametrize("domain", ["math", "code"])
def test_shares_and_means_are_those_of_a_loop(drawn: Drawn, domain: str) -> None:
    found, scored, all_of = drawn.diagnosis.by_domain[domain], calibrated(drawn, domain), sampled(drawn, domain)
    outcomes = [item.outcome for item in all_of]
    known = [outcome for outcome in outcomes if outcome != Outcome.UNKNOWN]
    offsets = [
        abs(item.offset)
        for item in scored
        if item.scored.verified.outcome != Outcome.UNKNOWN and math.isfinite(item.mean_gap)
    ]
    lengths = [len(item.rollout.token_ids) for item in all_of]
    assert (found.rollouts, found.unknown) == (len(all_of), len(all_of) - len(known))
    assert found.unknown > 0 and found.dropped > 0 and found.balanced_out > 0
    assert found.trained + found.filtered + found.balanced_out + found.dropped == found.rollouts
    assert found.trained == sum(item.trained for item in scored)
    assert found.correct_ratio == pytest.approx(np.mean([outcome == Outcome.CORRECT for outcome in known]))
    assert found.shifted == pytest.approx(np.mean([offset > 0 for offset in offsets]))
    assert found.mean_offset == pytest.approx(np.mean(offsets)) and found.max_offset == max(offsets)
    assert found.length == pytest.approx(np.mean(lengths))
    assert found.entropy == pytest.approx(-sum(float(item.rollout.logprobs.sum()) for item in all_of) / sum(lengths))
    masks = np.concatenate([item.mask for item in scored])
    assert 0 < found.masked_share == pytest.approx(1 - masks.mean())
    assert found.truncated_share == np.mean([item.rollout.finish_reason == "length" for item in all_of])
    assert found.topk_overlap is None  # no top-k rows were fetched: nothing can be said


@pytest.mark.parametrize("domain", ["math", "code"])
def test_changed_groups_are_those_with_an_offset(drawn: Drawn, domain: str) -> None:
    moved: dict[int, bool] = defaultdict(bool)
    for item in calibrated(drawn, domain):
        moved[item.scored.verified.rollout.group] |= item.offset != 0
    groups = returns_by_group(calibrated(drawn, domain))
    expected = [moved[group] for group, (wrong, right) in groups.items() if wrong and right]
    assert drawn.diagnosis.by_domain[domain].changed_groups == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("outcome", [None, Outcome.CORRECT, Outcome.INCORRECT])
def test_the_depth_profile_is_that_of_a_loop_over_tokens(drawn: Drawn, outcome: Outcome | None) -> None:
    quarters: list[list[float]] = [[], [], [], []]
    for item in calibrated(drawn, "code"):
        if outcome is None or item.scored.verified.outcome == outcome:
            for place, (gap, kept) in enumerate(zip(item.gaps, item.mask, strict=True)):
                if kept:
                    quarters[4 * place // len(item.gaps)].append(float(gap))
    found = drawn.diagnosis.by_domain["code"]
    depth = {None: found.depth, 1: found.depth_correct, 0: found.depth_incorrect}[outcome]
    assert depth == pytest.approx([np.mean(quarter) for quarter in quarters])


def test_a_step_has_the_numbers_that_training_logged(drawn: Drawn) -> None:
    names = {
        "reward/correct": "correct_ratio",
        "reward/unknown": "unknown_share",
        "balance/kept": "kept_share",
        "rollout/length": "length",
        "rollout/truncated": "truncated_share",
        "rollout/repetition": "repetition",
        "rollout/entropy": "entropy",
        "opd/gap": "gap",
        "opd/masked": "masked_share",
        "calibration/shifted": "shifted",
        "calibration/mean_shift": "mean_offset",
    }
    orders = {"order/auc": "auc", "order/consistency": "consistency", "order/mean_gap": "mean_gap"}
    for number, step in enumerate(drawn.steps, 1):
        logged = step_diagnostics(step.calibrated, step.unscored, [item for item, _ in step.dropped])
        for domain in ("math", "code"):
            found = drawn.diagnosis.by_step_and_domain[number][domain]
            for metric, name in names.items():
                assert getattr(found, name) == pytest.approx(logged[f"{metric}/{domain}"], rel=1e-5), (number, metric)
            for metric, name in orders.items():
                assert getattr(found.order, name) == pytest.approx(logged.get(f"{metric}/{domain}")), (number, metric)


def test_whole_and_parts_agree(drawn: Drawn) -> None:
    found = drawn.diagnosis
    assert found.steps == list(range(1, drawn.config.steps + 1))
    for parts in (found.by_domain, found.by_step):
        assert sum(part.rollouts for part in parts.values()) == found.overall.rollouts
        assert sum(part.order.pairs for part in parts.values()) == found.overall.order.pairs
    assert {name: part.order for name, part in found.by_teacher.items()}.keys() == found.by_domain.keys()
    assert found.by_teacher["math"].order.auc == found.by_domain["math"].order.auc
    assert found.early["math"].rollouts == sum(found.by_step_and_domain[step]["math"].rollouts for step in (1, 2, 3))
    assert found.late["math"].rollouts == sum(found.by_step_and_domain[step]["math"].rollouts for step in (7, 8, 9))


def test_without_a_mixed_group_nothing_is_said_about_the_order(drawn: Drawn) -> None:
    right = numbers(drawn.rollouts.take(drawn.rollouts.outcome == Outcome.CORRECT))
    assert right.order.auc is right.order.consistency is right.order.mean_gap is right.auc_error is None
    assert right.chance_consistency is right.deviation is right.changed_groups is right.mean_gap_after is None
    assert right.return_incorrect is None and right.depth_incorrect == [None] * 4
    assert right.correct_ratio == 1.0 and right.order.mixed_share == 0.0
    unknown = numbers(drawn.rollouts.take(drawn.rollouts.outcome == Outcome.UNKNOWN))
    assert unknown.correct_ratio is None and unknown.shifted is None and unknown.max_offset is None


def test_nothing_at_all_gives_no_number(drawn: Drawn) -> None:
    empty = numbers(drawn.rollouts.take(np.zeros(len(drawn.rollouts), dtype=bool)))
    assert empty.rollouts == 0 and empty.kept_share is None and empty.entropy is None and empty.order.auc is None


def test_violations_are_the_largest_of_all_groups(drawn: Drawn) -> None:
    sizes = []
    for domain in ("math", "code"):
        groups = mixed(returns_by_group(calibrated(drawn, domain)))
        sizes += [max(wrong) - min(right) for wrong, right in groups]
    expected = sorted((size for size in sizes if size > 0), reverse=True)
    rollouts = drawn.rollouts
    found = violations(rollouts, 10_000)
    assert [item.size for item in found] == pytest.approx(expected) and len(expected) > 12
    assert drawn.diagnosis.violations == found[:12]
    for item in found:
        assert rollouts.mean_gap[item.wrong] - rollouts.mean_gap[item.right] == pytest.approx(item.size)
        assert rollouts.group[item.wrong] == rollouts.group[item.right]
        assert (rollouts.outcome[item.wrong], rollouts.outcome[item.right]) == (0, 1)


def test_difficulty_counts_groups_that_are_graded_as_a_whole(drawn: Drawn) -> None:
    passes: dict[int, list[int]] = defaultdict(list)
    early = set()
    for number, step in enumerate(drawn.steps):
        for item in step.verified:
            if item.rollout.prompt.domain == "math":
                passes[item.rollout.group].append(item.outcome)
                early |= {item.rollout.group} if number < 3 else set()
    whole = {group: sum(outcomes) for group, outcomes in passes.items() if Outcome.UNKNOWN not in outcomes}
    found = drawn.diagnosis.difficulty["math"]
    assert found.left_out == len(passes) - len(whole) > 0
    counts = [sum(whole[group] == c for group in whole if group in early) for c in range(SAMPLES + 1)]
    assert found.early == counts and sum(found.late) > 0


def test_reasons_are_counted(drawn: Drawn) -> None:
    found = drawn.diagnosis
    assert found.drop_reasons["math"] == {DROP_REASON: found.by_domain["math"].dropped}
    assert set(found.unknown_reasons["code"]) == {"the verifier took longer than 5 s"}


def test_masks_sign_filter_and_scored_but_unbalanced_rollouts_are_told_apart(tmp_path: Path) -> None:
    config = run_config(
        tmp_path,
        steps=1,
        balance={"order": "after_scoring"},
        calibration={"method": "mask", "delta": 0.2},
        objective={"sign_filter": True},
    )
    (step,) = write_run(config)
    rollouts = read_rollouts(trajectory_files(config.run_dir / "trajectories"))
    found = diagnose(rollouts, SAMPLES, worst=3)
    balanced = [item for item in step.calibrated if item.balanced]
    filtered = [item for item in balanced if not item.trained]
    assert found.overall.filtered == len(filtered) > 0
    assert found.overall.filtered_share == pytest.approx(len(filtered) / len(balanced))
    assert found.overall.balanced_out == len(step.calibrated) - len(balanced) > 0
    assert found.overall.order.used > len(balanced) * 0.9  # what balancing drops after scoring counts in margins
    assert found.late == {} and set(found.early) == {"math", "code"}  # one step has no last third
    assert found.difficulty["math"].late == [0] * (SAMPLES + 1)
