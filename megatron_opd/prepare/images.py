"""Images of a record, as ``{"path": "charts/1.png"}`` or ``{"base64": "iVBOR..."}``. None is opened here."""

from __future__ import annotations

import base64
from pathlib import Path

from megatron_opd.data.image_sources import image_sources
from megatron_opd.data.rows import Flaw
from megatron_opd.prepare.drafts import look_up


def images_of(record: dict, name: str, folder: Path) -> list[dict[str, str]]:
    """All images of a field that holds one or a list. Relative paths are of ``folder``. Raises Flaw."""
    sources = image_sources(name, look_up(record, name), folder)
    if not sources:
        raise Flaw(name, "no images", "at least one", "remove the record")
    return [
        {"path": str(source.absolute())} if isinstance(source, Path) else {"base64": base64.b64encode(source).decode()}
        for source in sources
    ]
