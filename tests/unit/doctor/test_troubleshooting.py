"""The page of symptoms quotes errors as the package words them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
ROWS = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| ")]
QUOTES = sorted({quote for row in ROWS for quote in re.findall(r'"([^"]+)"', row)})
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "megatron_opd").rglob("*.py")))


@pytest.mark.parametrize("quote", QUOTES)
def test_every_quoted_error_is_one_of_ours(quote: str) -> None:
    worded = quote.replace("teachers.math", "{self.role}")
    assert worded in SOURCE, quote


def test_the_page_has_quotes_and_its_links_lead_somewhere() -> None:
    assert len(QUOTES) > 40
    for name in re.findall(r"\]\((\w+\.md)\)", PAGE):
        assert (ROOT / "docs" / name).is_file(), name
