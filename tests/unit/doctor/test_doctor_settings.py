"""Each check of the config, once where all is well and once for each way to fail."""

from __future__ import annotations

import shutil
import socket
from collections import namedtuple

import pytest

from megatron_opd.doctor import machine
from megatron_opd.doctor import settings as checks
from megatron_opd.doctor.machine import read_pins, size
from megatron_opd.doctor.models import check_data, check_models, check_sizes, check_tokenizers

Usage = namedtuple("Usage", "total used free")
LINE = '{"prompt": "Compute 1 + 1.", "answer": "2", "domain": "math"}\n'


def room(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))


@pytest.mark.parametrize(
    ("changes", "state", "found"),
    [
        ([], "ok", "32 prompts x 4 = 128 rollouts a step"),
        (["student.data_parallel=3"], "warning", "128 rollouts"),
        (["student.data_parallel=256"], "failed", "128 rollouts"),
        (["student.row_tokens=512"], "warning", "a long one fills a row beyond row_tokens"),
    ],
)
def test_batch(settings, only, changes, state, found) -> None:
    finding = only(checks.check_batch(settings(*changes)))
    assert finding.state == state and found in finding.found


def test_placement_counts_processes_and_asks_slurm_only_in_a_job(settings, only, monkeypatch) -> None:
    monkeypatch.setattr(checks, "processors", lambda: 2)
    assert only(checks.check_placement(settings("student.device=cpu"))).state == "ok"
    crowded = only(checks.check_placement(settings("student.device=cpu", "student.data_parallel=8")))
    assert crowded.state == "warning" and "19 busy threads" in crowded.needed


def test_a_port_that_is_taken_and_one_that_is_asked_for_twice(settings, only) -> None:
    assert "none is fixed" in only(checks.check_ports(settings())).found
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        bad = only(checks.check_ports(settings(f"coordinator.port={port}")))
    assert bad.state == "failed" and str(port) in bad.found and "coordinator.port=0" in bad.fix
    twice = list(checks.check_ports(settings("rollout.server.port=30700", "teachers.math.server.port=30700")))
    assert any(one.state == "failed" and "port of rollout, port of teacher-math" in one.found for one in twice)


def test_replicas_take_the_next_ports(settings) -> None:
    ports = checks.wanted_ports(settings("rollout.server.port=30700", "rollout.server.replicas=2", "refresh.port=4"))
    assert ports == [("refresh.port", 4), ("port of rollout", 30700), ("port of rollout", 30701)]


def test_an_old_folder_is_refused_moved_or_gone_on_with(settings, only) -> None:
    assert "is new" in only(checks.check_run_folder(settings())).found
    settings().run_dir.mkdir(parents=True)
    refused = only(checks.check_run_folder(settings("existing=refuse")))
    assert refused.state == "failed" and "existing=resume" in refused.fix
    assert "moved aside" in only(checks.check_run_folder(settings())).found
    assert "gone on with" in only(checks.check_run_folder(settings("existing=resume"))).found


def test_a_folder_that_may_not_be_written(settings, only, monkeypatch) -> None:
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)  # root may write anywhere
    assert "cannot be written" in only(checks.check_run_folder(settings())).found


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ([], 3),  # 40 steps, every 10: two are kept while a third is written
        (["checkpoint.every_steps=0"], 0),
        (["steps=10"], 1),
        (["checkpoint.keep_every=20"], 4),
        (["checkpoint.keep_last=3", "checkpoint.keep_every=10"], 4),  # not more than there are
    ],
)
def test_checkpoints_on_the_disk_at_a_time(settings, changes, count) -> None:
    assert checks.kept_checkpoints(settings(*changes)) == count


def test_too_little_disk(settings, only, monkeypatch) -> None:
    room(monkeypatch, 10**9)
    assert only(checks.check_disk(settings())).state == "ok"
    room(monkeypatch, 10**6)
    finding = only(checks.check_disk(settings()))
    assert finding.state == "failed" and finding.found.startswith("1 MB free") and "3 checkpoints" in finding.needed
    shared = list(checks.check_disk(settings("refresh.mode=disk", "refresh.folder=/tmp/weights")))
    assert [one.state for one in shared] == ["failed", "failed"] and "two versions" in shared[1].needed


