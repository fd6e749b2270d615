"""A client of one SGLang server: sampling and prompt log-probs, over its native HTTP interface."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np

from megatron_opd.engines import sglang_scores
from megatron_opd.engines.client import EngineClient
from megatron_opd.engines.image_layout import ImageLayout
from megatron_opd.engines.images import collapsed
from megatron_opd.engines.sampling import LARGEST_ANSWER_TOKEN, Generation, Sampling
from megatron_opd.engines.scores import Served, TokenIds
from megatron_opd.engines.token_rows import parse_answer, split_rows
from megatron_opd.engines.top_rows import LARGEST_LOGPROB, check_rows, rows_from_lists
from megatron_opd.errors import EngineError
from megatron_opd.records import Image
from megatron_opd.runtime.http import BadReply, TransientError

TOP_ID_BYTES = 64  # of one most likely token of a sampled one, which come as lists


class SGLangClient(EngineClient):
    """One server; ``settings`` as ``EngineClient`` has them."""

    ready_path = "/ready"
    read_answer = staticmethod(parse_answer)
    read_scores = staticmethod(sglang_scores.read_scores)

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url, **settings)
        self._layout = ImageLayout(self.url)

    # ------------------------------------------------------------------ facts

    async def server_info(self) -> dict:
        """Launch arguments and release of the server."""
        return await self._get("/server_info")

    async def is_deterministic(self) -> bool:
        """Whether the server was started in deterministic mode."""
        return bool((await self.server_info()).get("enable_deterministic_inference", False))

    async def weight_version(self) -> str:
        """The server's current weight version; "default" before the first refresh."""
        return (await self._get("/model_info"))["weight_version"]

    async def served(self) -> Served:
        """What the server says of itself."""
        model, server = await self._get("/model_info"), await self.server_info()
        longest = server["max_req_input_len"] - 1  # SGLang refuses one of that length too
        return Served(model["model_path"], model["weight_version"], longest, reply_model=None)

    # --------------------------------------------------------------- sampling

    async def generate(
        self,
        prompt_ids: tuple[int, ...],
        samples: int,
        sampling: Sampling,
        top_ids: int = 0,
        images: Sequence[Image] = (),
    ) -> list[Generation]:
        """Draw ``samples`` responses to one prompt, each token with the ``top_ids`` most likely ids in its place.

        A ``top_ids`` above the model's vocabulary ends the whole server. Raises TransientError when the server aborted
        a response, EngineError when its answer breaks the contract.
        """
        body = await self._prompt_body(prompt_ids, images) | {
            "sampling_params": {
                "n": samples,
                "temperature": sampling.temperature,
                "max_new_tokens": sampling.max_new_tokens,
                "stop_token_ids": list(sampling.stop_token_ids),
                "top_p": sampling.top_p,
                "top_k": -1 if sampling.top_k is None else sampling.top_k,
            },
            "return_logprob": True,
        }
        if images and samples > 1:  # SGLang makes a batch of prompts of it, and takes a list of images for each
            body["image_data"] = [body["image_data"]]
        if sampling.seed is not None:
            body["sampling_params"]["sampling_seed"] = sampling.seed
        if top_ids:
            body["top_logprobs_num"] = top_ids
        new = sampling.max_new_tokens
        longest = sglang_scores.REST_BYTES + samples * new * (LARGEST_ANSWER_TOKEN + TOP_ID_BYTES * top_ids)
        answer = await self._post("/generate", body, prompt_tokens=len(prompt_ids), new_tokens=new, max_bytes=longest)
        replies = answer if isinstance(answer, list) else [answer]
        self._check(len(replies) == samples, "number of responses", len(replies), samples)
        try:
            generations = [self._parse_generation(reply, top_ids) for reply in replies]
            if images:
                for reply in replies:
                    self._layout.check_counts(reply["meta_info"], len(prompt_ids), images)
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise EngineError("The server's response is malformed", where=self.url, got=repr(error)) from error
        await self._check_places(prompt_ids, images)
        return generations

    def _parse_generation(self, reply: dict, top_ids: int) -> Generation:
        meta, token_ids = reply["meta_info"], np.asarray(reply["output_ids"], dtype=np.int64)
        finish = meta["finish_reason"]
        if finish["type"] == "abort":
            raise TransientError("The server aborted a response", where=self.url, got=finish.get("message"))
        self._check(finish["type"] in ("stop", "length"), "finish_reason", finish["type"], "stop or length")
        self._check(len(token_ids) > 0, "length of a response", 0, "at least 1 token")
        logprobs, echoed = split_rows(meta["output_token_logprobs"])
        self._check(np.array_equal(echoed, token_ids), "ids beside the log-probs", echoed[:8], token_ids[:8])
        self._check(bool(np.isfinite(logprobs).all()), "log-probs", "a value that is not finite", "finite values")
        self._check(bool((logprobs <= LARGEST_LOGPROB).all()), "log-probs", logprobs.max(), "at most 0")
        return Generation(
            token_ids=token_ids,
            logprobs=logprobs,
            versions=self._token_versions(meta["weight_versions"], len(token_ids)),
            finish_reason=finish["type"],
            top_ids=self._top_ids(meta, token_ids, logprobs, top_ids) if top_ids else None,
        )

    def _top_ids(self, meta: dict, token_ids: np.ndarray, logprobs: np.ndarray, k: int) -> np.ndarray:
        top = rows_from_lists(meta["output_top_logprobs"], len(token_ids), k, self._check)
        check_rows(top, token_ids, logprobs, self._check)
        return top.ids

    def _token_versions(self, spans: list[dict], length: int) -> np.ndarray:
        starts = [span["start"] for span in spans] + [length]
        ends = [0] + [span["end"] for span in spans]
        self._check(starts == ends, "weight_versions", spans, f"spans that cover 0..{length}")
        names = [span["version"] for span in spans]  # "default" before a refresh, or what a frozen model is called
        versions = [int(name) if name.isdecimal() else -1 for name in names]
        return np.repeat(np.array(versions, dtype=np.int64), np.diff(ends))

    # ---------------------------------------------------------------- scoring

    async def prompt_logprobs(
        self, token_ids: TokenIds, start: int, top_k: int = 0, images: Sequence[Image] = ()
    ) -> dict:
        """Raw reply to a request that samples nothing and returns log-probs of positions ``start``.. of ``token_ids``.

        The log-probs are those of temperature 1, whatever a request asks for. ``top_k`` adds rows of as many most
        likely tokens, in base64; above the model's vocabulary it ends the whole server.
        """
        reply = await self._score(token_ids, start, top_k, images)
        await self._check_places(token_ids[: start + 1], images)
        return reply

    async def _score(self, token_ids: TokenIds, start: int, top_k: int, images: Sequence[Image]) -> dict:
        body = await self._prompt_body(token_ids, images) | {
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": start,
        }
        if top_k:
            body["top_logprobs_num"] = top_k
            body |= {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
        body["rid"] = uuid.uuid4().hex
        longest = sglang_scores.longest_answer(len(token_ids) - start, top_k)
        reply = await self._post("/generate", body, prompt_tokens=len(token_ids), max_bytes=longest)
        self._check_request(reply, body["rid"])
        return reply

    # ----------------------------------------------------------------- images

    async def _prompt_body(self, token_ids: TokenIds, images: Sequence[Image]) -> dict:
        """The part of a request that is the prompt: one placeholder, and one PNG file, for each image."""
        if not images:
            return {"input_ids": np.asarray(token_ids)}
        if self._images is None:
            what = "A prompt has images, and it is not known where they are"
            raise EngineError(what, kind="request", where=self.url, got=f"{len(images)} images")
        return {"input_ids": collapsed(token_ids, images), "image_data": await self._images.encoded(images)}

    async def _check_places(self, token_ids: TokenIds, images: Sequence[Image]) -> None:
        """After an answer, and not before it, so that the cache is as cold as it was for the first one."""

        async def echo(ids: TokenIds) -> np.ndarray:
            reply = await self._score(ids, 0, 0, images)
            try:
                self._layout.check_counts(reply["meta_info"], len(ids), images)
                return split_rows(reply["meta_info"]["input_token_logprobs"])[1]
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                raise EngineError("The server's answer is malformed", where=self.url, got=repr(error)) from error

        await self._layout.check_places(token_ids, images, echo)

    def _check_request(self, reply: object, name: str) -> None:
        """Two prompts may end in the same response: ids alone do not tell whose answer this is."""
        meta = reply.get("meta_info") if isinstance(reply, dict) else None
        answered = meta.get("id") if isinstance(meta, dict) else None
        if answered != name:
            what = "The answer is to another request"
            raise BadReply(what, kind="other_request", where=self.url, got=answered, expected=name)
