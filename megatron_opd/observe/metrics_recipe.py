"""Texts of the metrics that tell what the recipe does: meaning, unit, reading, action."""

from __future__ import annotations

TEXTS: dict[str, tuple[str, str, str, str]] = {
    "opd/gap": (
        "Mean token gap, teacher minus student log-prob: minus an estimate of the reverse KL",
        "nats per token",
        "negative, should rise towards 0",
        "falling: the student leaves the teacher; lower optimizer.lr, a smaller calibration.delta",
    ),
    "opd/abs_gap": (
        "Mean over tokens of its absolute value",
        "nats per token",
        "falls while the student approaches its teachers",
        "rising while opd/gap is flat: rare tokens with large gaps; see the heat-maps",
    ),
    "opd/masked": (
        "Share of scored tokens that are masked because their gap is loss.max_gap or more",
        "share",
        "below 1 %",
        "higher: teacher and student read the text differently; check tokenizer and chat template",
    ),
    "opd/topk_overlap": (
        "Mean share of common tokens in the top-k rows of student and teacher",
        "share",
        "rises while the student approaches its teachers; only with scoring.top_k",
        "low and flat: the teacher is too far from the student",
    ),
    "opd/advantage": (
        "Mean over trained tokens of the advantage: gap plus what outcomes add",
        "nats per token",
        "near opd/gap plus the mean offset",
        "far above 0 for long: outcomes outweigh the teacher; a smaller calibration.delta",
    ),
    "opd/abs_advantage": (
        "Mean over trained tokens of its absolute value",
        "nats per token",
        "the size of the training signal",
        "shrinking to 0: nothing is left to learn from these teachers",
    ),
    "opd/clipped": (
        "Share of trained tokens whose ratio is outside the clip range and whose gradient is cut",
        "share",
        "0 with one optimizer step for each batch of the newest weights",
        "above 1 %: engine and trainer differ (opd/engine_trainer_difference), or rollouts are too old",
    ),
    "opd/forward_kl": (
        "Mean forward KL term on the teacher's top-k tokens",
        "nats per token",
        "falls; only with objective.forward_kl",
        "rising: lower optimizer.lr",
    ),
    "opd/engine_trainer_difference": (
        "Mean absolute difference between the log-probs of trainer and rollout engine on the trained tokens",
        "nats",
        "rounding only: about 1e-7 in float32, more in bfloat16",
        "larger: the two do not compute the same policy; compare dtypes, look at refresh/probe_difference",
    ),
    "opd/stale_tokens": (
        "Share of the trained tokens that older weights drew",
        "share",
        "0 while strictly on-policy",
        "see rollout/staleness",
    ),
    "opd/importance_weight": (
        "Mean importance weight of the tokens that older weights drew, cut at loss.importance_cap",
        "1",
        "near 1; far from it the policy moves a lot within rollout.max_staleness steps",
        "below 0.8: lower optimizer.lr or rollout.max_staleness",
    ),
    "opd/importance_truncated": (
        "Share of those tokens whose weight was cut",
        "share",
        "a few percent at most",
        "more: lower optimizer.lr or rollout.max_staleness before raising loss.importance_cap",
    ),
    "balance/kept": (
        "Share of rollouts that balancing kept",
        "share",
        "1 without balancing",
        "low: prompts are too easy or too hard; megatron-opd difficulty, data.lazy, balance.refill_rounds",
    ),
    "balance/trained_rollouts": (
        "Rollouts in the batch",
        "rollouts",
        "prompts times samples, less what balancing, filters and drops took",
        "small: balance.refill_rounds, more rollout.prompts_per_step",
    ),
    "balance/refilled_prompts": (
        "Prompts that were drawn to make up for what balancing dropped",
        "prompts",
        "0 without balance.refill_rounds",
        "many: choose prompts by difficulty instead, which costs no rollouts",
    ),
    "order/auc": (
        "Chance that a correct rollout's return is above an incorrect one's of its group",
        "ratio",
        "0.5: the teacher's preference knows nothing of right and wrong; 1: it always does",
        "below 0.5: check verifier and teacher of the domain",
    ),
    "order/consistency": (
        "Share of mixed groups with every correct return at least every incorrect one",
        "share",
        "falls as groups grow; compare runs of equal group size only",
        "low with a high AUC: single outliers; low with a low AUC: see order/auc",
    ),
    "order/mean_gap": (
        "Mean over mixed groups of mean correct minus mean incorrect return",
        "nats per token",
        "positive; the margin that calibration.delta is compared with",
        "negative: the teacher prefers wrong answers; calibration is there for that",
    ),
    "order/mixed": (
        "Share of groups with both outcomes among the scored rollouts",
        "share",
        "only these can be calibrated",
        "low: prompts too easy or too hard, or too few rollout.samples_per_prompt",
    ),
    "calibration/shifted": (
        "Share of graded rollouts that got an offset",
        "share",
        "falls where the teacher orders well",
        "near 1: delta is far above the teacher's own margins",
    ),
    "calibration/mean_shift": (
        "Mean absolute offset of the graded rollouts",
        "nats per token",
        "small beside opd/abs_gap",
        "larger than opd/abs_gap: training follows outcomes, not the teacher; a smaller delta or max_shift",
    ),
    "calibration/trained": (
        "Share of scored rollouts that are trained on",
        "share",
        "1 without a margin mask or sign filter",
        "low: the filter takes too much",
    ),
    "calibration/margin_before": (
        "Mean margin of mixed groups before the shift",
        "nats per token",
        "the teacher's own opinion",
        "falling for long: see order/auc",
    ),
    "calibration/margin_after": (
        "Mean margin of mixed groups after the shift",
        "nats per token",
        "at least about calibration.delta, by construction",
        "lower: max_shift limits it, or groups were skipped",
    ),
    "calibration/changed_groups": (
        "Share of mixed groups that calibration changed",
        "share",
        "falls where the teacher orders well",
        "always 1: a smaller delta, so that only wrong orders are corrected",
    ),
}
