"""A client of one SGLang server as the trainer sees it: new weights, pauses, and its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.engines.token_rows import split_rows
from megatron_opd.errors import EngineError
from megatron_opd.records import Image
from megatron_opd.runtime.http import fetch

# From this release on, weight updates stand between /begin_weight_update and /end_weight_update.
FIRST_WITH_BRACKETS = (0, 5, 21)
STREAM_MARK = "Streams weights."  # of ``sglang_receiver``, in the answer to joining a group
STREAM = "megatron_opd_stream"  # a load format of its own

PauseMode = Literal["retract", "in_place"]


@dataclass(frozen=True)
class WeightBucket:
    """Description of the tensors that arrive together, in order."""

    names: list[str]  # Hugging Face
    dtypes: list[str]  # "float32", "bfloat16"
    shapes: list[list[int]]


class WeightClient(SGLangClient):
    """One server. ``version`` of an update is what the server then calls its weights; None leaves the name as it is.

    ``flush`` empties the prefix cache after an update, which a server refuses while requests run: the update then
    counts as failed although the weights did change.
    """

    # An update must not be sent twice, and the trainer's loop stands still while it trains and gathers.
    reuses_connections = False

    _brackets: bool | None = None  # whether the server has begin and end; asked for once

    async def tensor_parallel(self) -> int:
        """Ranks of the server."""
        return (await self.server_info())["tp_size"]

    # ------------------------------------------------------------- broadcast

    async def join_weight_group(
        self, host: str, port: int, rank_offset: int, world_size: int, backend: str, name: str
    ) -> bool:
        """Let the server's ranks join the process group whose rank 0 is the trainer. Returns when all have joined:
        whether one request to it may ask for any number of tensors, because it does not keep all in memory.

        ``rank_offset``: rank in that group of the server's first one.
        """
        answer = await self._control(
            "/init_weights_update_group",
            {
                "master_address": host,
                "master_port": port,
                "rank_offset": rank_offset,
                "world_size": world_size,
                "group_name": name,
                "backend": backend,
            },
        )
        return STREAM_MARK in str(answer.get("message"))

    async def leave_weight_group(self, name: str) -> None:
        await self._control("/destroy_weights_update_group", {"group_name": name})

    async def receive_bucket(
        self, bucket: WeightBucket, group: str, *, flush: bool, version: int | None, streamed: bool = False
    ) -> None:
        """Receive one broadcast for each tensor of ``bucket``, straight into memory of its own.

        ``streamed``: what is sent to each rank alone instead, of an engine that can take a stream.
        """
        body = {"names": bucket.names, "dtypes": bucket.dtypes, "shapes": bucket.shapes, "group_name": group}
        body |= {"load_format": STREAM} if streamed else {}
        await self._control("/update_weights_from_distributed", body | _outcome(flush, version))

    # ------------------------------------------------------------ other ways

    async def load_folder(self, folder: Path, *, flush: bool, version: int) -> None:
        """Load the safetensors files of a folder that the server sees under the same path."""
        body = {"model_path": str(folder), "load_format": "safetensors"}
        await self._control("/update_weights_from_disk", body | _outcome(flush, version))

    async def take_tensors(self, payloads: list[str], *, flush: bool, version: int | None) -> None:
        """Take tensors out of shared memory; ``payloads``: a handle list in base64 for each rank of the server."""
        body = {"serialized_named_tensors": payloads}
        await self._control("/update_weights_from_tensor", body | _outcome(flush, version))

    async def begin_weight_update(self) -> None:
        """Open an update by broadcast or tensors, where the server wants that; one left open before is ended first."""
        if not await self._has_brackets():
            return
        try:
            await self._control("/begin_weight_update", {})
        except EngineError as error:
            if _is_status(error, 404):  # a build whose release says nothing, and which has no brackets
                self._brackets = False
                return
            if "already open" not in str(error):
                raise
            await self._control("/end_weight_update", {})
            await self._control("/begin_weight_update", {})

    async def end_weight_update(self) -> None:
        if await self._has_brackets():
            await self._control("/end_weight_update", {})

    async def _has_brackets(self) -> bool:
        if self._brackets is None:
            parts = (await self.server_info())["version"].split("+")[0].split(".")[:3]
            release = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)
            self._brackets = release >= FIRST_WITH_BRACKETS or not any(release)
        return self._brackets

    async def weights_checksum(self) -> str | None:
        """One digest of all the server's weights, in its own names and layout; None where it offers none."""
        try:
            answer = await self._post("/weights_checker", {"action": "checksum"})
        except EngineError as error:
            if _is_status(error, 400) or _is_status(error, 404):  # SGLang on a CPU; an old one
                return None
            raise
        return answer.get("per_engine_checksum")

    async def sequence_logprobs(self, token_ids: np.ndarray, images: Sequence[Image]) -> np.ndarray:
        """Log-prob of each token of a sequence but the first, [L - 1] float32; of a placeholder it means nothing."""
        reply = await self._score(token_ids, 0, 0, images)
        return split_rows(reply["meta_info"]["input_token_logprobs"])[0][1:]

    # ---------------------------------------------------------------- pauses

    async def pause(self, mode: PauseMode) -> None:
        """Stop between two tokens. "retract" gives the running requests' cache up, "in_place" keeps it."""
        await self._post("/pause_generation", {"mode": mode})

    async def resume(self) -> None:
        """Go on after ``pause``."""
        await self._post("/continue_generation", {})

    async def abort_all(self) -> None:
        """End all requests: their callers get an abort as the finish reason."""
        await fetch(self._session, "POST", self.url + "/abort_request", json={"abort_all": True})

    async def drain(self, limit_s: float) -> None:
        """End all requests and wait until none is left, which also empties the cache. Raises EngineError."""
        await self.abort_all()
        url = f"{self.url}/flush_cache?timeout={limit_s:g}"
        await fetch(self._session, "POST", url, timeout_s=limit_s + self._timeout_s)

    # ---------------------------------------------------------------- memory

    async def release_memory(self, tags: list[str]) -> None:
        """Give memory back; only while no request is there. Use ``MemoryOccupation``, which knows what is allowed."""
        await self._post("/release_memory_occupation", {"tags": tags})

    async def resume_memory(self, tags: list[str]) -> None:
        """Take it again; for what was not released, this ends the whole server."""
        await self._post("/resume_memory_occupation", {"tags": tags})

    async def _control(self, path: str, body: dict) -> dict:
        """A weight endpoint: its 200 answer says whether it succeeded."""
        answer = await self._post(path, body)
        self._check(answer.get("success", True) is True, f"answer of {path}", answer, "success: true")
        return answer


def _outcome(flush: bool, version: int | None) -> dict[str, object]:
    return {"flush_cache": flush} | ({} if version is None else {"weight_version": str(version)})


def _is_status(error: EngineError, status: int) -> bool:
    return str(error.got).startswith(f"{status} ")
