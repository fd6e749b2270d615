"""``megatron-opd view``: how a run goes or went, as one page that opens offline.

It reads what the run has written, at any time: while it goes on, after it, or after it failed. Its size is bounded:
curves have a limited number of points, and a choice of rollouts is shown, not all.
"""

from __future__ import annotations

from pathlib import Path

from megatron_opd.audit.heatmap import TokenTexts
from megatron_opd.audit.pictures import Pictures
from megatron_opd.audit.read import trajectory_files
from megatron_opd.errors import ConfigError, DataError, ModelError
from megatron_opd.view.browse import Browser, browse
from megatron_opd.view.history import History, read_history
from megatron_opd.view.page import headline, render


def view(folder: Path, out: Path | None = None) -> list[str]:
    """Write ``view.html`` about the run in ``folder`` to ``out``, or into the run's folder; what a terminal shows.

    Raises DataError when there is no run, ConfigError when the page cannot be written.
    """
    history = read_history(folder)
    browser, reason = _rollouts(history)
    target = (folder if out is None else out) / "view.html"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(render(history, browser, reason), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "The page cannot be written", where=target.absolute(), got=error, fix="choose a folder with --out"
        ) from error
    lines = [headline(history), f"page      {target.absolute()}"]
    return lines + [f"error of {failure.role}: {failure.error}" for failure in history.failures]


def _rollouts(history: History) -> tuple[Browser | None, str]:
    """The rollouts that are shown, or why there are none: the rest of the page is there all the same."""
    run, pictures = history.run, Pictures(history.config.images_folder)
    try:
        return browse(trajectory_files(run.trajectories), TokenTexts.load(run.tokenizer), pictures), ""
    except (DataError, ModelError) as error:
        return None, str(error)
