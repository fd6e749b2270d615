"""Megatron's distributed checkpoints, written by a thread.

Megatron's own strategy hands the files to forked processes and keeps a server process for their results. This one plans
and completes a save as Megatron does, and leaves the writing to torch's writer, in whatever thread runs it.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult


class ThreadedSave(TorchDistSaveShardedStrategy):
    """For ``dist_checkpointing.save(..., async_sharded_save=True)``, which all ranks call.

    The request that it returns has copies of the tensors, so training may go on. ``async_fn()`` writes this rank's part
    and returns the paths of the files; it touches nothing but these. When it is done on all ranks, they call the
    ``finalize_fns`` together.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def async_save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> AsyncRequest:
        """Plan with all ranks, and copy."""
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        writer = _Writer(checkpoint_dir)
        planned, *_ = save_state_dict_async_plan(mcore_to_pyt_state_dict(state, False), writer, planner=planner)
        return AsyncRequest(writer.write, (), [lambda: save_state_dict_async_finalize(*planned)])


class _Writer(FileSystemWriter):
    """One file for each rank that has anything to write. Names not of torch's base class are those Megatron calls."""

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Copy what this rank is to write."""
        self._plan, self._copies, self._results = plan, _Copies(plan, planner), []

    def write(self) -> list[Path]:
        """Write the copies; returns the files."""
        if self._plan.items:
            self._results = self.write_data(self._plan, self._copies).wait()
        return sorted({Path(self.path) / result.storage_data.relative_path for result in self._results})

    def retrieve_write_results(self) -> list[WriteResult]:
        """For the checkpoint's index: what lies where."""
        return self._results


class _Copies(DefaultSavePlanner):
    """Answers with copies in main memory."""

    def __init__(self, plan: SavePlan, planner: SavePlanner) -> None:
        super().__init__()
        self._data = {item.index: _copy(planner.resolve_data(item)) for item in plan.items}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The copy of one item."""
        return self._data[write_item.index]


def _copy(data: Any) -> Any:
    # What is not a tensor was made into bytes for this save.
    return data.detach().to("cpu", copy=True) if isinstance(data, torch.Tensor) else data
