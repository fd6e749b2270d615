"""``megatron-opd eval``: sample every problem, judge the responses, and say how good the model is.

samples.jsonl      the journal: a line for each finished problem; the evaluation goes on from it
problems.parquet   when all are finished: outcomes and lengths of each problem (``results``)
summary.json       the numbers of each benchmark
logs/rollout.log   of the engine, where the evaluation started one
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import EvaluationConfig
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.engines.command import check_engine_python
from megatron_opd.errors import ConfigError, raise_together
from megatron_opd.evaluation.benchmarks import read_benchmark
from megatron_opd.evaluation.console import EvaluationConsole
from megatron_opd.evaluation.model import Model, find_model
from megatron_opd.evaluation.results import FILE, Evaluation, Problem, Scores, by_benchmark, score, write_problems
from megatron_opd.records import Prompt
from megatron_opd.runtime.rundir import free_name_beside
from megatron_opd.runtime.supervision import signals_raise
from megatron_opd.sampling.ask import Draw, Job, sample_missing
from megatron_opd.sampling.identity import file_digest
from megatron_opd.sampling.journal import Journal
from megatron_opd.train.preflight import attempt, check_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def evaluate(given: Path, config: EvaluationConfig, console: EvaluationConsole) -> dict[str, Scores]:
    """Do what is still to be done in the folder, and show the result. However it ends, no process is left.

    Raises OpdError or StoppedBySignal; what was sampled until then is kept.
    """
    console.checking()
    folder = config.output or Path("runs/eval") / "-".join(given.resolve().parts[-2:]).strip("/")
    with signals_raise():
        model, tokenizer, prompts = _check(given, config)
        _make_way(folder, config)
        found = _sampled(config, folder, model, tokenizer, prompts, console)
    with signals_raise():  # the clean-up of sampling ends with signals that nobody hears
        scores = {
            name: score(problems, config.pass_at, config.seed)
            for name, problems in by_benchmark(found.problems).items()
        }
        write_problems(folder / FILE, found)
        _write_summary(folder / "summary.json", found, scores)
    console.scores(scores)
    console.files([folder / FILE, folder / "summary.json"])
    return scores


def _check(given: Path, config: EvaluationConfig) -> tuple[Model, PreTrainedTokenizerBase, list[Prompt]]:
    """What the evaluation needs. Raises OpdError: the one mistake, or a list of all."""
    found = [] if config.server.urls else attempt(lambda: check_engine_python(config.engine))
    models: list[Model] = []
    missing = attempt(lambda: models.append(find_model(given, config.source)))
    if missing:
        raise_together(found + missing)  # what follows reads the model
    folder = models[0].folder
    for name, benchmark in config.benchmarks.items():
        longest = {
            "max_prompt_tokens": config.max_prompt_tokens,
            f"benchmarks.{name}.max_new_tokens": benchmark.max_new_tokens,
        }
        found += attempt(lambda sizes=longest: check_context(str(given), folder, sizes))
    tokenizers: list[PreTrainedTokenizerBase] = []
    prompts: list[Prompt] = []
    found += attempt(lambda: tokenizers.append(load_tokenizer(folder)))
    for name in config.benchmarks if tokenizers else ():
        found += attempt(lambda n=name: prompts.extend(read_benchmark(config, n, tokenizers[0], folder)))
    raise_together(found)
    return models[0], tokenizers[0], prompts


def _make_way(folder: Path, config: EvaluationConfig) -> None:
    """Do what ``existing`` says of a folder that is there."""
    if not folder.exists() or config.existing == "resume":
        return
    if config.existing == "refuse":
        raise ConfigError(
            "The folder of the evaluation exists already",
            where=folder.absolute(),
            fix="choose another with output=..., existing=archive to move it aside, or existing=resume to go on",
        )
    folder.rename(free_name_beside(folder))


def _sampled(
    config: EvaluationConfig,
    folder: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    console: EvaluationConsole,
) -> Evaluation:
    """All problems with their responses, those of earlier starts in the same folder included."""
    settings = _settings(config)
    samples = {prompt.id: config.benchmarks[prompt.domain].samples for prompt in prompts}
    identity = {"model": model.digest(), **settings}
    with Journal.open(folder / "samples.jsonl", str(model.given), identity, samples, "output") as journal:
        counts = {name: sum(prompt.domain == name for prompt in prompts) for name in config.benchmarks}
        console.banner(config, model.given, folder, len(journal.done), counts)
        if len(journal.done) < len(prompts):
            _sample(config, folder, model, tokenizer, prompts, journal, console)
        rows = [journal.done[prompt.id] for prompt in prompts]
        console.judged(rows)
        problems = [
            Problem(
                benchmark=prompt.domain,
                id=prompt.id,
                problem=hashlib.sha256(f"{prompt.text}\0{prompt.answer}".encode()).hexdigest()[:16],
                outcomes=row.outcomes,
                lengths=row.lengths,
                cut=[bool(cut) for cut in row.cut],
                texts=row.texts or None,
            )
            for prompt, row in zip(prompts, rows, strict=True)
        ]
        return Evaluation(problems, journal.model, settings | {"weights": journal.weights})


def _sample(
    config: EvaluationConfig,
    folder: Path,
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    journal: Journal,
    console: EvaluationConsole,
) -> None:
    if config.server.urls:  # the weights are there already
        sample_missing(_job(config, folder, model, model.folder), prompts, tokenizer, journal, console)
        return
    with model.servable(folder / "model_hf") as weights:
        sample_missing(_job(config, folder, model, weights), prompts, tokenizer, journal, console)


def _job(config: EvaluationConfig, folder: Path, model: Model, weights: Path) -> Job:
    return Job(
        model=weights,
        shown=str(model.given),
        engine=config.engine,
        server=config.server,
        server_key="server",
        logs=folder / "logs",
        images=config.images_folder,
        verifiers=config.judging,
        draws={
            name: Draw(one.samples, one.max_new_tokens, one.temperature, one.top_p, one.top_k)
            for name, one in config.benchmarks.items()
        },
        attempts=config.attempts,
        concurrency=config.concurrency,
        seed=config.seed,
        keep_texts=config.keep_texts,
    )


def _settings(config: EvaluationConfig) -> dict[str, object]:
    """What decides how responses are drawn and judged, by key; a file counts by its content."""
    settings: dict[str, object] = {"limit": config.limit, "keep_texts": config.keep_texts}
    for name, benchmark in config.benchmarks.items():
        plain = benchmark.model_dump(mode="json") | {"file": f"sha256 {file_digest(benchmark.file)}"}
        settings |= {f"benchmarks.{name}.{key}": value for key, value in plain.items()}
    verifiers = config.verifiers.model_dump(mode="json", exclude={"kinds", "workers"})
    settings |= {f"verifiers.{key}": value for key, value in verifiers.items()}
    seed = config.seed if config.engine.deterministic else None  # servers do not heed it otherwise
    return settings | {"engine.dtype": config.engine.dtype, "seed": seed}


def _write_summary(path: Path, found: Evaluation, scores: dict[str, Scores]) -> None:
    """The numbers as JSON; it appears in one rename."""
    plain = {
        "model": found.model,
        "benchmarks": {name: asdict(one) for name, one in scores.items()},
        "settings": found.settings,
    }
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(json.dumps(plain, indent=2) + "\n")
    temporary.rename(path)
