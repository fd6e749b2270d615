"""``megatron-opd difficulty``: sample every training prompt, keep the pass rates, and weigh the prompt file.

samples.jsonl        a line for each finished prompt; the run goes on from it
pass_rates.parquet   when all are finished
weighted.jsonl       the prompt file with repeats and pass_rate
histogram.png        prompts and appearances by number of passes
summary.json         the same numbers
logs/rollout.log     of the engine, where the run started one; rollout-0.log, ... of several
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import Config
from megatron_opd.data.inputs import read_training
from megatron_opd.data.pass_rates import PassRates, read_pass_rates, write_pass_rates
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.difficulty.console import DifficultyConsole
from megatron_opd.difficulty.identity import settings_of
from megatron_opd.difficulty.picture import draw_histograms
from megatron_opd.difficulty.weighing import DomainWeights, weigh
from megatron_opd.difficulty.weighted import REPEATS, check_convertible, write_weighted
from megatron_opd.engines.command import check_engine_python
from megatron_opd.errors import raise_together
from megatron_opd.records import Prompt
from megatron_opd.runtime.supervision import signals_raise
from megatron_opd.sampling.ask import Draw, Job, sample_missing
from megatron_opd.sampling.identity import file_digest, model_digest
from megatron_opd.sampling.journal import Journal
from megatron_opd.train.preflight import attempt, check_context, check_model, longest_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Folder:
    """Where the results are."""

    path: Path

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def pass_rates(self) -> Path:
        return self.path / "pass_rates.parquet"

    @property
    def weighted(self) -> Path:
        return self.path / "weighted.jsonl"

    @property
    def picture(self) -> Path:
        return self.path / "histogram.png"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"


def estimate(config: Config, arguments: Sequence[str], console: DifficultyConsole) -> None:
    """Do what is still to be done in the folder, and show the result. However it ends, no process is left.

    arguments: the command line of ``config``, for the next command. Raises OpdError or StoppedBySignal; what was
    sampled until then is kept.
    """
    console.checking()
    folder = Folder(config.difficulty.output or config.output / f"{config.name}.difficulty")
    with signals_raise():
        tokenizer, prompts = _check(config)
        rates = _sampled(config, folder, tokenizer, prompts, console)
    with signals_raise():  # the clean-up of sampling ends with signals that nobody hears
        rows = _weigh(config, folder, rates)
    console.weighed(rows)
    files = {"pass rates": folder.pass_rates, "prompts": folder.weighted, "picture": folder.picture}
    console.result(list(files.items()), _next_command(arguments, folder))


def _check(config: Config) -> tuple[PreTrainedTokenizerBase, list[Prompt]]:
    """What the run needs. Raises OpdError: the one mistake, or a list of all."""
    found = [] if config.rollout.server.urls else attempt(lambda: check_engine_python(config.engine))
    missing = attempt(lambda: check_model("student.model", config.student.model))
    if missing:
        raise_together(found + missing)  # what follows reads the model
    found += attempt(lambda: check_context("student.model", config.student.model, longest_of(config)))
    inputs: list = []
    unread = attempt(lambda: inputs.extend(_inputs(config)))
    found += unread or attempt(lambda: check_convertible(config.data.train))
    raise_together(found)
    tokenizer, prompts = inputs
    return tokenizer, prompts


def _inputs(config: Config) -> tuple[PreTrainedTokenizerBase, list[Prompt]]:
    tokenizer = load_tokenizer(config.student.model)
    return tokenizer, read_training(config, tokenizer)


def _sampled(
    config: Config,
    folder: Folder,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    console: DifficultyConsole,
) -> PassRates:
    """Pass rates of all prompts, from samples of this run and of earlier ones in the same folder."""
    settings = settings_of(config, {prompt.domain for prompt in prompts})
    identity = {
        "student.model": f"sha256 {model_digest(config.student.model)}",
        "data.train": f"sha256 {file_digest(config.data.train)}",
        **settings,
    }
    model, ids = str(config.student.model), [prompt.id for prompt in prompts]
    samples = dict.fromkeys(ids, config.difficulty.samples)
    with Journal.open(folder.samples, model, identity, samples, "difficulty.output") as journal:
        console.banner(config, folder.path, len(journal.done), len(prompts))
        sample_missing(_job(config, folder), prompts, tokenizer, journal, console)
        rows = [journal.done[name] for name in ids]
        console.judged(rows)
        write_pass_rates(
            folder.pass_rates,
            ids,
            [prompt.domain for prompt in prompts],
            [len(row.outcomes) for row in rows],
            [row.graded for row in rows],
            [row.passes for row in rows],
            journal.model,
            identity | {"weights": journal.weights},
        )
        return read_pass_rates(folder.pass_rates)


def _job(config: Config, folder: Folder) -> Job:
    options = config.difficulty
    draw = Draw(options.samples, config.rollout.max_new_tokens, options.temperature, options.top_p, options.top_k)
    return Job(
        model=config.student.model,
        shown=str(config.student.model),
        engine=config.engine,
        server=config.rollout.server,
        server_key="rollout.server",
        logs=folder.path / "logs",
        images=config.images_folder,
        verifiers=config.verifiers,
        draws=dict.fromkeys(config.teachers, draw),
        attempts=config.scoring.attempts,
        concurrency=options.concurrency,
        seed=config.seed,
    )


def _weigh(config: Config, folder: Folder, rates: PassRates) -> list[DomainWeights]:
    """Make the weighted prompt file, the picture and the summary from the pass rates."""
    repeats, rows = weigh(rates, config.difficulty, config.seed)
    shares = [
        int(passes) / int(graded) if graded else None for passes, graded in zip(rates.passes, rates.graded, strict=True)
    ]
    write_weighted(config.data.train, folder.weighted, repeats.tolist(), shares)
    cap = config.difficulty.max_repeats
    draw_histograms(folder.picture, rows, f"{config.student.model} on {config.data.train}, at most {cap} repeats")
    summary = {
        "model": rates.model,
        "settings": rates.settings,
        "level": config.difficulty.level,
        "max_repeats": config.difficulty.max_repeats,
        "domains": {row.domain: _summary(row) for row in rows},
    }
    temporary = folder.summary.with_name(f"{folder.summary.name}.tmp")
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    temporary.rename(folder.summary)
    return rows


def _summary(row: DomainWeights) -> dict[str, object]:
    return {
        "shape": row.shape,
        "raised": list(row.raised),
        "histogram": row.counts.tolist(),
        "target": row.target.tolist(),
        "appearances": row.appearances.tolist(),
        "left_alone": row.left_alone,
        "passes": row.passes,
        "graded": row.graded,
    }


def _next_command(arguments: Sequence[str], folder: Folder) -> str:
    replaced = ("difficulty.", "data.train=", "data.columns.repeats=")
    kept = [item for item in arguments if not item.startswith(replaced)]
    weighted = [f"data.train={folder.weighted}", f"data.columns.repeats={REPEATS}"]
    return shlex.join(["megatron-opd", "train", *kept, *weighted])
