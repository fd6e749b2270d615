"""The names that the config accepts are the verifiers that exist."""

from __future__ import annotations

from typing import get_args

from megatron_opd.config import VerifierConfig
from megatron_opd.verifiers import VERIFIERS


def test_config_and_registry_agree() -> None:
    (_, names) = get_args(VerifierConfig.model_fields["kinds"].annotation)
    assert set(get_args(names)) == set(VERIFIERS)
