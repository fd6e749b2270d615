"""Every format that ``megatron-opd prepare`` knows."""

from __future__ import annotations

from megatron_opd.config import PrepareConfig
from megatron_opd.errors import ConfigError
from megatron_opd.prepare.base import Format
from megatron_opd.prepare.code_sets import MBPP, EurusCode, HumanEval
from megatron_opd.prepare.image_sets import ChartQA, InfographicVQA, OpenMMReasoner
from megatron_opd.prepare.math_sets import GSM8K, Competition, DeepMath
from megatron_opd.prepare.verl import Canonical, Verl

FORMATS: dict[str, type[Format]] = {
    "verl": Verl,
    "deepmath": DeepMath,
    "eurus-code": EurusCode,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
    "mbpp": MBPP,
    "competition": Competition,
    "openmmreasoner": OpenMMReasoner,
    "chartqa": ChartQA,
    "infographicvqa": InfographicVQA,
    "canonical": Canonical,
}


def new_format(name: str, options: PrepareConfig) -> Format:
    """The format of a name. Raises ConfigError."""
    if name not in FORMATS:
        fix = "docs/data.md describes each"
        raise ConfigError("No such format", where="NAME", got=name, expected=", ".join(FORMATS), fix=fix)
    return FORMATS[name](options)
