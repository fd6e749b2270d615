"""Images of a record, as ``{"path": "charts/1.png"}`` or ``{"base64": "iVBOR..."}``. None is opened here."""

from __future__ import annotations

import base64
from pathlib import Path

from megatron_opd.data.rows import Flaw, show
from megatron_opd.prepare.drafts import look_up

FORMS = "a path, bytes, base64, or an object with bytes or path"
LONGEST_PATH = 250  # a longer text is base64: the smallest image has more


def images_of(record: dict, name: str, folder: Path) -> list[dict[str, str]]:
    """All images of a field that holds one or a list. Relative paths are of ``folder``. Raises Flaw."""
    value = look_up(record, name)
    images = value if isinstance(value, list) else [value]
    if not images:
        raise Flaw(name, "no images", "at least one", "remove the record")
    return [_reference(name, image, folder) for image in images]


def _reference(name: str, image: object, folder: Path) -> dict[str, str]:
    if isinstance(image, dict):  # as Hugging Face stores them: the path is only a name where there are bytes
        given = [image.get(key) for key in ("bytes", "base64", "path")]
        image = next((value for value in given if value), image)
    if isinstance(image, bytes) and image:
        return {"base64": base64.b64encode(image).decode()}
    if isinstance(image, str) and image.startswith("data:image/") and ";base64," in image:
        return {"base64": image.split(";base64,", 1)[1]}
    if not isinstance(image, str) or not image.strip():
        raise Flaw(name, show(image), FORMS, "repair or remove the record")
    if len(image) > LONGEST_PATH:
        if _is_base64(image):
            return {"base64": image}
        raise Flaw(name, show(image), FORMS, "repair or remove the record")
    path = folder / image
    if not path.is_file():
        raise Flaw(name, f"no file {path}", "the path of an image", "give the images' folder with --set images=FOLDER")
    return {"path": str(path.absolute())}


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode(text, validate=True)
    except ValueError:
        return False
    return True
