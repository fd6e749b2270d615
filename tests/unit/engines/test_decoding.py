"""Ids to text: the fast way gives what the tokenizer gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.engines.decoding import Decoder

TOY = Path(__file__).resolve().parents[3] / "tools/toy/models/student"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """The toy one, with an added token that is text and one that is special."""
    tokenizer = load_tokenizer(TOY)
    tokenizer.add_tokens(["<think> \u00e9"])
    tokenizer.add_tokens(["<|tool|>"], special_tokens=True)
    return tokenizer


def slow(tokenizer: PreTrainedTokenizerBase, ids: np.ndarray) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("seed", range(20))
def test_random_ids_most_of_them_no_utf_8(tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, len(tokenizer), 1 + 50 * seed)
    decode = Decoder(tokenizer)
    assert decode._table is not None and decode(ids) == slow(tokenizer, ids)


def test_text_and_added_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = np.array(tokenizer.encode(" a\n\u00e4\U0001f600 <think> \u00e9b<|tool|><|im_end|>c\x00"))
    assert Decoder(tokenizer)(ids) == slow(tokenizer, ids) == " a\n\u00e4\U0001f600 <think> \u00e9bc\x00"


def test_ids_above_the_vocabulary_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = np.array([300, len(tokenizer), 301, 10**9 % 2**31])
    assert Decoder(tokenizer)(ids) == slow(tokenizer, ids[[0, 2]])
    assert Decoder(tokenizer)(ids[:0]) == ""


def test_a_tokenizer_that_joins_tokens_otherwise_decodes_itself() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    backend.decoder = decoders.WordPiece()
    other = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert Decoder(other)(np.array([0, 1])) == "a b"
