"""A tokenizer small enough to build in a test, and the real data where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tenacity import wait_none

REAL_DATA = Path(__file__).parents[3] / "shared" / "data"
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{%- if message['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{%- endif %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[..., object]:
    """Builds a tokenizer of the 256 bytes and three special tokens, in this order of ids: special, bytes, extra."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def build(extra: tuple[str, ...] = (), end: str = "<|im_end|>", template: str | None = CHAT_TEMPLATE):
        special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *extra]
        model = models.BPE(vocab={token: number for number, token in enumerate(vocabulary)}, merges=[])
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(special)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token="<|endoftext|>")
        fast.chat_template = template
        return fast

    return build


@pytest.fixture
def model_folder(tmp_path: Path, byte_tokenizer: Callable[..., object]) -> Callable[..., Path]:
    """Writes a checkpoint folder that has a config and a tokenizer, but no weights."""

    def write(name: str, **options) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 259}))
        byte_tokenizer(**options).save_pretrained(str(folder))
        return folder

    return write


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """The real test set of GSM8K."""
    return real_file("gsm8k/test.jsonl")


@pytest.fixture(scope="session")
def humaneval() -> Path:
    """The real test set of HumanEval."""
    return real_file("humaneval/HumanEval.jsonl.gz")


@pytest.fixture(scope="session")
def aime24() -> Path:
    """The real problems of AIME 2024."""
    return real_file("aime24/test.jsonl")


def real_file(name: str) -> Path:
    path = REAL_DATA / name
    if not path.is_file():
        pytest.skip(f"shared/data/{name} is not beside this repository")
    return path


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses between the tries of a request."""
    monkeypatch.setattr("megatron_opd.runtime.http.wait_exponential_jitter", lambda **_: wait_none())
