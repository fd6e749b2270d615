"""Instructions that a program can check: IFEval, by the library if-verifiable (requirements/ifeval.txt).

    reference  '{"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}'

as in google/IFEval, whose checkers the library carries. CORRECT if the response follows every instruction (the
benchmark's strict accuracy of prompts). Two of the 25 kinds count sentences or words with data that NLTK downloads;
where it has none they are UNKNOWN.
"""

from __future__ import annotations

import json

from megatron_opd.config import VerifierConfig
from megatron_opd.errors import ConfigError
from megatron_opd.verifiers.base import Verdict, clip, correct, incorrect, unknown


class IfevalVerifier:
    """Needs a library that the other verifiers do not."""

    def __init__(self, config: VerifierConfig) -> None:
        """Import it. Raises ConfigError if it is not installed."""
        try:
            import langdetect
            from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
        except ImportError as error:
            raise ConfigError(
                "The verifier ifeval needs the library if-verifiable",
                where="verifiers.kinds",
                got=error,
                fix="pip install -r requirements/trainer-cpu.txt -r requirements/ifeval.txt",
            ) from error
        langdetect.DetectorFactory.seed = 0  # or the same response is judged differently each time
        self._checkers = INSTRUCTION_DICT

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """UNKNOWN if the reference or a checker is unusable."""
        try:
            instructions = parse(reference)
            missed = [name for name, options in instructions if not self._follows(name, options, prompt, response)]
        except Exception as error:  # noqa: BLE001 - the library's checkers raise anything
            return unknown(clip(f"IFEval failed: {type(error).__name__}: {error}"))
        if missed:
            return incorrect(f"{len(missed)} of {len(instructions)} instructions not followed; {', '.join(missed)}")
        return correct(f"{len(instructions)} instructions followed")

    def _follows(self, name: str, options: dict, prompt: str, response: str) -> bool:
        checker = self._checkers[name](name)
        checker.build_description(**options)
        if "prompt" in (checker.get_instruction_args() or {}):
            checker.build_description(prompt=prompt)
        return bool(response.strip()) and bool(checker.check_following(response))


def parse(reference: str) -> list[tuple[str, dict]]:
    """Names and options of the instructions. Raises ValueError, KeyError or TypeError."""
    plain = json.loads(reference)
    names = plain["instruction_id_list"]
    if not names:
        raise ValueError("the reference has no instructions")
    pairs = zip(names, plain["kwargs"], strict=True)
    return [
        (name, {key: value for key, value in (options or {}).items() if value is not None}) for name, options in pairs
    ]
