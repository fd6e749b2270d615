"""The page and the verb: what is on the page, that no text of a model becomes markup, and how it looks to a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from audit_case import Drawn
from trajectories import DROP_REASON, MARKUP, run_config, write_run
from typer.testing import CliRunner

from megatron_opd.audit import report as reporting
from megatron_opd.audit.report import Report, audit
from megatron_opd.cli import app
from megatron_opd.observe.trajectories import SCHEMA, read_trajectories

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """All elements and all texts of a page; fails on elements that are not closed in turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def written(drawn: Drawn, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return audit(drawn.config.run_dir, tmp_path_factory.mktemp("out") / "deep")


@pytest.fixture(scope="module")
def page(written: Report) -> Page:
    return Page(written.page.read_text())


def hostile(drawn: Drawn, folder: Path) -> Path:
    """A run in which every text that a model, a data set or a server wrote is markup."""
    run = folder / "hostile"
    shutil.copytree(drawn.config.run_dir, run, ignore=shutil.ignore_patterns("trajectories"))
    (run / "trajectories").mkdir()
    rows = read_trajectories(drawn.files[0].parent).to_pylist()
    texts = {"prompt", "answer", "response", "reason", "prompt_id"}
    rows = [row | {name: f"</pre></i>{MARKUP}\x00\u202e{name}" for name in texts} for row in rows]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), run / "trajectories" / "step_000001.parquet")
    return run


def test_sections_come_in_order(page: Page) -> None:
    expected = ["facts", "findings", "steps", "returns", "difficulty", "violations", "lost"]
    assert [section["id"] for section in page.of("section")] == expected
    assert [link["href"] for link in page.of("a")] == [f"#{name}" for name in expected]
    assert len(page.of("svg")) == 8 + 2 * 3 + 2  # curves, returns of two domains, difficulty
    assert len(page.of("details")) == 12 and page.texts.count("Wrong, but preferred") == 12


def test_the_page_needs_nothing_else_and_runs_nothing(page: Page) -> None:
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.elements}
    policies = [meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("href", "#").startswith("#") and "src" not in attributes
    assert "url(" not in "".join(page.texts) and "@import" not in "".join(page.texts)


def test_no_text_becomes_markup(drawn: Drawn, tmp_path: Path) -> None:
    safe, evil = Page(audit(drawn.config.run_dir, tmp_path / "safe").page.read_text()), None
    text = audit(hostile(drawn, tmp_path), tmp_path / "evil").page.read_text()
    evil = Page(text)
    assert {tag for tag, _ in evil.elements} == {tag for tag, _ in safe.elements}
    assert "<script" not in text.lower() and "\x00" not in text and "\u202e" not in text
    shown = "".join(evil.texts)
    assert shown.count("<script>alert('owned')</script>") >= 12 * 2  # prompt and answer of each card, as text
    assert not [attributes for _, attributes in evil.elements if "onmouseover" in attributes]


def test_the_cards_show_what_was_recorded(drawn: Drawn, page: Page) -> None:
    worst = drawn.diagnosis.violations[0]
    shown = "".join(page.texts)
    assert f"1. wrong above right by {worst.size:#.3g} nats per token" in shown
    offset = drawn.rollouts.offset[worst.wrong]
    assert f"offset {offset:+.3f}".replace("-", "\N{MINUS SIGN}") in re.sub(r"\s+", " ", shown)
    assert DROP_REASON in shown and "the verifier took longer than 5 s" in shown


def test_the_same_numbers_are_in_the_json(drawn: Drawn, written: Report) -> None:
    found = json.loads(written.numbers.read_text())
    assert found["by_domain"]["math"]["order"]["auc"] == drawn.diagnosis.by_domain["math"].order.auc
    assert found["by_step_and_domain"]["1"].keys() == {"math", "code"}
    assert found["overall"]["topk_overlap"] is None
    assert len(found["violations"]) == 12 and found["findings"][0]["level"] in ("act", "look")
    first = found["violations"][0]
    table = pq.read_table(drawn.files[first["step"] - 1]).to_pylist()
    wrong, right = (table[first[side]["row"]] for side in ("wrong", "right"))
    assert wrong["mean_gap"] - right["mean_gap"] == pytest.approx(first["size"])
    assert (wrong["outcome"], right["outcome"]) == (0, 1) and wrong["prompt_id"] == first["prompt_id"]


def test_the_same_run_gives_the_same_bytes(drawn: Drawn, written: Report, tmp_path: Path) -> None:
    again = audit(drawn.config.run_dir, tmp_path)
    assert again.page.read_bytes() == written.page.read_bytes()
    assert again.numbers.read_bytes() == written.numbers.read_bytes()


def test_a_run_in_which_nothing_is_mixed_or_scored_has_a_page(tmp_path: Path) -> None:
    config = run_config(tmp_path, steps=1, rollout={"prompts_per_step": 4, "samples_per_prompt": 8}, balance=None)
    write_run(config)
    file = config.run_dir / "trajectories" / "step_000001.parquet"
    rows = [row for row in pq.read_table(file).to_pylist() if row["outcome"] == 1]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)
    shown = "".join(Page(audit(config.run_dir).page.read_text()).texts)
    assert "None: no mixed group has a wrong rollout above a right one, because no group is mixed." in shown.replace(
        "\n", " "
    )
    assert "n/a" in shown
    unscored = [row | {name: None for name in list(row)[14:]} | {"state": "balanced_out"} for row in rows]
    pq.write_table(pa.Table.from_pylist(unscored, schema=SCHEMA), file)
    found = json.loads(audit(config.run_dir).numbers.read_text())
    assert found["overall"]["gap"] is None and found["overall"]["kept_share"] == 0.0