def test_the_bytes_of_a_checkpoint_are_about_those_that_a_run_wrote(settings, only) -> None:
    """A run of conf/toy.yaml wrote 19.5 MB (README.md), with the coordinator's state."""
    assert "3 checkpoints of 19 MB" in only(checks.check_disk(settings())).needed


def test_shared_memory(settings, only, monkeypatch) -> None:
    room(monkeypatch, 64 << 20)
    assert only(machine.check_shared_memory(settings("student.device=cpu"))).state == "ok"
    small = only(machine.check_shared_memory(settings("student.device=cuda")))
    assert small.state == "warning" and "--shm-size" in small.fix
    room(monkeypatch, 1 << 20)
    assert only(machine.check_shared_memory(settings("refresh.mode=tensor"))).state == "failed"


def test_sinks(settings, only, monkeypatch) -> None:
    assert only(checks.check_sink_modes(settings())).state == "skipped"
    monkeypatch.setattr(checks, "check_sinks", lambda config: None)  # as if wandb were installed
    monkeypatch.setenv("WANDB_MODE", "offline")
    offline = only(checks.check_sink_modes(settings("sinks.wandb=true")))
    assert offline.state == "warning" and "WANDB_API_KEY" in offline.fix
    monkeypatch.setenv("WANDB_MODE", "online")
    assert only(checks.check_sink_modes(settings("sinks.wandb=true"))).state == "ok"


# ---------------------------------------------------------------- models and data


def test_a_missing_model_is_told_once_and_skips_what_needs_it(settings, only) -> None:
    config = settings("teachers.code.model=/nowhere", "student.model=/nowhere")
    assert [one.state for one in check_models(config)] == ["failed", "failed"]
    for check in (check_sizes, check_tokenizers, check_data, checks.check_disk):
        assert only(check(config)).state == "skipped"


def test_sizes(settings, only) -> None:
    assert "TP 2" in only(check_sizes(settings())).found
    uneven = list(check_sizes(settings("student.tensor_parallel=3", "rollout.max_new_tokens=100000")))
    assert {one.state for one in uneven} == {"failed"}
    assert any("attention heads" in one.found for one in uneven) and any("context" in one.found for one in uneven)


def test_a_teacher_with_another_tokenizer(settings, only, model_folder) -> None:
    other = model_folder("other")
    (other / "model.safetensors").touch()
    found = list(check_tokenizers(settings(f"teachers.math.model={other}")))
    assert found and all(one.state == "failed" for one in found)


def test_a_bad_record_of_one_file_does_not_hide_the_other(settings, tmp_path) -> None:
    (tmp_path / "bad.jsonl").write_text(LINE + LINE.replace("math", "maths"))
    train, held_out = check_data(settings(f"data.train={tmp_path / 'bad.jsonl'}"))
    assert train.state == "failed" and "bad.jsonl:2" in train.found and "maths" in train.found
    assert held_out.state == "ok" and "400 records; first: code, 45 tokens, 'Write f(xs)" in held_out.found


def test_pass_rates_that_are_not_there(settings) -> None:
    with pytest.raises(ValueError, match="No such file of pass rates"):
        list(check_data(settings("data.lazy.start=/nowhere.parquet")))


# ---------------------------------------------------------------- packages


def test_packages_that_are_missing_or_of_another_version(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(machine, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(machine, "gpu_present", lambda: False)
    assert next(machine.check_packages()).state == "skipped"
    (tmp_path / "trainer-cpu.txt").write_text("# tested\nnumpy==0.0.1\nno-such-package==1.0\n")
    missing, other = machine.check_packages()
    assert missing.state == "failed" and "no-such-package" in missing.found
    assert other.state == "warning" and "numpy" in other.found and "tested: 0.0.1" in other.found


def test_every_pin_is_read() -> None:
    lines = (machine.REQUIREMENTS / "trainer-cpu.txt").read_text().splitlines()
    assert len(read_pins(machine.REQUIREMENTS / "trainer-cpu.txt")) == sum("==" in line for line in lines)


def test_sizes_for_a_person() -> None:
    assert [size(count) for count in (5, 14_300_000, 7.45e10, 2.5e12)] == ["5 B", "14.3 MB", "74.5 GB", "2.5 TB"]
