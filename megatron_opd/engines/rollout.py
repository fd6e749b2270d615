"""The student's sampler: groups of rollouts, each token with its log-prob and the weight version that drew it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_opd.engines.sglang import Generation, Sampling, SGLangClient
from megatron_opd.records import Prompt, Rollout
from megatron_opd.runtime.http import with_retries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RolloutEngine:
    """Samples a model behind ``client``; ``tokenizer`` only decodes, prompts come as token ids.

    ``top_ids``: most likely ids that are fetched in the place of each token; 0 fetches none.
    """

    def __init__(
        self, client: SGLangClient, tokenizer: PreTrainedTokenizerBase, attempts: int, top_ids: int = 0
    ) -> None:
        self.client = client
        self._tokenizer = tokenizer
        self._attempts = attempts
        self._top_ids = top_ids

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
        """``samples`` rollouts of ``prompt``, all tried again when the server fails. Raises EngineError."""
        sampling = Sampling(max_new_tokens, temperature, (self._tokenizer.eos_token_id,), top_p, top_k)
        generations = await with_retries(
            self._attempts, lambda: self.client.generate(prompt.token_ids, samples, sampling, self._top_ids)
        )
        return [self._rollout(prompt, group, generation) for generation in generations]

    def _rollout(self, prompt: Prompt, group: int, generation: Generation) -> Rollout:
        return Rollout(
            prompt=prompt,
            group=group,
            token_ids=generation.token_ids,
            logprobs=generation.logprobs,
            versions=generation.versions,
            finish_reason=generation.finish_reason,
            text=self._tokenizer.decode(generation.token_ids.tolist(), skip_special_tokens=True),
            top_ids=generation.top_ids,
        )
