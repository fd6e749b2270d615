"""The parts of docs/ that are made from the code, so that they cannot be out of date."""

from __future__ import annotations

from pathlib import Path

from megatron_opd.observe.metrics import metrics_table
from megatron_opd.observe.reference import config_tables, evaluation_table

BEGIN, END = "<!-- made by tools/make_docs.py: begin -->", "<!-- made by tools/make_docs.py: end -->"
CONFIGURATION = """# Configuration

Every key of a run's config, made from the schema (`megatron_opd/config/`) by `tools/make_docs.py`;
`megatron-opd config` prints the same. A YAML file holds what differs from the defaults, and any key can be changed on
the command line:

    megatron-opd train conf/toy.yaml steps=20 optimizer.lr=1e-4 calibration=null

`<name>` stands for a domain. A section of type `... | null` is off while it is null, and on as soon as one of its keys
is given. `(required)`: there is no default.

"""


def generated(docs: Path) -> dict[Path, str]:
    """What each of these files in ``docs`` must hold; text outside the marks stays."""
    tables = {docs / "operations.md": metrics_table(), docs / "evaluation.md": evaluation_table()}
    whole = {docs / "configuration.md": CONFIGURATION + config_tables() + "\n"}
    return whole | {path: _between_marks(path.read_text(), table) for path, table in tables.items()}


def _between_marks(text: str, table: str) -> str:
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{table}\n\n{END}{tail}"
