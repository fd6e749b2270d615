"""Write the parts of docs/ that are made from the code: the configuration reference and the table of metrics."""

from __future__ import annotations

from pathlib import Path

from megatron_opd.observe.documents import generated

for path, text in generated(Path(__file__).resolve().parents[1] / "docs").items():
    path.write_text(text)
    print(path)
