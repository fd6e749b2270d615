"""An engine that keeps what it is sent, and fails where it is told to: the weight endpoints of SGLang, no model.

Runs in a process of its own, because it joins the trainer's process group.
"""

from __future__ import annotations

import asyncio
import base64
import io
import os
import pickle
import signal
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from aiohttp import web
from PIL import Image as PillowImage
from safetensors.torch import load_file, save_file
from torch.distributed.distributed_c10d import Backend, PrefixStore, _new_process_group_helper, _world

from megatron_opd.engines.weights import STREAM, STREAM_MARK
from megatron_opd.runtime.process import die_with_parent


@dataclass
class FakeEngine:
    """One server. ``fault`` is what goes wrong, once, at bucket number ``at`` (1 is the first of the server's life; 0:
    the first of its second update).

    refuse: answer that it failed, without receiving; die: kill itself; hang: stop itself; flush: take the weights, but
    say that the flush was refused; version: keep the old version's name; logprobs: answer the probe with others; join:
    die instead of joining a group; memory: refuse to release it, though nobody knows whether it has.
    """

    folder: Path  # where it saves what it holds, when asked to
    fault: str = ""
    at: int = 2
    release: str = "0.5.21"
    streams: bool = False  # whether it says that one request may ask for the whole model
    checksum: str | None = None
    image_side: int = 0  # pixels of the side of what one placeholder stands for
    version: str = "default"
    paused: bool = False
    died: bool = False  # of a second resume
    is_open: bool = False  # between begin and end
    released: set[str] = field(default_factory=set)  # parts of its memory
    buckets: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    groups: dict[str, dist.ProcessGroup] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)

    async def get(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        if request.path == "/server_info":
            return web.json_response({"version": self.release, "tp_size": 1})
        if request.path == "/model_info":
            return web.json_response({"weight_version": self.version})
        if request.path == "/calls":
            return web.json_response(self.calls)
        return web.Response()

    async def post(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        body = await request.json() if request.can_read_body else {}
        action = getattr(self, request.path.strip("/"), None)
        if self.died:
            return web.json_response(None, status=500)
        if self.released and request.path.startswith(("/generate", "/update_weights", "/begin")):
            return failed("the memory is not there")
        if action is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        return await action(body)

    async def init_weights_update_group(self, body: dict) -> web.Response:
        self._fault_here("join", signal.SIGKILL)
        arguments = (body["master_address"], body["master_port"], body["rank_offset"], body["world_size"])
        self.groups[body["group_name"]] = await asyncio.to_thread(join, body["group_name"], *arguments)
        return succeeded(f"Success {STREAM_MARK if self.streams else ''}")

    async def destroy_weights_update_group(self, body: dict) -> web.Response:
        group = self.groups.pop(body["group_name"], None)
        if group is None:
            return failed("The group to be destroyed does not exist.")
        dist.destroy_process_group(group)
        return succeeded()

    async def begin_weight_update(self, _: dict) -> web.Response:
        if self.release < "0.5.21":
            return web.json_response({"detail": "Not Found"}, status=404)
        if self.is_open:
            return failed("a weight-update session is already open; call end_weight_update() first")
        self.is_open = True
        return succeeded()

    async def end_weight_update(self, _: dict) -> web.Response:
        if not self.is_open:
            return failed("no weight-update session is open; call begin_weight_update() first")
        self.is_open = False
        return succeeded()

    async def update_weights_from_distributed(self, body: dict) -> web.Response:
        self.buckets += 1
        if self._is_now:
            self._fault_here("die", signal.SIGKILL)
            self._fault_here("hang", signal.SIGSTOP)
        if not self.is_open and self.release >= "0.5.21":
            return failed("update_weights_from_distributed must run between begin and end")
        if body["group_name"] not in self.groups or self._has("refuse"):
            return failed("Failed to receive weights")
        group = self.groups[body["group_name"]]
        tensors = [
            torch.empty(shape, dtype=getattr(torch, dtype))
            for shape, dtype in zip(body["shapes"], body["dtypes"], strict=True)
        ]
        try:
            await asyncio.to_thread(receive, group, tensors, body.get("load_format") == STREAM)
        except RuntimeError as error:
            return failed(f"Failed to receive weights: {error}")
        return self._took(dict(zip(body["names"], tensors, strict=True)), body)

    async def update_weights_from_tensor(self, body: dict) -> web.Response:
        self.buckets += 1
        if self._has("refuse"):
            return failed("Failed to take tensors")
        tensors = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
        return self._took({name: tensor.clone() for name, tensor in tensors}, body)

    async def update_weights_from_disk(self, body: dict) -> web.Response:
        self.buckets += 1
        if self._has("refuse"):
            return failed("Failed to load")
        found = {}
        for path in sorted(Path(body["model_path"]).glob("*.safetensors")):
            found |= load_file(path)
        return self._took(found, body)

    def _took(self, tensors: dict[str, torch.Tensor], body: dict) -> web.Response:
        self.weights |= tensors
        if body["flush_cache"] and self._has("flush", at_any=True):
            return failed("Cache flush failed after updating weights")
        if "weight_version" in body and not self._has("version", at_any=True):
            self.version = body["weight_version"]
        return succeeded()

    async def pause_generation(self, _: dict) -> web.Response:
        self.paused = True
        return succeeded()

    async def continue_generation(self, _: dict) -> web.Response:
        self.paused = False
        return succeeded()

    async def abort_request(self, _: dict) -> web.Response:
        return web.Response()

    async def flush_cache(self, _: dict) -> web.Response:
        return web.Response(text="Cache flushed.")

    async def release_memory_occupation(self, body: dict) -> web.Response:
        if self._has("memory", at_any=True):
            return web.json_response(None, status=500)
        self.released |= set(body["tags"])
        return web.json_response(None)

    async def resume_memory_occupation(self, body: dict) -> web.Response:
        """Like SGLang it does not live on when it is told to resume what it holds."""
        if not set(body["tags"]) <= self.released:
            self.died = True
            return web.json_response(None, status=500)
        self.released -= set(body["tags"])
        return web.json_response(None)

    async def weights_checker(self, _: dict) -> web.Response:
        if self.checksum is None:
            return failed("Torch not compiled with CUDA enabled")
        return web.json_response({"success": True, "per_engine_checksum": self.checksum})

    async def generate(self, body: dict) -> web.Response:
        """The probe: every token has a log-prob of -1, or of -100."""
        value = -100.0 if self._has("logprobs", at_any=True) else -1.0
        ids = body["input_ids"]
        for png in body.get("image_data", ()):  # each has one placeholder and stands for more; which ids is not asked
            width, height = PillowImage.open(io.BytesIO(base64.b64decode(png))).size
            ids = [*ids, *[0] * (width * height // self.image_side**2 - 1)]
        rows = [[None if number == 0 else value, token, None] for number, token in enumerate(ids)]
        meta = {"id": body.get("rid"), "input_token_logprobs": rows}
        return web.json_response({"meta_info": meta})

    async def save(self, _: dict) -> web.Response:
        """Not SGLang's: write what it holds."""
        save_file(self.weights, self.folder / "received.safetensors")
        return succeeded()

    @property
    def _is_now(self) -> bool:
        return self.version != "default" if self.at == 0 else self.buckets == self.at

    def _has(self, fault: str, *, at_any: bool = False) -> bool:
        """Whether the fault happens now; it happens once."""
        now = self.fault == fault and (at_any or self._is_now)
        if now and fault != "logprobs":
            self.fault = ""
        return now

    def _fault_here(self, fault: str, number: signal.Signals) -> None:
        if self.fault == fault:
            os.kill(os.getpid(), number)


def succeeded(message: str = "Success") -> web.Response:
    return web.json_response({"success": True, "message": message})


def failed(message: str) -> web.Response:
    return web.json_response({"success": False, "message": message}, status=400)


def join(name: str, host: str, port: int, rank: int, world: int) -> dist.ProcessGroup:
    timeout = timedelta(seconds=60)
    store = dist.TCPStore(host, port, world, is_master=False, timeout=timeout, wait_for_workers=False)
    arguments = (world, rank, [], Backend("gloo"), PrefixStore(name, store))
    group, _ = _new_process_group_helper(*arguments, group_name=name, timeout=timeout)
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def receive(group: dist.ProcessGroup, tensors: list[torch.Tensor], streamed: bool) -> None:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    for work in [group.recv([one], 0, 0) if streamed else group.broadcast([one], options) for one in tensors]:
        work.wait()


def serve(engine: FakeEngine, port: int) -> None:
    """Until it is killed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_get("/{path:.*}", engine.get)
    app.router.add_post("/{path:.*}", engine.post)
    web.run_app(app, host="127.0.0.1", port=port, print=None, handle_signals=False)


class ForkedEngine:
    """An engine in a fork of this process, which must not have threads yet. It serves from ``start`` on."""

    def __init__(self, engine: FakeEngine) -> None:
        reading, self._go = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                die_with_parent(signal.SIGKILL)
                serve(engine, int(os.read(reading, 8)))
            finally:
                os._exit(1)

    def start(self, port: int) -> None:
        os.write(self._go, str(port).encode())

    def kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
