"""A run's folder with trajectories, config and tokenizer, as a training run leaves it; no model is needed.

The texts and log-probs are drawn; what the recipe makes of them is computed by the recipe. Among the rollouts are
one-sided groups, unknown outcomes, failed teachers, balanced-out ones, masked tokens, endless loops, and texts that
would be markup if they were not escaped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_opd.config import Config, parse_config
from megatron_opd.observe.trajectories import write_trajectories
from megatron_opd.recipe.balance import balance
from megatron_opd.recipe.objective import step_objective
from megatron_opd.records import Calibrated, Dropped, Outcome, Prompt, Rollout, Scored, Verified

TOKENIZER = Path(__file__).resolve().parents[2] / "tools" / "toy" / "models" / "student"
MARKUP = "<script>alert('owned')</script> & <b onmouseover=\"x\">bold</b>"
DROP_REASON = 'The teacher does not answer <"http://teacher:30001">'
SAMPLES = 8
TEACHER = {"math": (0.15, 0.4), "code": (0.9, 0.2)}  # how strongly it orders; how far it is from the student


@dataclass(frozen=True)
class Step:
    """The records of one step, as they were given to ``write_trajectories``."""

    calibrated: list[Calibrated]
    unscored: list[Verified]
    dropped: list[tuple[Verified, Dropped]]

    @property
    def verified(self) -> list[Verified]:
        return [
            *(item.scored.verified for item in self.calibrated),
            *self.unscored,
            *(verified for verified, _ in self.dropped),
        ]


def run_config(output: Path, **changes: object) -> Config:
    """Config of a run that calibrates and balances."""
    plain = {
        "name": "drawn",
        "output": str(output),
        "steps": 9,
        "student": {"model": "models/student"},
        "rollout": {"prompts_per_step": 12, "samples_per_prompt": SAMPLES, "max_new_tokens": 160},
        "teachers": {"math": {"model": "models/math"}, "code": {"model": "models/code"}},
        "data": {"train": "data/train.jsonl"},
        "balance": {"tolerance": 0.5},
        "calibration": {"delta": 0.4, "max_shift": 1.0},
    }
    return parse_config(plain | changes, where="the test")


def write_run(config: Config, seed: int = 0) -> list[Step]:
    """Fill ``config.run_dir`` as a run does, and return what is in it."""
    rng = np.random.default_rng(seed)
    folder = config.run_dir
    (folder / "trajectories").mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), folder / "config.yaml")
    tokenizer().save_pretrained(str(folder / "tokenizer"))
    steps = [draw_step(config, number, rng) for number in range(config.steps)]
    for number, step in enumerate(steps, 1):
        path = folder / "trajectories" / f"step_{number:06d}.parquet"
        write_trajectories(path, number, step.calibrated, step.unscored, step.dropped)
    return steps


def draw_step(config: Config, number: int, rng: np.random.Generator) -> Step:
    """``number``: index of the step, from 0 on; the student gets better and surer with it."""
    prompts, samples = config.rollout.prompts_per_step, config.rollout.samples_per_prompt
    progress = number / config.steps
    verified = []
    for place in range(prompts):
        prompt = _prompt(place + number * prompts, "math" if place % 3 else "code", rng)
        rate = np.clip(rng.beta(0.9, 1.1) + 0.25 * progress, 0.0, 1.0)
        verified += [_verified(prompt, place + number * prompts, rate, progress, rng) for _ in range(samples)]
    outcomes = np.array([item.outcome for item in verified], dtype=np.int8)
    groups = np.array([item.rollout.group for item in verified])
    keep = np.ones(len(verified), dtype=bool)
    if config.balance is not None:
        keep = balance(outcomes, groups, config.balance, seed=config.seed, step=number).keep
    early = config.balance is None or config.balance.order == "before_scoring"
    failed = rng.random(len(verified)) < 0.015
    to_score = ~failed & keep if early else ~failed
    scored = [_scored(item, rng) for item, chosen in zip(verified, to_score, strict=True) if chosen]
    objective = step_objective(scored, keep[to_score], config, number)
    unscored = [verified[i] for i in np.flatnonzero(~to_score & ~failed)]
    dropped = [(verified[i], _dropped(verified[i])) for i in np.flatnonzero(failed)]
    return Step(objective.rollouts, unscored, dropped)


@cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The toy models' tokenizer."""
    return AutoTokenizer.from_pretrained(str(TOKENIZER), local_files_only=True)


