"""A packed batch as bytes: safetensors, with the three single values in its header. Nothing in it can run code."""

from __future__ import annotations

import json
import struct
from dataclasses import fields

import numpy as np
from safetensors.numpy import load, save

from megatron_opd.records import PackedBatch

_SINGLE = ("version", "last", "paused", "denominator")
_ARRAYS = tuple(field.name for field in fields(PackedBatch) if field.name not in _SINGLE)


def encode(batch: PackedBatch) -> bytes:
    """The batch's arrays as safetensors; what is single as metadata, exact."""
    metadata = {
        "version": str(batch.version),
        "last": str(int(batch.last)),
        "paused": str(int(batch.paused)),
        "denominator": float(batch.denominator).hex(),
    }
    return save({name: np.ascontiguousarray(getattr(batch, name)) for name in _ARRAYS}, metadata)


def decode(body: bytes) -> PackedBatch:
    """The inverse of ``encode``. Raises ValueError or safetensors' error on anything else."""
    (header_length,) = struct.unpack("<Q", body[:8])
    metadata = json.loads(body[8 : 8 + header_length])["__metadata__"]
    arrays = load(body)
    if set(arrays) != set(_ARRAYS):
        raise ValueError(f"a batch has {sorted(arrays)} instead of {sorted(_ARRAYS)}")
    return PackedBatch(
        version=int(metadata["version"]),
        last=bool(int(metadata["last"])),
        paused=bool(int(metadata["paused"])),
        denominator=float.fromhex(metadata["denominator"]),
        **arrays,
    )
