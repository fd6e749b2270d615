"""What travels with a row of a multimodal model through Megatron, to every layer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_opd.student.vision.images import ImageReader, Size
from megatron_opd.student.vision.placing import RowImages, place
from megatron_opd.student.vision.positions import image_positions


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """``placing.Places`` on the device, and who reads the pixels."""

    reader: ImageReader
    hashes: tuple[str, ...]  # [U]
    sizes: list[Size]  # [U]
    tokens: torch.Tensor  # [N] int64
    features: torch.Tensor  # [N] int64


@dataclass
class VisionPacking(PackedSeqParams):
    """Bounds of the sequences, and positions that are not counted from them."""

    positions: torch.Tensor | None = None  # [3, T] int64, time, height and width of this context-parallel rank's tokens
    images: Placed | None = None  # None on pipeline stages that need no pixels, and where no token is an image's
    rotary: tuple[torch.Tensor, torch.Tensor] | None = None  # cosine and sine [T, 1, D]; the model fills this in
    levels: tuple[torch.Tensor, ...] = ()  # [F, H] each, added after the first layers; the model fills this in


def seeing_packing(
    packing: PackedSeqParams,
    reader: ImageReader,
    config: TransformerConfig,
    images: RowImages,
    bounds: np.ndarray,
    origins: np.ndarray,
) -> VisionPacking:
    """``packing`` of a row, with its images and positions as far as this rank needs them.

    bounds [S + 1]: where the row's sequences start and end, before it was lengthened; origins [T]: this
    context-parallel rank's positions in it, -1 where it was lengthened.
    """
    device, length = packing.cu_seqlens_q.device, int(bounds[-1])
    known = {field.name: getattr(packing, field.name) for field in dataclasses.fields(packing)}
    # What lengthens a row sees nothing that counts: its positions do not matter.
    positions = image_positions(bounds, images.starts, images.sizes)[:, origins]
    packed = VisionPacking(**known, positions=torch.from_numpy(positions).to(device))
    if not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        return packed
    if config.sequence_parallel:  # the embedding has left each tensor-parallel rank a part
        ranks, rank = config.tensor_model_parallel_size, parallel_state.get_tensor_model_parallel_rank()
        origins = np.split(origins, ranks)[rank]
    places = place(images, origins, length)
    if places.hashes:
        packed.images = Placed(
            reader,
            places.hashes,
            [(rows, columns) for rows, columns in places.sizes.tolist()],
            torch.from_numpy(places.tokens).to(device),
            torch.from_numpy(places.features).to(device),
        )
    return packed
