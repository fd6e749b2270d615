"""What the launcher stands in for on a CPU; that a real server starts with it is seen in tests/contract."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_opd.engines.command import LAUNCHER


@pytest.fixture(scope="module")
def launcher() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launcher", LAUNCHER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_module_may_name_any_operator_while_it_is_imported_but_code_sees_what_there_is(launcher, monkeypatch) -> None:
    monkeypatch.setattr(torch.ops, "sgl_kernel", torch.ops.sgl_kernel)  # is put back after the test
    launcher.name_kernel_operators()
    module: dict[str, object] = {"torch": torch}
    exec("norm = torch.ops.sgl_kernel.some_norm_cpu\ndef asks(): return hasattr(torch.ops.sgl_kernel, 'other')", module)
    with pytest.raises(NotImplementedError, match="some_norm_cpu"):
        module["norm"](1)
    assert not module["asks"]() and not hasattr(torch.ops.sgl_kernel, "some_norm_cpu")
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    library.define("known_cpu(Tensor a) -> Tensor")
    library.impl("known_cpu", lambda a: a + 1, "CPU")
    assert torch.ops.sgl_kernel.known_cpu(torch.ones(1)).item() == 2


def test_only_a_model_with_a_vision_tower_sees(launcher, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": {"depth": 2}}))
    assert launcher.has_vision(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"vision_config": None}))
    assert not launcher.has_vision(str(tmp_path)) and not launcher.has_vision(None)
