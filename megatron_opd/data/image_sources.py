"""Images as records of prompt files hold them: a path, bytes, base64, or an object with one of these."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from megatron_opd.data.rows import MISSING, Flaw, show, type_name

FORMS = "a path, bytes, base64, or an object with bytes, base64 or path"
REPAIR = "repair or remove the record"
LONGEST_PATH = 250  # a longer text is base64; base64 that is no longer must say so, by an object or a data: address

Source = bytes | Path
"""An image that nobody has opened: the bytes of its file, or where that is."""


def image_sources(name: str, value: object, folder: Path) -> list[Source]:
    """The images of a field that holds one, a list, or none. Relative paths are of ``folder``. Raises Flaw."""
    if value is MISSING or value is None:
        return []
    return [_source(name, image, folder) for image in (value if isinstance(value, list) else [value])]


def _source(name: str, image: object, folder: Path) -> Source:
    if isinstance(image, dict):  # as Hugging Face stores them: the path is only a name where there are bytes
        if isinstance(image.get("base64"), str) and not image.get("bytes"):
            return _decoded(name, image["base64"])
        image = image.get("bytes") or image.get("path") or image
    if isinstance(image, bytes) and image:
        return image
    if not isinstance(image, str) or not image.strip():
        raise Flaw(name, type_name(image) if isinstance(image, dict) else show(image), FORMS, REPAIR)
    if image.startswith("data:"):
        return _decoded(name, image.partition(";base64,")[2])
    if "://" in image[:LONGEST_PATH]:
        raise Flaw(name, show(image), FORMS, "download the image first: nothing is fetched while a run goes on")
    if len(image) > LONGEST_PATH:
        return _decoded(name, image)
    path = folder / image
    if not path.is_file():
        fix = "repair the path; prepare takes the images' folder by --set images=FOLDER"
        raise Flaw(name, f"no file {path}", "the path of an image, absolute or from the data's folder", fix)
    return path


def _decoded(name: str, text: str) -> bytes:
    try:
        found = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Flaw(name, f"{show(text)} ({error})", FORMS, REPAIR) from error
    if not found:
        raise Flaw(name, "no bytes", FORMS, REPAIR)
    return found
