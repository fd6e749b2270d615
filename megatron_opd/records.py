"""One frozen record per stage: Prompt -> Rollout -> Verified -> Scored -> Calibrated -> TrainSample -> PackedBatch.

Legend of shapes: P prompt tokens, R response tokens, K top-k tokens, N tokens of all rows, M rows, S sequences, I
images.

A worked example: a prompt of P = 3 tokens ``[5, 6, 7]`` is answered with R = 2 tokens ``[8, 2]`` (2 = end of turn).

    Rollout      token_ids [8, 2]          logprobs [-0.5, -0.1]          versions [4, 4]
    Scored       teacher_logprobs [-0.2, -0.3]
    Calibrated   gaps [+0.3, -0.2]         mask [yes, yes]              mean_gap 0.05   offset 0.0
    TrainSample  token_ids [5, 6, 7, 8, 2] advantages [+0.3, -0.2]        weights [0.5, 0.5]   lags [0, 0] at step 4
    PackedBatch  tokens        [ 5,  6,    7,    8,   2]     (one row, one sequence)
                 labels        [ 6,  7,    8,    2,   0]     token t is the one predicted at position t
                 advantages    [ 0,  0, +0.3, -0.2,   0]
                 weights       [ 0,  0,  0.5,  0.5,   0]     0 where nothing is trained
                 row_offsets [0, 5]   sequence_offsets [0, 5]   denominator 1.0
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np


class Outcome(IntEnum):
    """Whether a response is right. UNKNOWN is neither: a verifier that failed says so and never guesses."""

    UNKNOWN = -1
    INCORRECT = 0
    CORRECT = 1


@dataclass(frozen=True, slots=True)
class Image:
    """One image of a prompt, resized once so that every model sees the same pixels. Filled by ``data``."""

    hash: str  # sha256 of its PNG file in hexadecimal, which is also the file's name in the run's folder of images
    rows: int  # of placeholder tokens: its height in pixels / (patch size * merge size)
    columns: int  # of placeholder tokens: its width / (patch size * merge size)
    start: int  # position in the prompt of its first placeholder token; the others follow, row after row

    @property
    def tokens(self) -> int:
        """Placeholder tokens that stand for it in a prompt."""
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question, ready to be sent to an engine. Filled by ``data``."""

    id: str  # unique in its file: the record's own id, or "file:line"
    domain: str  # names the teacher and the verifier
    text: str  # what the user says, before the chat template
    token_ids: tuple[int, ...]  # [P] after the chat template, ends where the assistant's turn begins; as many
    # placeholder tokens for each image as the model reads, and not the one that the template writes
    answer: str  # reference for the verifier: a number, or a JSON of tests
    repeats: int = 1  # how often it appears in one epoch
    images: tuple[Image, ...] = ()  # in the order of their places in token_ids


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One sampled response. Filled by ``engines``."""

    prompt: Prompt
    group: int  # number of the prompt's group in this run: rollouts of one sampled prompt share it
    token_ids: np.ndarray  # [R] int64, includes the end-of-turn token when the model stopped by itself
    logprobs: np.ndarray  # [R] float32, log-prob of each token under the weights that sampled it, temperature 1
    versions: np.ndarray  # [R] int64, weight version that sampled each token
    finish_reason: Literal["stop", "length"]  # "length": cut at the token limit
    text: str  # decoded response, without special tokens
    top_ids: np.ndarray | None = None  # [R, K] int64, most likely tokens first; None when scoring.top_k is 0


@dataclass(frozen=True, slots=True, eq=False)
class Verified:
    """A rollout with its outcome. Filled by ``verifiers``."""

    rollout: Rollout
    outcome: Outcome
    reason: str  # one clause for a person: "equal", "3 of 5 tests failed", "no \\boxed{} found"


@dataclass(frozen=True, slots=True, eq=False)
class TopRows:
    """The K most likely tokens at each position of a response. Filled by ``teachers``."""

    ids: np.ndarray  # [R, K] int64, most likely first
    logprobs: np.ndarray  # [R, K] float32


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """A verified rollout with its teacher's log-probs. Filled by ``teachers``."""

    verified: Verified
    teacher: str  # domain of the teacher that scored it
    teacher_logprobs: np.ndarray  # [R] float32, temperature 1
    reference_logprobs: np.ndarray | None = None  # [R] float32, of the free reference; None without one
    top: TopRows | None = None  # the teacher's; None when scoring.top_k is 0
    prefilled: int = 0  # tokens of prompt and response that the teacher computed: those that its cache did not hold


