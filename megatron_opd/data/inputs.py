"""The prompt files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import ColumnsConfig, Config, TeacherConfig
from megatron_opd.data.blocks import LineBlocks
from megatron_opd.data.file_stream import FileStream
from megatron_opd.data.images import open_store
from megatron_opd.data.mixture import MixedStream
from megatron_opd.data.pass_rates import read_pass_rates
from megatron_opd.data.reading import ImageReading, PromptReader, read_prompts
from megatron_opd.data.stream import LazyStream, PromptStream, fingerprint
from megatron_opd.errors import DataError
from megatron_opd.records import Prompt
from megatron_opd.runtime.vision import read_vision

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Stream = PromptStream | FileStream | MixedStream
HEAD = 100  # records of a streamed file that are checked before a run


def read_inputs(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and held-out prompts (empty without ``data.eval``). Raises DataError."""
    return read_training(config, tokenizer), read_held_out(config, tokenizer)


def read_training(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """All training prompts. Raises DataError."""
    return _read(config, config.data.train, config.data.columns, tokenizer)


def read_held_out(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Held-out prompts, none without ``data.eval``. Raises DataError."""
    data = config.data
    once = (data.eval_columns or data.columns).model_copy(update={"repeats": None})  # repeats belong to training
    return _read(config, data.eval, once, tokenizer) if data.eval else []


def check_inputs(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Read both files, of a streamed one the first records. Raises DataError."""
    if config.data.stream is None:
        _mixed(config, read_training(config, tokenizer))
    else:
        LineBlocks(config.data.train)
        _read(config, config.data.train, config.data.columns, tokenizer, limit=HEAD)
    read_held_out(config, tokenizer)


def open_stream(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[Stream, str]:
    """The training prompts in the order of drawing, and a fingerprint of them. Raises DataError."""
    if config.data.stream is None:
        prompts = read_training(config, tokenizer)
        return _mixed(config, prompts), fingerprint(prompts)
    data, lines = config.data, LineBlocks(config.data.train)
    reader = _reader(config, data.train, data.columns, tokenizer)
    if data.mixture is None:
        return FileStream(lines, reader, config.seed, data.stream), lines.fingerprint()
    parts = [
        FileStream(lines, reader, config.seed, data.stream, domain, takes_bad=number == 0)
        for number, domain in enumerate(sorted(data.mixture))
    ]
    return MixedStream(parts, [data.mixture[domain] for domain in sorted(data.mixture)]), lines.fingerprint()


def _mixed(config: Config, prompts: list[Prompt]) -> Stream:
    """Prompts in memory as a stream."""
    mixture = config.data.mixture
    if mixture is None:
        return _in_memory(config, prompts)
    parts = []
    for domain in sorted(mixture):
        own = [prompt for prompt in prompts if prompt.domain == domain]
        if not own:
            got, fix = f"no record of {domain}", "correct data.mixture or the file"
            raise DataError("A domain has no prompts", where=config.data.train, got=got, expected="one", fix=fix)
        parts.append(_in_memory(config, own))
    return MixedStream(parts, [mixture[domain] for domain in sorted(mixture)])


def _in_memory(config: Config, prompts: list[Prompt]) -> PromptStream:
    lazy = config.data.lazy
    if lazy is None:
        return PromptStream(prompts, config.seed)
    return LazyStream(prompts, config.seed, lazy, read_pass_rates(lazy.start) if lazy.start else None)


def _read(
    config: Config,
    path: Path,
    columns: ColumnsConfig,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
) -> list[Prompt]:
    return read_prompts(_reader(config, path, columns, tokenizer), limit)


def _reader(config: Config, path: Path, columns: ColumnsConfig, tokenizer: PreTrainedTokenizerBase) -> PromptReader:
    store = open_store(config.student.model, config.images_folder, config.data.images, columns.images)
    data, domains = config.data, set(config.teachers)
    return PromptReader(
        path,
        columns,
        data.default_domain,
        domains,
        tokenizer,
        data.max_prompt_tokens,
        images=ImageReading(store, image_domains(config)) if store else None,
    )


def image_domains(config: Config) -> frozenset[str]:
    """Domains whose prompts may have images: their teacher sees, or images are left out of what it is asked.

    A free reference is asked about every prompt, so a blind one that is to see takes all domains away.
    """
    if config.reference is not None and not _takes_images(config.reference):
        return frozenset()
    return frozenset(domain for domain, teacher in config.teachers.items() if _takes_images(teacher))


def _takes_images(teacher: TeacherConfig) -> bool:
    return teacher.images == "leave_out" or read_vision(teacher.model) is not None
