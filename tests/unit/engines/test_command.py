"""The exact command line of a started server: a change to it is a change for users."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_opd.config import EngineConfig, ServerConfig
from megatron_opd.engines import command
from megatron_opd.engines.command import LAUNCHER, server_argv, server_environment
from megatron_opd.runtime.env import TOKEN

URL = "http://127.0.0.1:3111"


def test_the_command_line_on_a_cpu() -> None:
    engine = EngineConfig(python=Path("/e/bin/python"), device="cpu")
    assert server_argv(engine, ServerConfig(), Path("models/m"), URL, seed=3) == (
        f"/e/bin/python -P {LAUNCHER} --model-path models/m --host 127.0.0.1 --port 3111 --dtype float32 --tp-size 1 "
        "--random-seed 3 --skip-tokenizer-init --enable-metrics --grammar-backend none --device cpu "
        "--attention-backend torch_native --mem-fraction-static 0.7 --max-total-tokens 65536 "
        "--disable-overlap-schedule --disable-cuda-graph --sleep-on-idle"
    ).split(" ")


def test_the_command_line_on_a_gpu() -> None:
    engine = EngineConfig(python=Path("/e/bin/python"), device="cuda", dtype="bfloat16", max_total_tokens=9)
    argv = server_argv(engine, ServerConfig(tensor_parallel=2), Path("m"), URL, seed=0)
    assert " ".join(argv).endswith(
        "--dtype bfloat16 --tp-size 2 --random-seed 0 --skip-tokenizer-init --enable-metrics --grammar-backend none "
        "--mem-fraction-static 0.75 --max-total-tokens 9"
    )
    assert "--device" not in argv


def test_a_model_that_sees(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vision_config": {}}')
    on_cpu, on_gpu = (
        server_argv(EngineConfig(device=device), ServerConfig(), tmp_path, URL, seed=0) for device in ("cpu", "cuda")
    )
    assert on_cpu[-2:] == ["--mm-attention-backend", "sdpa"] and "--mm-attention-backend" not in on_gpu
    for argv in (on_cpu, on_gpu):
        assert argv[argv.index("--mm-preprocess-cache-size-mb") + 1] == "256"


def test_an_engine_whose_weights_change_keeps_nothing_that_the_vision_tower_made() -> None:
    for device in ("cpu", "cuda"):
        fresh, frozen = (
            server_environment(EngineConfig(device=device), ServerConfig(), frozen=frozen) for frozen in (False, True)
        )
        assert fresh["SGLANG_VLM_CACHE_SIZE_MB"] == "0" and "SGLANG_VLM_CACHE_SIZE_MB" not in frozen


def test_answers_of_a_frozen_model_bear_its_name() -> None:
    plain, frozen = (server_argv(EngineConfig(), ServerConfig(), Path("m/x"), URL, seed=0, frozen=f) for f in (0, 1))
    assert "--weight-version" not in plain
    assert frozen[frozen.index("--weight-version") + 1] == "m/x"


def test_the_deterministic_mode() -> None:
    for device, added in (("cpu", " --chunked-prefill-size -1"), ("cuda", "")):
        plain, steady = (
            " ".join(server_argv(EngineConfig(device=device, deterministic=on), ServerConfig(), Path("m"), URL, seed=0))
            for on in (False, True)
        )
        assert steady.replace(f" --enable-deterministic-inference{added}", "") == plain != steady


@pytest.mark.parametrize(("present", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_gpu_when_there_is_one(monkeypatch, present: bool, expected: str) -> None:
    monkeypatch.setattr(command, "gpu_present", lambda: present)
    assert command.resolve_device("auto") == expected
    assert command.resolve_device("cpu") == "cpu"


def test_the_server_sees_its_gpus_but_neither_our_token_nor_our_import_path(monkeypatch) -> None:
    monkeypatch.setenv(TOKEN, "secret")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = server_environment(EngineConfig(device="cuda"), ServerConfig(gpus="2,3"))
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert TOKEN not in environment and "PYTHONPATH" not in environment