@dataclass(frozen=True, slots=True)
class Dropped:
    """A rollout that leaves the run before training, and why. Counted, never replaced by a number."""

    prompt_id: str
    domain: str
    stage: Literal["score", "stale"]  # what gave it up: a teacher call that failed, or weights that are too old
    reason: str  # for a person: who failed, how, got and expected
    kind: str  # one word to count by; docs/teachers.md lists those of scoring


@dataclass(frozen=True, slots=True, eq=False)
class Calibrated:
    """A scored rollout with what the recipe made of it. Filled by ``recipe.objective``."""

    scored: Scored
    gaps: np.ndarray  # [R] float32, distillation term of each token's advantage, before any outcome enters
    mask: np.ndarray  # [R] bool, tokens that may be trained on
    mean_gap: float  # G: mean of the gaps over the mask, before calibration; nan when the mask is empty
    offset: float  # what calibration adds to each token, nats
    outcome_term: float  # what other outcome rewards add to each token, nats
    topk_overlap: float | None  # mean share of tokens that the student's and the teacher's top-k rows have in common
    balanced: bool  # false: balancing dropped it
    trained: bool  # false: balancing, the margin mask or the sign filter dropped it


@dataclass(frozen=True, slots=True, eq=False)
class TrainSample:
    """One sequence to train on. Filled by ``recipe.advantage``."""

    token_ids: np.ndarray  # [P + R] int64
    prompt_length: int  # P
    advantages: np.ndarray  # [R] float32
    behaviour_logprobs: np.ndarray  # [R] float32, under the policy that sampled
    weights: np.ndarray  # [R] float32, share of the token in the loss before the denominator; 0 = masked
    lags: np.ndarray  # [R] int32, steps by which the weights that drew the token are older than those it trains
    slopes: np.ndarray  # [R] float32, by how much the advantage falls for a nat that the student's log-prob has risen
    forward_weights: np.ndarray  # [R] float32, share of the forward KL of the token; 0 = none
    top_ids: np.ndarray  # [R, K] int64, the teacher's; K = 0 without a forward KL
    top_logprobs: np.ndarray  # [R, K] float32, the teacher's
    images: tuple[Image, ...] = ()  # of the prompt, with which the sequence begins


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """What one data-parallel rank trains on in one step. Filled by ``recipe.pack``.

    Loss of the step = sum over all ranks and tokens of ``weights * token loss``, divided by ``denominator``,
    which is the same number on every rank: the result does not depend on how samples are split.
    """

    version: int  # weight version that is trained = index of the step
    last: bool  # whether the student ends with this step
    paused: bool  # whether it ends only to go on later: the state is saved, and nothing is exported
    denominator: float  # sum of the loss normaliser over the whole global batch
    tokens: np.ndarray  # [N] int64, rows one after the other
    labels: np.ndarray  # [N] int64, the next token of the same sequence; 0 at a sequence's last position
    advantages: np.ndarray  # [N] float32, at the position that predicts the token
    behaviour_logprobs: np.ndarray  # [N] float32
    weights: np.ndarray  # [N] float32
    lags: np.ndarray  # [N] int32
    slopes: np.ndarray  # [N] float32
    forward_weights: np.ndarray  # [N] float32
    top_ids: np.ndarray  # [N, K] int64
    top_logprobs: np.ndarray  # [N, K] float32
    row_offsets: np.ndarray  # [M + 1] int64: row m is tokens[row_offsets[m]:row_offsets[m + 1]], one micro-batch
    sequence_offsets: np.ndarray  # [S + 1] int64: a sequence never crosses a row
    image_hashes: np.ndarray  # [I, 32] uint8, Image.hash as bytes; an image appears once for each sequence that has it
    image_sizes: np.ndarray  # [I, 2] int64, rows and columns of placeholder tokens
    image_starts: np.ndarray  # [I] int64, ascending: tokens[start : start + rows * columns] are its placeholders
