"""Verifiers: from a response and its reference to correct, incorrect or unknown.

To add one: write a class with ``verify`` as in ``base.Verifier``, import heavy libraries in its ``__init__``
(that is when a worker starts), and name it here and in ``config.VerifierConfig.kinds``.
"""

from megatron_opd.verifiers.anls import AnlsVerifier
from megatron_opd.verifiers.base import Verdict, Verifier
from megatron_opd.verifiers.chartqa import ChartVerifier
from megatron_opd.verifiers.choice import ChoiceVerifier
from megatron_opd.verifiers.code import CodeVerifier
from megatron_opd.verifiers.exact import ExactVerifier
from megatron_opd.verifiers.ifeval import IfevalVerifier
from megatron_opd.verifiers.judge import JudgeVerifier
from megatron_opd.verifiers.math import MathVerifier
from megatron_opd.verifiers.none import NoVerifier
from megatron_opd.verifiers.numeric import NumericVerifier

VERIFIERS: dict[str, type[Verifier]] = {
    "math": MathVerifier,
    "code": CodeVerifier,
    "choice": ChoiceVerifier,
    "exact": ExactVerifier,
    "numeric": NumericVerifier,
    "chartqa": ChartVerifier,
    "anls": AnlsVerifier,
    "ifeval": IfevalVerifier,
    "judge": JudgeVerifier,
    "none": NoVerifier,
}

__all__ = ["VERIFIERS", "Verdict", "Verifier"]
