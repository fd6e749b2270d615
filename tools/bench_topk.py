"""Bytes and milliseconds of a teacher's top-k rows: base64 of two arrays, against SGLang's default, lists.

    python tools/bench_topk.py [--tokens 4096] [--top-k 16] [--repeat 20]

Both bodies hold the same synthetic rows of a vocabulary of 151,936 and are parsed from JSON to checked arrays, as the
package does it. Milliseconds of CPU time of one thread, best of ``--repeat``.
"""

from __future__ import annotations

import argparse
import base64
import json
import time
from collections.abc import Callable

import numpy as np

from megatron_opd.engines.top_rows import check_rows, rows_from_base64, rows_from_lists
from megatron_opd.records import TopRows

VOCABULARY = 151_936


def rows(tokens: int, k: int) -> TopRows:
    """The ``k`` largest of 4096 random log-probs, at random ids."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (tokens, 4096))
    logprobs = -np.sort(-(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))), axis=1)[:, :k]
    ids = np.argsort(rng.random((tokens, 4096)), axis=1)[:, :k] * (VOCABULARY // 4096)
    return TopRows(ids, logprobs.astype(np.float32))


def base64_body(top: TopRows) -> str:
    """As SGLang 0.5.21 writes it with ``return_flat_raw_top_logprobs_b64``."""
    fields: dict[str, object] = {"input_top_logprobs_shape": list(top.ids.shape), "input_top_logprobs_null_prefix": 1}
    for name, array in (("val", top.logprobs), ("idx", top.ids.astype(np.int32))):
        fields[f"input_top_logprobs_{name}_flat_b64"] = base64.b64encode(array.tobytes()).decode()
        fields[f"input_top_logprobs_{name}_flat_b64_dtype"] = str(array.dtype)
    return json.dumps(fields, separators=(",", ":"))


def list_body(top: TopRows) -> str:
    """As SGLang writes it without."""
    pairs = zip(top.logprobs.tolist(), top.ids.tolist(), strict=True)
    listed = [[[value, token, None] for value, token in zip(*pair, strict=True)] for pair in pairs]
    return json.dumps({"output_top_logprobs": listed}, separators=(",", ":"))


def milliseconds(call: Callable[[], object], repeat: int) -> float:
    """CPU time of the fastest call."""
    times = []
    for _ in range(repeat):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times) * 1e3


def require(ok: bool, what: str, got: object, expected: object) -> None:
    """The checks of a scoring request, as an error of this script."""
    if not ok:
        raise ValueError(f"{what}: got {got}, expected {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--top-k", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    size = options.tokens, options.top_k
    top = rows(*size)
    bodies = {"base64": base64_body(top), "lists": list_body(top)}
    parsers = {
        "base64": lambda: rows_from_base64(json.loads(bodies["base64"]), *size, require),
        "lists": lambda: rows_from_lists(json.loads(bodies["lists"])["output_top_logprobs"], *size, require),
    }
    results = {}
    for name, parse in parsers.items():
        parsed = parse()
        assert (parsed.ids == top.ids).all() and (parsed.logprobs == top.logprobs).all(), name
        results[name] = len(bodies[name]), milliseconds(parse, options.repeat)
        print(f"{name:7} {results[name][0]:>12,} bytes {results[name][1]:9.2f} ms")
    byte_ratio, time_ratio = (a / b for a, b in zip(results["lists"], results["base64"], strict=True))
    print(f"lists / base64: {byte_ratio:.1f} times the bytes, {time_ratio:.0f} times the parsing")
    checking = milliseconds(lambda: check_rows(top, top.ids[:, 0], top.logprobs[:, 0], require), options.repeat)
    print(f"checks  {checking:31.2f} ms, the same for both")


if __name__ == "__main__":
    main()