def _prompt(number: int, domain: str, rng: np.random.Generator) -> Prompt:
    a, b, c = rng.integers(2, 40, 3)
    if domain == "math":
        text = f"Nina has {a} boxes with {b} stamps each and {c} more stamps. How many stamps does Nina have?"
        answer = str(a * b + c)
    else:
        text = f"Write f(xs) in Python. It returns the sum of {a} times x plus {b} for all x in xs above {c}."
        answer = f"{a} {b} {c}"
    if number % 17 == 0:
        text += f" Mind {MARKUP}!"
    return Prompt(f"{domain}-train-{number}", domain, text, tuple(tokenizer().encode(text)), answer)


def _verified(prompt: Prompt, group: int, rate: float, progress: float, rng: np.random.Generator) -> Verified:
    outcome = Outcome(int(rng.random() < rate))
    reason = "equal" if outcome else rng.choice(["no \\boxed{} found", "another number: <1>", "3 of 5 tests failed"])
    endless = outcome == Outcome.INCORRECT and rng.random() < 0.15
    text = _loop(rng) if endless else _response(prompt, outcome, rng)
    ids = np.array(tokenizer().encode(text), dtype=np.int64)
    ids = ids[:160] if endless else np.append(ids, tokenizer().eos_token_id)
    if rng.random() < 0.03:
        outcome, reason = Outcome.UNKNOWN, "the verifier took longer than 5 s"
    logprobs = -rng.exponential(0.32 if endless else 0.5 - 0.3 * progress, len(ids)).astype(np.float32)
    finish = "length" if endless else "stop"
    rollout = Rollout(prompt, group, ids, logprobs, np.zeros(len(ids), dtype=np.int64), finish, text)
    return Verified(rollout, outcome, str(reason))


def _response(prompt: Prompt, outcome: Outcome, rng: np.random.Generator) -> str:
    slip = 0 if outcome == Outcome.CORRECT else int(rng.integers(1, 9))
    if prompt.domain == "math":
        numbers = [int(word) for word in prompt.text.split() if word.isdigit()]
        a, b, c = numbers[:3]
        text = f"First count the boxes: {a} * {b} = {a * b}.\nThen add the rest: {a * b} + {c} = {a * b + c + slip}.\n"
        text += f"The answer is \\boxed{{{a * b + c + slip}}}."
    else:
        a, b, c = prompt.answer.split()
        sign = ">" if outcome == Outcome.CORRECT else rng.choice([">=", "<", "!="])
        text = f"```python\ndef f(xs):\n    return sum({a} * x + {b} for x in xs if x {sign} {c})\n```"
    return text + f"\n{MARKUP}" if rng.random() < 0.04 else text


def _loop(rng: np.random.Generator) -> str:
    return f"Wait, {rng.integers(9)} stamps. " * 40


def _scored(verified: Verified, rng: np.random.Generator) -> Scored:
    """The teacher dislikes the end of wrong responses more than that of right ones, but does not mind loops."""
    rollout = verified.rollout
    order, distance = TEACHER[rollout.prompt.domain]
    length, looping = len(rollout.token_ids), rollout.finish_reason == "length"
    depth = np.linspace(0, 1, length)
    gaps = rng.normal(-0.15 * distance, 0.25, length) - rng.exponential(distance * 0.6, length) * (
        rng.random(length) < 0.3
    )
    if verified.outcome == Outcome.INCORRECT and not looping:
        gaps -= 0.4 * order * depth
    gaps += rng.normal(0.0, 0.1)
    gaps = gaps * 0.15 if looping else gaps
    gaps[rng.random(length) < 0.004] = -12.0
    return Scored(verified, rollout.prompt.domain, (rollout.logprobs + gaps).astype(np.float32))


def _dropped(verified: Verified) -> Dropped:
    prompt = verified.rollout.prompt
    return Dropped(prompt.id, prompt.domain, "score", DROP_REASON, "count")
