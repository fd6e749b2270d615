"""Rollout engines that lost their weights: one that is started again has those of the model's folder.

Such an engine must not serve. Its pool leaves it out until it has the live version (``holds``), which the next refresh
gives to every engine that answers. When no engine is left, that refresh would never come: then the trainer is asked to
send the present weights once more (``keep_supplied``).
"""

from __future__ import annotations

import asyncio
import logging

from megatron_opd.coordinator.app import BatchBoard
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.observe.recorder import Recorder
from megatron_opd.runtime.replicas import ReplicaPool

logger = logging.getLogger(__name__)
LOOK_S = 1.0  # between two looks at the engines


async def holds(client: SGLangClient, board: BatchBoard) -> None:
    """Raise EngineError unless the engine takes requests and has the weights that are live."""
    await client.check_ready()
    found, live = await client.weight_version(), str(board.expected - 1)
    if found != live:
        what = "A rollout engine has other weights than those that are live"
        raise EngineError(what, kind="weights", where=client.url, got=found, expected=live)


async def keep_supplied(pool: ReplicaPool[SGLangClient], board: BatchBoard, recorder: Recorder) -> None:
    """Have the weights sent again whenever no engine serves and one that answers has lost them. Never returns."""
    while True:
        await asyncio.sleep(LOOK_S)
        lost = [] if pool.any_in_rotation else [client.url for client in pool.clients if await _lost(client, board)]
        if not lost:
            continue
        logger.warning("no rollout engine has weights %d: the student is to send them again", board.expected - 1)
        report = await board.send_again()
        if report is not None:
            pool.follow(report.out)
            recorder.event("weights_sent_again", version=report.version, live=report.live, reasons=report.out)


async def _lost(client: SGLangClient, board: BatchBoard) -> bool:
    """Whether the engine answers, but not with the live weights."""
    try:
        await holds(client, board)
    except EngineError as error:
        return error.kind == "weights"
    return False
