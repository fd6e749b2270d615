"""From the config to a pool of teachers whose every replica has proven itself."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from megatron_opd.config import Config, TeacherConfig
from megatron_opd.engines.connect import new_pool
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.scores import ScoringClient
from megatron_opd.errors import raise_together
from megatron_opd.runtime.replicas import ReplicaPool
from megatron_opd.runtime.vision import read_vision, text_config
from megatron_opd.teachers.handshake import Expected, Proven, check_again, shake_hands
from megatron_opd.teachers.pool import Teacher, TeacherPool

logger = logging.getLogger(__name__)

UNNAMED = "default"  # SGLang's weight version unless it is told another


@dataclass(frozen=True)
class _Frozen:
    """One frozen model: what it must be, its servers, and what these have proven."""

    expected: Expected
    replicas: ReplicaPool[ScoringClient]
    leaves_out_images: bool
    proven: dict[str, Proven] = field(default_factory=dict)  # by URL


async def start_teachers(
    stack: AsyncExitStack,
    config: Config,
    teachers: dict[str, list[str]],
    reference: list[str],
    lacking: Callable[[Path], Mapping[int, str]],
) -> TeacherPool:
    """Wait for all servers at these URLs, let each prove itself, and put them to work; ``stack`` closes them.

    lacking: the student's tokens, by id, that the tokenizer of a frozen model's folder does not have. Raises OpdError:
    the one thing that is wrong, or a list of all.
    """
    models = [
        _frozen(stack, config, f"teachers.{domain}", teacher, teachers[domain])
        for domain, teacher in config.teachers.items()
    ]
    if config.reference is not None:
        models.append(_frozen(stack, config, "reference", config.reference, reference))
    clients = [client for model in models for client in model.replicas.clients]
    await asyncio.gather(*(client.wait_until_ready(config.engine.start_timeout_s) for client in clients))
    found = await asyncio.gather(*(shake_hands(model.expected, model.replicas.clients) for model in models))
    raise_together([mistake for _, mistakes in found for mistake in mistakes])
    student_vocab_size = vocab_size(config.student.model)
    for model, (proven, _) in zip(models, found, strict=True):
        model.proven.update(proven)
        seen = ", text and an image" if model.expected.vision else ""
        logger.info("%s: %s scores the same cold, warm and in parts%s", model.expected.role, model.replicas.where, seen)
        _explain_padding(model.expected, student_vocab_size)
        _tell_unnamed(model)
    known = [_teacher(model, lacking(model.expected.model)) for model in models]
    free = known.pop() if config.reference is not None else None
    return TeacherPool(
        known,
        config.scoring.attempts,
        reference=free,
        top_k=config.scoring.top_k,
        student_vocab_size=student_vocab_size,
    )


def vocab_size(model: Path) -> int:
    """Rows of a model's output, padding among them."""
    return text_config(json.loads((model / "config.json").read_text()))["vocab_size"]


def expected_of(config: Config, role: str, teacher: TeacherConfig) -> Expected:
    """What the servers of ``teachers.<domain>`` or of ``reference`` must be."""
    return Expected(
        role=role,
        model=teacher.model,
        server=teacher.server,
        vocab_size=vocab_size(teacher.model),
        longest=config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        top_k=0 if role == "reference" else config.scoring.top_k,
        tolerance=config.scoring.probe_tolerance,
        vision=read_vision(teacher.model) if teacher.images == "send" and config.data.has_images else None,
        images=ImageFolder(config.images_folder),
    )


def _frozen(stack: AsyncExitStack, config: Config, role: str, teacher: TeacherConfig, urls: list[str]) -> _Frozen:
    expected = expected_of(config, role, teacher)
    proven: dict[str, Proven] = {}

    async def probe(client: ScoringClient) -> None:
        await check_again(expected, client, proven[client.url])

    replicas = new_pool(stack, role, config.engine, teacher.server, urls, probe, expected.images)
    return _Frozen(expected, replicas, teacher.images == "leave_out", proven)


def _teacher(model: _Frozen, lacking: Mapping[int, str]) -> Teacher:
    if lacking:
        logger.info(
            "%s: its tokenizer lacks %d of the student's added tokens (%s); a rollout with one of them is dropped",
            model.expected.role,
            len(lacking),
            ", ".join(list(lacking.values())[:8]),
        )
    return Teacher(
        domain=model.expected.role.removeprefix("teachers."),
        replicas=model.replicas,
        vocab_size=model.expected.vocab_size,
        served={url: proven.served for url, proven in model.proven.items()},
        leaves_out_images=model.leaves_out_images,
        lacking=frozenset(lacking),
        placeholders=model.expected.vision.placeholders if model.expected.vision else frozenset(),
    )


def _explain_padding(expected: Expected, student_vocab_size: int) -> None:
    if expected.vocab_size != student_vocab_size:
        logger.info(
            "%s has %d output rows and the student %d: both tokenizers mean the same by an id, so the difference is "
            "padding, which nobody samples; a rollout with such an id in its top-k rows is dropped",
            expected.role,
            expected.vocab_size,
            student_vocab_size,
        )


def _tell_unnamed(model: _Frozen) -> None:
    """SGLang's answers name no model; a weight version of its own is how one tells them from another model's."""
    unnamed = [url for url, proven in model.proven.items() if proven.served.weight_version == UNNAMED]
    if unnamed:
        logger.warning(
            "%s: the answers of %s do not say which model they are of; start the servers with --weight-version NAME",
            model.expected.role,
            ", ".join(unnamed),
        )
