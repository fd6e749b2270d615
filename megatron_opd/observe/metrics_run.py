"""Texts of the metrics that tell how a run goes, whatever the recipe: meaning, unit, reading, action."""

from __future__ import annotations

TEXTS: dict[str, tuple[str, str, str, str]] = {
    "loss/policy": (
        "Policy loss of the step, over the global denominator",
        "nats per token",
        "has no trend of its own: its gradient matters, its value is near minus the mean advantage",
        "a jump: look at loss/grad_norm and opd/clipped of the same step",
    ),
    "loss/grad_norm": (
        "Norm of the gradient over all ranks, before clipping",
        "norm",
        "steady within a factor of a few; above optimizer.clip_grad the step is shortened",
        "growing from step to step: lower optimizer.lr; single peaks: look at the rollouts of that step",
    ),
    "loss/learning_rate": (
        "Learning rate of the step",
        "1",
        "follows optimizer.schedule",
        "not what you meant: optimizer.lr, warm-up and schedule",
    ),
    "loss/tokens": (
        "Tokens with a weight in the loss",
        "tokens",
        "what is left of rollout/tokens after balancing, masks and filters",
        "a small part of rollout/tokens: see balance/kept, opd/masked and calibration/trained for which of them it is",
    ),
    "reward/correct": (
        "Share of correct ones among the graded rollouts",
        "share",
        "should rise; noisy, since every step draws other prompts",
        "falling: lower optimizer.lr, compare with calibration=null, read the trajectories",
    ),
    "reward/unknown": (
        "Share of rollouts that could not be graded",
        "share",
        "near 0; these are neither right nor wrong",
        "above 5 %: read the reasons in the audit, raise verifiers.timeout_s or verifiers.workers",
    ),
    "rollout/length": (
        "Mean length of a response",
        "tokens",
        "may drift towards the teachers' length",
        "towards rollout.max_new_tokens: look for loops (rollout/repetition) or raise the limit",
    ),
    "rollout/tokens": (
        "Tokens that the student sampled in the step",
        "tokens",
        "the cost of a step's rollouts",
        "sets rollout.prompts_per_step and samples_per_prompt against the time you have",
    ),
    "rollout/truncated": (
        "Share of responses cut at the token limit",
        "share",
        "near 0",
        "above 10 %: raise rollout.max_new_tokens, or look for loops",
    ),
    "rollout/repetition": (
        "Mean share of 4-grams that occurred before in the same response",
        "share",
        "text has some; a loop tends to 1",
        "above 20 %: the student loops; read the trajectories, lower optimizer.lr",
    ),
    "rollout/entropy": (
        "Mean of minus the log-prob of a sampled token: an unbiased estimate of the policy's entropy",
        "nats per token",
        "falls slowly while the student gets surer",
        "down by half and more: the policy narrows; fewer steps, a smaller calibration.delta",
    ),
    "teacher/dropped": (
        "Rollouts lost because a teacher did not score them",
        "rollouts",
        "0; a dropped rollout is neither trained on nor counted",
        "above 0: read the reasons (events, report), then the teacher's log",
    ),
    "teacher/tokens": (
        "Response tokens that teachers scored in the step",
        "tokens",
        "less than rollout/tokens where balancing comes before scoring",
        "teachers are the bottleneck (time/score_s): more replicas, or balancing before scoring",
    ),
    "refresh/seconds": (
        "Time in which the new weights reached the rollout engine",
        "s",
        "constant; proportional to the model's size",
        "large beside time/step_s: a larger refresh.bucket_mb, a faster link between trainer and engine",
    ),
    "refresh/probe_difference": (
        "Largest difference of log-probs between engine and trainer on the probe sequence after the refresh",
        "nats",
        "constant: rounding, about 1e-5 in float32, more in bfloat16",
        "growing, or near refresh.probe_tolerance (the run stops there): both do not compute the same model",
    ),
    "perf/tokens_per_s": (
        "Scored tokens of the step over its time",
        "tokens/s",
        "steady; grows with response length",
        "falling: see which of the time/ metrics grew",
    ),
    "perf/imbalance": (
        "Cost of the busiest data-parallel rank over the mean, minus 1: the share of time for which others wait",
        "ratio",
        "below 0.05 with enough sequences per rank",
        "high: more rollouts in a step, or fewer data-parallel ranks",
    ),
    "perf/row_fill": (
        "Tokens over the room in all rows",
        "share",
        "near 1; rows have no padding, so this tells how large micro-batches are",
        "low: a smaller student.row_tokens loses nothing",
    ),
    "time/step_s": (
        "The whole step: rollouts, training, refresh",
        "s",
        "times the steps left is the rest of the run",
        "see its parts below",
    ),
    "time/collect_s": (
        "From drawing prompts to offering the batch",
        "s",
        "usually the larger part of a step",
        "large: more or faster rollout engines and teachers",
    ),
    "time/generate_s": (
        "Mean time of a group in the rollout engine",
        "s",
        "the slowest group makes the step: see the report's picture of a step",
        "large: more engines, or a smaller rollout.max_new_tokens",
    ),
    "time/verify_s": (
        "Mean time of a group in the verifiers",
        "s",
        "small beside time/generate_s",
        "large: more verifiers.workers",
    ),
    "time/score_s": (
        "Mean time of a group with its teacher",
        "s",
        "small beside time/generate_s: one forward pass without sampling",
        "large: more teacher replicas",
    ),
    "time/wait_s": (
        "Time for which the student's ranks waited for the batch",
        "s",
        "near time/collect_s while strictly on-policy",
        "it is what the trainer's GPUs idle; see time/collect_s",
    ),
    "time/train_s": (
        "Forward, backward and optimizer",
        "s",
        "proportional to loss/tokens",
        "large: more ranks, see docs/student.md for layouts",
    ),
    "eval/before": (
        "Share of correct ones among the graded responses before training",
        "share",
        "the base line",
        "0 or 1: this domain's held-out prompts cannot show progress",
    ),
    "eval/after": (
        "The same after training",
        "share",
        "compare with eval/before, in units of the standard error (summary.json, the report)",
        "lower than before: see reward/correct, rollout/length and the trajectories",
    ),
    "eval/teacher": (
        "The same of the domain's teacher",
        "share",
        "what the student can hope for",
        "below eval/before: this teacher has nothing to teach here",
    ),
}
