"""What a multimodal checkpoint's files say of images. None of its weights is needed, nor torch.

Several parts must agree on it: how large an image is made, how many placeholder tokens stand for it, and which they
are. So all of them read it here.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.errors import ModelError

PROCESSOR = "preprocessor_config.json"


@dataclass(frozen=True, slots=True)
class Vision:
    """Images as one model reads them. In a prompt: start token, placeholder tokens row after row, end token."""

    image_token: int  # stands for merge_size * merge_size patches
    start_token: int
    end_token: int
    patch_size: int  # pixels of a patch's side
    merge_size: int  # patches of a placeholder's side
    temporal_size: int  # frames of a patch; an image is as many equal frames
    min_pixels: int  # a smaller image is enlarged
    max_pixels: int  # a larger image is shrunk
    mean: tuple[float, float, float]  # subtracted from red, green and blue in 0..1
    std: tuple[float, float, float]  # divided by afterwards
    video_token: int | None = None  # stands for a part of a video; None: the model reads none

    @property
    def placeholders(self) -> frozenset[int]:
        """Ids that a server takes for the place of an image or a video, wherever they are."""
        return frozenset(token for token in (self.image_token, self.video_token) if token is not None)

    @property
    def token_pixels(self) -> int:
        """Pixels of the side of what one placeholder token stands for."""
        return self.patch_size * self.merge_size


def read_vision(folder: Path) -> Vision | None:
    """How the model of a Hugging Face folder reads images; None for one that reads none. Raises ModelError."""
    config = _read(folder / "config.json")
    tower = config.get("vision_config")
    if not isinstance(tower, dict):
        return None
    processor = _read(folder / PROCESSOR)
    size = processor.get("size") or {}
    try:
        return Vision(
            image_token=config["image_token_id"],
            start_token=config["vision_start_token_id"],
            end_token=config["vision_end_token_id"],
            patch_size=tower["patch_size"],
            merge_size=tower["spatial_merge_size"],
            temporal_size=tower.get("temporal_patch_size", 2),
            min_pixels=size.get("shortest_edge") or processor["min_pixels"],
            max_pixels=size.get("longest_edge") or processor["max_pixels"],
            mean=tuple(processor["image_mean"]),
            std=tuple(processor["image_std"]),
            video_token=config.get("video_token_id"),
        )
    except KeyError as error:
        raise ModelError(
            "The model's files do not say how it reads images",
            where=f"{folder / 'config.json'}, {folder / PROCESSOR}",
            got=f"no {error}",
            fix="take the whole folder of a Qwen2.5-VL or Qwen3-VL checkpoint",
        ) from error


def has_vision(folder: Path) -> bool:
    """Whether the model of a folder reads images; False where there is no readable folder."""
    try:
        return isinstance(_read(folder / "config.json").get("vision_config"), dict)
    except ModelError:
        return False


def text_config(config: dict) -> dict:
    """The part of a parsed config.json that describes the language model: all of it for a text model."""
    return config.get("text_config") or config


def _read(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError("A file of the model cannot be read", where=path.absolute(), got=error) from error
    if not isinstance(found, dict):
        raise ModelError("A file of the model is not a JSON object", where=path.absolute())
    return found


def image_file(folder: Path, digest: str) -> Path:
    """Where the resized image of this hash (``records.Image.hash``) is kept in a folder of images."""
    return folder / digest[:2] / f"{digest}.png"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name until it is complete: others may look for it at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
