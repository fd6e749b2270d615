import builtins
import json
import sys

import pytest

from megatron_opd.config import VerifierConfig
from megatron_opd.errors import ConfigError
from megatron_opd.verifiers.ifeval import IfevalVerifier


@pytest.fixture(scope="module")
def verifier() -> IfevalVerifier:
    return IfevalVerifier(VerifierConfig())


def reference(*pairs: tuple[str, dict]) -> str:
    return json.dumps({"instruction_id_list": [a for a, _ in pairs], "kwargs": [b for _, b in pairs]})


NO_COMMA = ("punctuation:no_comma", {})
WORDS = ("length_constraints:number_words", {"num_words": 3, "relation": "at least", "keyword": None})
FRENCH = ("language:response_language", {"language": "fr"})


@pytest.mark.parametrize(
    ("response", "instructions", "expected"),
    [
        ("one two three", [NO_COMMA, WORDS], 1),
        ("one, two three", [NO_COMMA, WORDS], 0),
        ("one two", [NO_COMMA, WORDS], 0),
        ("", [NO_COMMA], 0),
        ("Le chat dort sur la table de la cuisine", [FRENCH], 1),
        ("The cat sleeps on the kitchen table", [FRENCH], 0),
        ("Say a b\nfine", [("combination:repeat_prompt", {"prompt_to_repeat": "say A b"})], 1),
        ("x", [("no:such_kind", {})], -1),
        ("x", [("length_constraints:number_sentences", {"num_sentences": 1, "relation": "at least"})], -1),
        ("x", [], -1),
    ],
)
def test_instructions(verifier, response, instructions, expected):
    assert verifier.verify("", response, reference(*instructions)).outcome == expected


@pytest.mark.parametrize("text", ["", "[]", '{"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}'])
def test_unusable_references(verifier, text):
    assert verifier.verify("", "x", text).outcome == -1


def test_nothing_is_downloaded(verifier):
    assert not [name for name in sys.modules if "ifbench" in name]  # the library's other half, whose import downloads


def test_a_missing_library_is_told(monkeypatch):
    original = builtins.__import__

    def absent(name: str, *rest: object) -> object:
        if name.startswith(("if_verifiable", "langdetect")):
            raise ModuleNotFoundError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError) as caught:
        IfevalVerifier(VerifierConfig())
    assert "requirements/ifeval.txt" in caught.value.fix