def test_the_verb_writes_into_the_run_and_tells_where(drawn: Drawn, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn.config.run_dir, run)
    result = CliRunner().invoke(app, ["audit", str(run)])
    assert result.exit_code == 0, result.output
    assert str(run / "audit.html") in result.output and str(run / "audit.json") in result.output
    assert "look  math: " in result.output
    assert (run / "audit.html").stat().st_size > 100_000


@pytest.mark.parametrize(
    ("remove", "words"),
    [
        (".", "No such run folder"),
        ("config.yaml", "The folder is not that of a run"),
        ("trajectories", "record.trajectories_every"),
        ("tokenizer", "The run's tokenizer is missing"),
    ],
)
def test_the_verb_tells_what_is_missing(drawn: Drawn, tmp_path: Path, remove: str, words: str) -> None:
    run = tmp_path / "run"
    shutil.copytree(drawn.config.run_dir, run)
    gone = run / remove
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    result = CliRunner().invoke(app, ["audit", str(run)])
    assert result.exit_code == 1 and words in result.output, result.output
    assert "where:" in result.output and "fix:" in result.output


def test_the_verb_tells_when_it_cannot_write(drawn: Drawn, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    result = CliRunner().invoke(app, ["audit", str(drawn.config.run_dir), "--out", str(tmp_path / "taken")])
    assert result.exit_code == 1 and "The results cannot be written" in result.output


def test_tokens_are_fetched_for_the_worst_groups_only(
    drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    real = reporting.fetch

    def counting(files: list[Path], rollouts: object, chosen: list[int]) -> dict[int, dict]:
        asked.append(len(chosen))
        return real(files, rollouts, chosen)

    monkeypatch.setattr(reporting, "fetch", counting)
    audit(drawn.config.run_dir, tmp_path)
    assert asked == [2 * reporting.WORST]


@pytest.mark.parametrize("width", [1400, 800])
def test_a_browser_shows_the_page_without_a_complaint(written: Report, tmp_path: Path, width: int) -> None:
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    from PIL import Image

    picture = tmp_path / "page.png"
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--no-first-run", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"),
            *("--hide-scrollbars", f"--window-size={width},6000", f"--screenshot={picture}", written.page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert ":CONSOLE" not in done.stderr  # a script, a blocked request, a policy that was hit
    pixels = np.asarray(Image.open(picture).convert("RGB"))
    assert pixels.shape == (6000, width, 3)
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    assert len(colours) > 500
    for wanted in ((0x43, 0x56, 0xC9), (0xB8, 0x32, 0x7F), (0x1F, 0x8A, 0x55), (0xD9, 0x77, 0x2B)):
        assert (colours == wanted).all(axis=1).any(), f"no {wanted}: both domains, right and wrong are drawn"
    filled = (pixels != pixels[0, 0]).any(axis=2).mean(axis=1)
    assert (filled.reshape(-1, 500).max(axis=1) > 0.2).all()  # something in every part of the page
    assert (pixels[:, -8:] == pixels[0, -1]).all()  # nothing runs out of the page to the right
