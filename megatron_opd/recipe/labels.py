"""What the functions of the recipe accept as outcomes, groups and returns of n rollouts. Pure numpy."""

from __future__ import annotations

import numpy as np

from megatron_opd.errors import DataError
from megatron_opd.records import Outcome

_KINDS = {"f": "float", "i": "signed integer"}


def check_labels(outcomes: np.ndarray, groups: np.ndarray) -> None:
    """Raises DataError unless both are signed integers of one length [n] and outcomes hold only 1, 0 and -1.

    Booleans and floats are refused: they have no place for "unknown", and reading them as one invites counting a
    verifier's failure as a wrong answer.
    """
    _check_vector("outcomes", outcomes, "i")
    _check_vector("groups", groups, "i", ("outcomes", len(outcomes)))
    wrong = (outcomes < Outcome.UNKNOWN) | (outcomes > Outcome.CORRECT)
    if wrong.any():
        raise DataError(f"outcomes: got {outcomes[wrong][0]}, expected 1 correct, 0 incorrect or -1 unknown")


def check_rollouts(returns: np.ndarray, outcomes: np.ndarray, groups: np.ndarray) -> None:
    """``check_labels``, and raises DataError unless ``returns`` is a float vector of the same length."""
    _check_vector("returns", returns, "f")
    _check_vector("outcomes", outcomes, "i", ("returns", len(returns)))
    check_labels(outcomes, groups)


def _check_vector(name: str, values: object, kind: str, like: tuple[str, int] | None = None) -> None:
    """like: name and length of the array that ``values`` goes with."""
    if not isinstance(values, np.ndarray):
        raise DataError(f"{name}: got {type(values).__name__}, expected a numpy array [n] of {_KINDS[kind]}")
    if values.dtype.kind != kind or values.ndim != 1:
        raise DataError(f"{name}: got {values.dtype} {values.shape}, expected [n] of {_KINDS[kind]}")
    if like is not None and len(values) != like[1]:
        raise DataError(f"{name}: got {len(values)}, expected {like[1]}, one for each of {like[0]}")
