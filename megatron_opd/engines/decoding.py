"""Token ids to text. At scale a step has millions of tokens, and the tokenizer's own way is a tenth of all its work."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import decoders, pre_tokenizers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE_TOKENS = 4096


class Decoder:
    """Text of ids without the special tokens, as ``tokenizer.decode`` gives it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def __call__(self, ids: np.ndarray) -> str:
        """Text of ``ids`` [n]. Bytes that are no UTF-8 become U+FFFD; ids above the vocabulary are left out."""
        if self._table is None:
            return self._slow(ids)
        return _join(self._table, ids)

    @cached_property
    def _table(self) -> np.ndarray | None:
        """The bytes of each id [vocabulary + 1], the last of all ids above; None where text is more than its tokens'
        bytes: where the tokenizer decodes otherwise, or a random sequence shows a difference."""
        if not _is_byte_level(self._tokenizer):
            return None
        table = _token_bytes(self._tokenizer)
        probe = np.random.default_rng(0).integers(0, len(self._tokenizer), PROBE_TOKENS)
        return table if _join(table, probe) == self._slow(probe) else None

    def _slow(self, ids: np.ndarray) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _join(table: np.ndarray, ids: np.ndarray) -> str:
    return b"".join(table[np.minimum(ids, len(table) - 1)].tolist()).decode("utf-8", "replace")


def _is_byte_level(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    tidies_up = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    return backend is not None and isinstance(backend.decoder, decoders.ByteLevel) and not tidies_up


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Objects [vocabulary + 1]. A token is written with one character for each byte; an added one as it is."""
    byte_of = _bytes_of_characters()
    special = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    table = np.full(len(tokenizer) + 1, b"", dtype=object)
    for number, token in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        if token is not None and number not in special:
            known = all(character in byte_of for character in token)
            table[number] = bytes(byte_of[character] for character in token) if known else token.encode()
    return table


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others the characters from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    found = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert set(found) == set(pre_tokenizers.ByteLevel.alphabet())
    return found
