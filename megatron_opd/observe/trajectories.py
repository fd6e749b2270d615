"""The rollouts of a step as one parquet file, a row each: what ``megatron-opd audit`` reads, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_opd.records import Calibrated, Dropped, Verified

STATES = ("trained", "filtered", "balanced_out", "dropped")
"""trained; kept from training by the margin mask or the sign filter; by balancing; lost to a failed teacher call."""

_NUMBERS = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),  # counted from 1, as in metrics.jsonl
        ("group", pa.int64()),
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("prompt", pa.string()),
        ("answer", pa.string()),
        ("images", pa.list_(pa.string())),  # records.Image.hash of each: the name of its file
        ("response", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("finish_reason", pa.string()),
        ("outcome", pa.int8()),  # 1, 0, -1 as in records.Outcome
        ("reason", pa.string()),  # of the outcome; of the drop where the rollout was dropped
        ("state", pa.string()),  # one of STATES
        ("token_ids", pa.list_(pa.int32())),  # [R]
        ("student_logprobs", _NUMBERS),  # [R]
        # The rest is null where the rollout was not scored.
        ("teacher", pa.string()),
        ("teacher_logprobs", _NUMBERS),  # [R]
        ("gaps", _NUMBERS),  # [R], distillation term of the advantage before calibration
        ("mask", pa.list_(pa.bool_())),  # [R], true where a token may be trained on
        ("mean_gap", pa.float64()),  # G, before calibration; nan when the mask is empty
        ("offset", pa.float64()),  # what calibration added to each token
        ("outcome_term", pa.float64()),  # what other outcome rewards added to each token
        ("topk_overlap", pa.float64()),  # mean share of common tokens in the top-k rows; null without rows
    ]
)


def write_trajectories(
    path: Path,
    step: int,
    calibrated: Sequence[Calibrated],
    unscored: Sequence[Verified],
    dropped: Sequence[tuple[Verified, Dropped]],
) -> None:
    """Write one step's rollouts to ``path``, under a temporary name until it is complete.

    unscored: what balancing dropped before scoring. Cost: one copy of the arrays.
    """
    rows = [_scored_row(item) for item in calibrated]
    rows += [_rollout_row(item) | {"state": "balanced_out"} for item in unscored]
    rows += [_rollout_row(item) | {"state": "dropped", "reason": drop.reason} for item, drop in dropped]
    columns = {
        field.name: pa.array([row.get(field.name) for row in rows], type=field.type)
        for field in SCHEMA
        if field.name != "step"
    }
    table = pa.table({"step": pa.array([step] * len(rows), pa.int32()), **columns}, schema=SCHEMA)
    temporary = path.with_suffix(".tmp")
    # No dictionaries: log-probs hardly repeat, and looking for repetition costs as much as all the rest.
    pq.write_table(table, temporary, compression="zstd", use_dictionary=False)
    temporary.rename(path)


def read_trajectories(folder: Path) -> pa.Table:
    """All rollouts that a run kept, steps in order; an empty table when it kept none."""
    files = sorted(folder.glob("*.parquet"))
    return pa.concat_tables([pq.read_table(file, schema=SCHEMA) for file in files]) if files else SCHEMA.empty_table()


def _rollout_row(verified: Verified) -> dict[str, object]:
    rollout, prompt = verified.rollout, verified.rollout.prompt
    return {
        "group": rollout.group,
        "prompt_id": prompt.id,
        "domain": prompt.domain,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "images": [image.hash for image in prompt.images],
        "response": rollout.text,
        "prompt_tokens": len(prompt.token_ids),
        "finish_reason": rollout.finish_reason,
        "outcome": int(verified.outcome),
        "reason": verified.reason,
        "token_ids": rollout.token_ids.astype(np.int32),
        "student_logprobs": rollout.logprobs,
    }


def _scored_row(item: Calibrated) -> dict[str, object]:
    scored = item.scored
    state = "trained" if item.trained else "filtered" if item.balanced else "balanced_out"
    return _rollout_row(scored.verified) | {
        "state": state,
        "teacher": scored.teacher,
        "teacher_logprobs": scored.teacher_logprobs,
        "gaps": item.gaps,
        "mask": item.mask,
        "mean_gap": item.mean_gap,
        "offset": item.offset,
        "outcome_term": item.outcome_term,
        "topk_overlap": item.topk_overlap,
    }
