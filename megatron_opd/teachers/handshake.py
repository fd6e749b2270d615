"""What every replica of a frozen model must prove before the first step: who it is, and that it scores one way only.

A probe is a sequence of random ids that no server has seen. It is scored cold, again (warm), and in parts: with the
prompt ending in several places, so that cache and start position differ. All ways, and all replicas of one model, must
agree within ``scoring.probe_tolerance``. A model that sees gets a second one, with an image of random pixels. What was
found is kept: a replica that was left out comes back only when it is still the same model and scores as before.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_opd.config import ServerConfig
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.scores import ScoringClient, Served
from megatron_opd.errors import EngineError, OpdError
from megatron_opd.runtime.vision import Vision
from megatron_opd.teachers.probes import Probe, image_probe, text_probe
from megatron_opd.teachers.scoring import score, score_request


@dataclass(frozen=True)
class Expected:
    """What a frozen model's servers must be."""

    role: str  # "teachers.math" or "reference": its place in the config
    model: Path
    server: ServerConfig
    vocab_size: int
    longest: int  # tokens of the longest prompt and response of the run
    top_k: int  # rows that will be asked for; one probe asks for them too
    tolerance: float  # nats
    vision: Vision | None = None  # how it reads images; None: it is asked about none
    images: ImageFolder | None = None  # of the clients; needed with vision


@dataclass(frozen=True, eq=False)
class Proven:
    """A replica that has passed."""

    served: Served
    probes: tuple[Probe, ...]
    logprobs: tuple[np.ndarray, ...]  # of each probe [N - first cut] float32


async def shake_hands(expected: Expected, clients: Sequence[ScoringClient]) -> tuple[dict[str, Proven], list[OpdError]]:
    """What each replica, by URL, has proven; and everything that is wrong, of all of them."""
    # The same probes for all replicas of a model, and others each time: no cache has them.
    rng = np.random.default_rng(secrets.randbits(64))
    probes: tuple[Probe, ...] = (text_probe(rng, expected.vocab_size),)
    if expected.vision is not None and expected.images is not None:
        probes += (image_probe(rng, expected.vocab_size, expected.vision, expected.images),)
    found = await asyncio.gather(*(_prove(expected, client, probes) for client in clients))
    proven = {proof.url: proof.proven for proof in found if proof.proven is not None}
    mistakes = [mistake for proof in found for mistake in proof.mistakes]
    return proven, mistakes + _disagreements(expected, proven)


async def check_again(expected: Expected, client: ScoringClient, proven: Proven) -> None:
    """Raise EngineError unless a replica that was left out is ready, the same as before, and scores as before."""
    await client.check_ready()
    served = await _served(client)
    if replace(served, longest=proven.served.longest) != proven.served:  # how much fits depends on the free memory
        what = "A server is not what it was at the start of the run"
        raise EngineError(what, kind="model", where=client.url, got=served, expected=proven.served)
    for mistake in _identity_mistakes(expected, client.url, served):
        raise mistake
    for probe, before in zip(proven.probes, proven.logprobs, strict=True):
        values = await _score(expected, client, probe, probe.cuts[0], served)
        _compare(expected, client.url, f"{probe.name} now", values, before)


@dataclass(frozen=True)
class _Proof:
    url: str
    proven: Proven | None
    mistakes: list[OpdError]


async def _prove(expected: Expected, client: ScoringClient, probes: tuple[Probe, ...]) -> _Proof:
    try:
        served = await _served(client)
        mistakes = _identity_mistakes(expected, client.url, served)
        if mistakes:
            return _Proof(client.url, None, mistakes)
        logprobs = [await _prove_one(expected, client, probe, served) for probe in probes]
    except OpdError as error:
        return _Proof(client.url, None, [error])
    return _Proof(client.url, Proven(served, probes, tuple(logprobs)), [])


async def _prove_one(expected: Expected, client: ScoringClient, probe: Probe, served: Served) -> np.ndarray:
    """[N - first cut] log-probs of a probe, which are the same in all ways."""
    first, *others = probe.cuts
    cold = await _score(expected, client, probe, first, served, top_k=expected.top_k)
    warm = await _score(expected, client, probe, first, served)
    _compare(expected, client.url, f"{probe.name} warm", warm, cold)
    for cut in others:
        values = await _score(expected, client, probe, cut, served)
        _compare(expected, client.url, f"{probe.name} with a prompt of {cut}", values, cold[cut - first :])
    return cold


async def _served(client: ScoringClient) -> Served:
    try:
        return await client.served()
    except (KeyError, TypeError, ValueError, IndexError) as error:
        what = "A server does not say what it serves"
        fix = "check that the address is an engine's, and server.engine is which one"
        raise EngineError(what, kind="malformed", where=client.url, got=repr(error), fix=fix) from error


async def _score(
    expected: Expected, client: ScoringClient, probe: Probe, cut: int, served: Served, top_k: int = 0
) -> np.ndarray:
    ids = probe.token_ids
    request = score_request(ids[:cut], ids[cut:], expected.vocab_size, top_k, images=probe.images)
    return (await score(client, request, served)).logprobs


def _identity_mistakes(expected: Expected, url: str, served: Served) -> list[OpdError]:
    mistakes: list[OpdError] = []
    if not is_model(served.model, expected):
        mistakes.append(
            EngineError(
                f"A server of {expected.role} serves another model",
                kind="model",
                where=url,
                got=served.model,
                expected=expected.server.model_path or expected.model,
                fix=f"correct the URL, or set {expected.role}.server.model_path={served.model} if it is the same model",
            )
        )
    if served.longest < expected.longest:
        mistakes.append(
            EngineError(
                f"A server of {expected.role} takes no request as long as this run's longest",
                kind="too_long",
                where=url,
                got=f"at most {served.longest} tokens",
                expected=f"{expected.longest}: data.max_prompt_tokens + rollout.max_new_tokens",
                fix="lower one of the two, or start the server with a longer context or more cache "
                "(engine.max_total_tokens)",
            )
        )
    return mistakes


def is_model(name: str, expected: Expected) -> bool:
    """Whether a server that calls its model ``name`` serves the expected one.

    Either it has the name that ``model_path`` gives, or, without one, it is the folder itself where this run started
    the server, and a folder or repository of the same last name where the server may be on another machine.
    """
    if expected.server.model_path is not None:
        return name.rstrip("/") == expected.server.model_path.rstrip("/")
    here = expected.model.resolve()
    if Path(name).resolve() == here:
        return True
    return bool(expected.server.urls) and Path(name).name in (here.name, expected.model.name)


def _disagreements(expected: Expected, proven: dict[str, Proven]) -> list[OpdError]:
    """Replicas of one model that score differently: one of them is another model, or another precision."""
    mistakes: list[OpdError] = []
    first = next(iter(proven), None)
    for url, other in proven.items():
        try:
            for probe, values, before in zip(other.probes, other.logprobs, proven[first].logprobs, strict=True):
                _compare(expected, url, f"{probe.name} unlike {first}", values, before)
        except EngineError as error:
            mistakes.append(error)
    return mistakes


def _compare(expected: Expected, url: str, how: str, values: np.ndarray, before: np.ndarray) -> None:
    difference = float(np.abs(values - before).max())
    if not difference <= expected.tolerance:
        raise EngineError(
            f"A server of {expected.role} gives one sequence two different scores",
            kind="probe",
            where=url,
            got=f"{how}: largest difference {difference:.3g} nats",
            expected=f"at most scoring.probe_tolerance = {expected.tolerance:g}",
            fix="in bfloat16 raise the tolerance to about 0.1; else the server's prefix cache or chunking is wrong",
        )
