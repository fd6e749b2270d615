"""Bodies with arrays of token ids say what ``json.dumps`` of their lists says."""

from __future__ import annotations

import json

import numpy as np
import pytest

from megatron_opd.engines.request_json import request_json


@pytest.mark.parametrize("ids", [[], [0], [7, 0, 8], [1023, 1024, 9, 151935], [2**17 - 1, 2**17], [2**40, 3]])
def test_an_array_of_ids_is_read_back_as_the_same_list(ids: list[int]) -> None:
    body = {"input_ids": np.array(ids, dtype=np.int64), "parameters": {"n": 2}, 'a "name"': None}
    assert json.loads(request_json(body)) == {"input_ids": ids, "parameters": {"n": 2}, 'a "name"': None}


def test_an_id_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="-3"):
        request_json({"input_ids": np.array([5, -3])})
