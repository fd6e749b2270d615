"""A client of one SGLang server: sampling and prompt log-probs, over its native HTTP interface."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from megatron_opd.engines.top_rows import LARGEST_LOGPROB, check_rows, rows_from_lists
from megatron_opd.errors import EngineError
from megatron_opd.runtime.http import TransientError, fetch, new_session


@dataclass(frozen=True)
class Sampling:
    """How to draw a response. ``stop_token_ids`` end it and belong to it."""

    max_new_tokens: int
    temperature: float  # 0 is greedy
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0  # nucleus; the log-probs that come back are those of the whole distribution all the same
    top_k: int | None = None  # most likely tokens to draw from; None: all
    seed: int | None = None  # of the response, 0 .. 2**63 - 1; only a server in deterministic mode heeds it


@dataclass(frozen=True, eq=False)
class Generation:
    """One sampled response of R tokens, as the server returned it, checked."""

    token_ids: np.ndarray  # [R] int64
    logprobs: np.ndarray  # [R] float32, of the sampled tokens; at temperature 1 those of the model
    versions: np.ndarray  # [R] int64, weight version of each token; -1 before the first refresh
    finish_reason: str  # "stop" or "length"
    top_ids: np.ndarray | None  # [R, K] int64, most likely first, before top_p and top_k; None when not asked for


class SGLangClient:
    """One server. Not bound to a task: any number of requests may be under way."""

    def __init__(self, url: str, *, timeout_s: float, max_concurrency: int) -> None:
        self.url = url.rstrip("/")
        self._session = new_session(timeout_s=timeout_s, max_connections=max_concurrency)

    async def close(self) -> None:
        await self._session.close()

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

    # --------------------------------------------------------------- sampling

    async def generate(
        self, prompt_ids: tuple[int, ...], samples: int, sampling: Sampling, top_ids: int = 0
    ) -> list[Generation]:
        """Draw ``samples`` responses to one prompt, each token with the ``top_ids`` most likely ids in its place.

        A ``top_ids`` above the model's vocabulary ends the whole server. Raises TransientError when the server aborted
        a response, EngineError when its answer breaks the contract.
        """
        body = {
            "input_ids": list(prompt_ids),
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
        if sampling.seed is not None:
            body["sampling_params"]["sampling_seed"] = sampling.seed
        if top_ids:
            body["top_logprobs_num"] = top_ids
        answer = await self._post("/generate", body)
        replies = answer if isinstance(answer, list) else [answer]
        self._check(len(replies) == samples, "number of responses", len(replies), samples)
        try:
            return [self._parse_generation(reply, top_ids) for reply in replies]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineError("The server's response is malformed", where=self.url, got=repr(error)) from error

    def _parse_generation(self, reply: dict, top_ids: int) -> Generation:
        meta, token_ids = reply["meta_info"], np.array(reply["output_ids"], dtype=np.int64)
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
        versions = [-1 if span["version"] == "default" else int(span["version"]) for span in spans]
        return np.repeat(np.array(versions, dtype=np.int64), np.diff(ends))

    # ---------------------------------------------------------------- scoring

    async def prompt_logprobs(self, token_ids: list[int], start: int, top_k: int = 0) -> dict:
        """Raw reply to a request that samples nothing and returns log-probs of positions ``start``.. of ``token_ids``.

        The log-probs are those of temperature 1, whatever a request asks for. ``top_k`` adds rows of as many most
        likely tokens, in base64; above the model's vocabulary it ends the whole server.
        """
        body = {
            "input_ids": token_ids,
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": start,
        }
        if top_k:
            body["top_logprobs_num"] = top_k
            body |= {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
        return await self._post("/generate", body)

    # ------------------------------------------------------------------ wires

    async def _get(self, path: str) -> dict:
        return self._json(path, (await fetch(self._session, "GET", self.url + path))[1])

    async def _post(self, path: str, body: dict) -> dict:
        return self._json(path, (await fetch(self._session, "POST", self.url + path, json=body))[1])

    def _json(self, path: str, body: bytes) -> dict:
        try:
            return json.loads(body)
        except ValueError as error:
            raise EngineError("The server's answer is no JSON", where=self.url + path, got=body[:200]) from error

    def _check(self, ok: bool, what: str, got: object, expected: object) -> None:
        if not ok:
            raise EngineError(f"The server's {what} is wrong", where=self.url, got=got, expected=expected)


def split_rows(rows: list) -> tuple[np.ndarray, np.ndarray]:
    """``[[logprob or null, id, text], ...]`` to log-probs (null becomes NaN) and ids, without a loop over tokens."""
    if not rows:
        return np.empty(0, dtype=np.float32), np.empty(0, dtype=np.int64)
    logprobs, ids, _ = zip(*rows, strict=True)
    return np.array(logprobs, dtype=np.float32), np.array(ids, dtype=np.int64)
