"""Log lines of our own processes; other packages keep their own levels."""

from __future__ import annotations

import logging


def start_logging() -> None:
    """Send this package's lines, with their time, to standard error, which the supervisor keeps in the role's log."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron_opd").setLevel(logging.INFO)
