"""Rows ``[log-prob, id, null]`` in SGLang's answers, read without a Python object for each number.

A step at scale has millions of rows. As lists they cost microseconds each, most of it in Python's garbage collector;
arrow's reader of delimited numbers needs a tenth of a microsecond. The rest of an answer stays JSON.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv

from megatron_opd.engines.request_json import ids_text

# arrow asks who handles an interrupt before each read, and Python answers with the text of asyncio's main task and of
# all that it waits for, arrays included.
pa.enable_signal_handlers(False)

FIELDS = ("input_token_logprobs", "output_token_logprobs")
# A quotation mark inside a JSON string is escaped, so this matches keys only. Without spaces, as SGLang writes it:
# an answer written otherwise is read as JSON.
_BEGIN = re.compile(rb'"(?:((?:input|output)_token_logprobs":)(?=\[\[)|output_ids":(?=\[\d))')
_END = b",null]]"  # the text of a row is null, since nobody asks for it; the longer, the faster it is found
# Rows as lines of four fields: nothing, log-prob (after a blank, which is skipped), id, text.
_AS_LINES = bytes.maketrans(b"[]", b" \n")
_COLUMNS = ["nothing", "logprob", "id", "text"]
_PARSE = csv.ParseOptions(quote_char=False)
_CONVERT = csv.ConvertOptions(
    column_types={"logprob": pa.float64(), "id": pa.int64()},
    null_values=["null", " null"],
    check_utf8=False,
    include_columns=["logprob", "id"],
)


@dataclass(frozen=True, eq=False)
class TokenRows:
    """n rows of one response."""

    logprobs: np.ndarray  # [n] float32, NaN where the server wrote null
    ids: np.ndarray  # [n] int64

    def __len__(self) -> int:
        return len(self.ids)


def parse_answer(body: bytes) -> dict | list:
    """An answer of /generate as ``json.loads`` reads it, but for FIELDS of ``meta_info``, which are TokenRows, and for
    ``output_ids``, which are the rows' array where they are the same.

    Raises ValueError for what is no JSON, and for rows that are none.
    """
    found, kept, position = [], [], 0
    while match := _BEGIN.search(body, position):
        mark = _END if match.group(1) else b"]"
        end = body.find(mark, match.end())
        if end < 0:
            raise ValueError("token rows or ids without an end")
        kept.append(body[position : match.end()] + b"%d" % len(found))
        position = end + len(mark)
        text = body[match.end() + 1 : position - 1]
        found.append(_rows(text) if match.group(1) else text)
    answer = json.loads(b"".join([*kept, body[position:]]))
    for reply in answer if isinstance(answer, list) else [answer]:
        _put_back(reply, found)
    return answer


def split_rows(rows: list | TokenRows) -> tuple[np.ndarray, np.ndarray]:
    """Log-probs [n] float32 (null becomes NaN) and ids [n] int64 of rows, however they were read."""
    if isinstance(rows, TokenRows):
        return rows.logprobs, rows.ids
    if not rows:
        return np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
    logprobs, ids, _ = zip(*rows, strict=True)
    return np.array(logprobs, dtype=np.float32), np.array(ids, dtype=np.int64)


def _rows(text: bytes) -> TokenRows:
    """``[-0.5,8,null],[-1.5,9,null]`` -> two rows. Raises ValueError (arrow's errors are such)."""
    lines = b"," + text.translate(_AS_LINES)
    options = csv.ReadOptions(use_threads=False, column_names=_COLUMNS, block_size=len(lines) + 1)
    table = csv.read_csv(pa.BufferReader(lines), read_options=options, parse_options=_PARSE, convert_options=_CONVERT)
    if table["id"].null_count:
        raise ValueError("a token row has no id")
    return TokenRows(table["logprob"].to_numpy().astype(np.float32), table["id"].to_numpy())


def _put_back(reply: object, found: list[TokenRows | bytes]) -> None:
    if not isinstance(reply, dict):
        return
    meta = reply.get("meta_info") if isinstance(reply.get("meta_info"), dict) else {}
    for holder, name in [*((meta, name) for name in FIELDS), (reply, "output_ids")]:
        number = holder.get(name)
        if isinstance(number, int):
            if not 0 <= number < len(found):
                raise ValueError(f"{name} is a number")
            holder[name] = found[number]
    if isinstance(reply.get("output_ids"), bytes):
        reply["output_ids"] = _ids(reply["output_ids"], meta.get("output_token_logprobs"))


def _ids(text: bytes, rows: object) -> np.ndarray | list[int]:
    """Ids of a response; to see that they are those of its rows costs a fourth of reading them."""
    if isinstance(rows, TokenRows) and ids_text(rows.ids).replace(b" ", b"") == text:
        return rows.ids
    return json.loads(b"[" + text + b"]")
