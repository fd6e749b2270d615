"""The student's sampler: groups of rollouts, each token with its log-prob and the weight version that drew it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from megatron_opd.engines.images import without_images
from megatron_opd.engines.sampling import Generation, Sampling
from megatron_opd.records import Image, Prompt, Rollout
from megatron_opd.runtime.http import TransientError
from megatron_opd.runtime.replicas import ReplicaPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SamplingClient(Protocol):
    """A server that samples."""

    url: str

    async def generate(
        self,
        prompt_ids: tuple[int, ...],
        samples: int,
        sampling: Sampling,
        top_ids: int = 0,
        images: Sequence[Image] = (),
    ) -> list[Generation]:
        """Draw ``samples`` responses to one prompt, in which ``images`` have their places. Raises EngineError."""


class RolloutEngine:
    """Samples a model behind one or more servers; ``tokenizer`` only decodes, prompts come as token ids.

    ``top_ids``: most likely ids that are fetched in the place of each token; 0 fetches none. ``seed``: of all
    responses, which then depend on nothing but the weights; needs a server in deterministic mode. None: no seeds.
    ``refreshed``: whether a trainer gives the servers their weights. One that is started again has those of its folder
    until it gets others, and what it samples until then is nobody's: it counts as a failure. ``leave_out_images``: of
    what the servers are asked, for a model that sees none.
    """

    def __init__(
        self,
        replicas: ReplicaPool[SamplingClient],
        tokenizer: PreTrainedTokenizerBase,
        attempts: int,
        top_ids: int = 0,
        seed: int | None = None,
        *,
        refreshed: bool = False,
        leave_out_images: bool = False,
    ) -> None:
        self.replicas = replicas
        self._tokenizer = tokenizer
        self._attempts = attempts
        self._top_ids = top_ids
        self._seed = seed
        self._refreshed = refreshed
        self._leave_out_images = leave_out_images

    async def sample_group(
        self,
        prompt: Prompt,
        group: int,
        samples: int,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
    ) -> list[Rollout]:
        """``samples`` rollouts of ``prompt``, all of one replica, and tried again when it fails. Raises EngineError."""
        sampling = Sampling(max_new_tokens, temperature, (self._tokenizer.eos_token_id,), top_p, top_k)
        if self._seed is None:
            generations = await self._generate(prompt, group, samples, sampling)
        else:  # the responses of one request would share its seed
            seeds = [response_seed(self._seed, prompt.id, group, number) for number in range(samples)]
            single = [self._generate(prompt, group, 1, replace(sampling, seed=seed)) for seed in seeds]
            generations = [generation for part in await asyncio.gather(*single) for generation in part]
        return [self._rollout(prompt, group, generation) for generation in generations]

    async def _generate(self, prompt: Prompt, group: int, samples: int, sampling: Sampling) -> list[Generation]:
        return await self.replicas.call(
            (group, prompt.id),
            len(prompt.token_ids) + samples * sampling.max_new_tokens,
            self._attempts,
            lambda client: self._ask(client, prompt, samples, sampling),
        )

    async def _ask(self, client: SamplingClient, prompt: Prompt, samples: int, sampling: Sampling) -> list[Generation]:
        if self._leave_out_images:
            ids, images = without_images(prompt), ()
        else:
            ids, images = prompt.token_ids, prompt.images
        generations = await client.generate(ids, samples, sampling, self._top_ids, images)
        if self._refreshed and any(int(generation.versions.min()) < 0 for generation in generations):
            what = "A rollout engine has been started again and has no weights of this run yet"
            raise TransientError(what, kind="weights", where=client.url)
        return generations

    def _rollout(self, prompt: Prompt, group: int, generation: Generation) -> Rollout:
        return Rollout(
            prompt=prompt,
            group=group,
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            versions=generation.versions,
            finish_reason=generation.finish_reason,
            text=self._tokenizer.decode(generation.token_ids, skip_special_tokens=True),
            top_ids=generation.top_ids,
        )


def response_seed(seed: int, prompt_id: str, group: int, number: int) -> int:
    """The seed of one response of a run: 63 bits of a hash of the run's seed, prompt, group and number in the group."""
    name = f"{seed}/{group}/{number}/{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") >> 1
