"""A client of one vLLM server: prompt log-probs and sampling, over its OpenAI-style HTTP interface."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

import numpy as np

from megatron_opd.engines import vllm_scores
from megatron_opd.engines.client import EngineClient
from megatron_opd.engines.sampling import LARGEST_ANSWER_TOKEN, Generation, Sampling
from megatron_opd.engines.scores import Served, TokenIds
from megatron_opd.engines.top_rows import LARGEST_LOGPROB, SMALLEST_LOGPROB
from megatron_opd.errors import EngineError
from megatron_opd.records import Image
from megatron_opd.runtime.http import BadReply


class VLLMClient(EngineClient):
    """One server."""

    ready_path = "/health"
    read_scores = staticmethod(vllm_scores.read_scores)

    async def served(self) -> Served:
        """What the server says of itself: it may go by another name than the path of its model."""
        models = (await self._get("/v1/models"))["data"]
        self._check(len(models) == 1, "list of models", [model["id"] for model in models], "one")
        (model,) = models
        longest = model["max_model_len"] - 1  # a scoring request samples one token, which it throws away
        return Served(model["root"], None, longest, reply_model=model["id"])

    async def prompt_logprobs(
        self, token_ids: TokenIds, start: int, top_k: int = 0, images: Sequence[Image] = ()
    ) -> dict:
        """Raw reply to a request that returns log-probs of all of ``token_ids``: vLLM knows no ``start``.

        They are those of temperature 1 (``--logprobs-mode raw_logprobs``, its default). A ``top_k`` above the server's
        ``--max-logprobs`` is refused.
        """
        self._check_blind(images)
        body = {"prompt_logprobs": top_k, "max_tokens": 0, "echo": True, "temperature": 0.0}
        return await self._complete(np.asarray(token_ids), body, 1, vllm_scores.longest_answer(len(token_ids), top_k))

    async def generate(
        self,
        prompt_ids: tuple[int, ...],
        samples: int,
        sampling: Sampling,
        top_ids: int = 0,
        images: Sequence[Image] = (),
    ) -> list[Generation]:
        """Draw ``samples`` responses to one prompt. Raises TransientError, or EngineError for a wrong answer."""
        self._check_blind(images)
        if top_ids:
            raise EngineError("Most likely ids are only fetched of SGLang", where=self.url, got=top_ids, expected=0)
        body = {
            "n": samples,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": -1 if sampling.top_k is None else sampling.top_k,
            "stop_token_ids": list(sampling.stop_token_ids),
            "logprobs": 0,
        } | ({} if sampling.seed is None else {"seed": sampling.seed})
        longest = vllm_scores.REST_BYTES + (len(prompt_ids) + sampling.max_new_tokens) * samples * LARGEST_ANSWER_TOKEN
        reply = await self._complete(list(prompt_ids), body, sampling.max_new_tokens, longest)
        try:
            choices = reply["choices"]
            self._check(len(choices) == samples, "number of responses", len(choices), samples)
            return [self._parse_generation(choice) for choice in choices]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineError("The server's response is malformed", where=self.url, got=repr(error)) from error

    def _check_blind(self, images: Sequence[Image]) -> None:
        """Its completions take no images beside token ids, and its chat makes the tokens anew from the text."""
        if images:
            what = "Images are only sent to SGLang"
            raise EngineError(what, kind="request", where=self.url, got=f"{len(images)} images", expected="none")

    def _parse_generation(self, choice: dict) -> Generation:
        token_ids = np.array(choice["token_ids"], dtype=np.int64)
        logprobs = np.array(choice["logprobs"]["token_logprobs"], dtype=np.float32)
        finish = choice["finish_reason"]
        self._check(finish in ("stop", "length"), "finish_reason", finish, "stop or length")
        self._check(0 < len(token_ids) == len(logprobs), "number of log-probs", len(logprobs), len(token_ids))
        self._check(bool((logprobs > SMALLEST_LOGPROB).all()), "log-probs", logprobs.min(), "finite values")
        self._check(bool((logprobs <= LARGEST_LOGPROB).all()), "log-probs", logprobs.max(), "at most 0")
        versions = np.full(len(token_ids), -1, dtype=np.int64)  # its weights are never refreshed
        return Generation(token_ids, logprobs, versions, finish, None)

    async def _complete(self, prompt: list[int] | np.ndarray, body: dict, new_tokens: int, max_bytes: int) -> dict:
        name = uuid.uuid4().hex
        body = body | {"prompt": prompt, "return_token_ids": True, "request_id": name}
        reply = await self._post(
            "/v1/completions", body, prompt_tokens=len(prompt), new_tokens=new_tokens, max_bytes=max_bytes
        )
        answered = reply.get("id") if isinstance(reply, dict) else None
        if answered != f"cmpl-{name}":
            what = "The answer is to another request"
            raise BadReply(what, kind="other_request", where=self.url, got=answered, expected=f"cmpl-{name}")
        return reply
