"""Images of prompts in the pages of ``view`` and ``audit``."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import opened
from PIL import Image as Picture

from megatron_opd.audit.report import audit
from megatron_opd.config import Config, load_config
from megatron_opd.observe.trajectories import SCHEMA, read_trajectories
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.runtime.vision import image_file
from megatron_opd.view.report import view

HASHES = ["a" * 64, "b" * 64, "c" * 64]  # the last one's file is gone


@pytest.fixture(scope="module")
def run(told: Config, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A copy of the drawn run whose every prompt has images."""
    folder = tmp_path_factory.mktemp("with_images")
    shutil.copytree(told.run_dir, folder / "drawn")
    run = RunDirectory(folder / "drawn")
    config = load_config(run.config_file, [])
    output = str(config.output)
    run.config_file.write_text(run.config_file.read_text().replace(output, str(folder)))
    rows = [row | {"images": HASHES} for row in read_trajectories(run.trajectories).to_pylist()]
    shutil.rmtree(run.trajectories)
    run.trajectories.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), run.trajectories / "step_000001.parquet")
    rng = np.random.default_rng(0)
    for digest, size in zip(HASHES, [(96, 64), (704, 992)], strict=False):
        file = image_file(load_config(run.config_file, []).images_folder, digest)
        file.parent.mkdir(parents=True)
        Picture.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(file)
    return run


@pytest.mark.parametrize("page", ["view.html", "audit.html"])
async def test_a_browser_shows_the_images_of_a_prompt_beside_its_heat_map(
    run: RunDirectory, page: str, tmp_path: Path
) -> None:
    (view if page == "view.html" else audit)(run.path)
    async with opened(run.path / page, tmp_path / "profile") as tab:
        cards = await tab.ask("document.querySelectorAll('details.card').length")
        shown = "[...document.querySelectorAll('details.card .pictures img')]"
        assert await tab.ask(f"{shown}.length") == 2 * cards > 0
        assert await tab.ask(f"{shown}.every(e => e.naturalWidth > 0 && e.naturalWidth <= 360 && e.alt)")
        captions = "document.querySelector('details.card .pictures').innerText"
        text = await tab.ask(captions)
        assert "96 \u00d7 64" in text and "704 \u00d7 992" in text and "(cccccccccccc) is no longer" in text
        await tab.picture(tmp_path / f"{page}.png")
        await tab.open(run.path / page, 390, 844)
        assert await tab.ask("document.documentElement.scrollWidth") <= 390
        assert tab.complaints == []
    assert (run.path / page).stat().st_size < 12 << 20
