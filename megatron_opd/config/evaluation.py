"""Options of ``megatron-opd eval``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_opd.config.base import PositiveInt, Section
from megatron_opd.config.sections import ColumnsConfig, ImagesConfig, VerifierConfig, VerifierKind
from megatron_opd.config.servers import EngineConfig, ServerConfig

PLACE = "{prompt}"  # in a template


class BenchmarkConfig(Section):
    """One file of problems, how they are asked and how the answers are judged."""

    file: Path
    """JSONL or parquet file of problems."""
    verifier: VerifierKind
    """How its responses are judged."""
    domain: str | None = None
    """Take only records whose column columns.domain says this; null takes all."""
    columns: ColumnsConfig = ColumnsConfig()
    """Column map of the file; repeats is not read."""
    template: str | None = None
    """Text of the question, with the record's in the place of {prompt}; null asks the record's alone."""
    samples: PositiveInt = 1
    """Responses for each problem: n."""
    max_new_tokens: PositiveInt = 16384
    """Most tokens of one response."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus that is sampled from."""
    top_k: PositiveInt | None = None
    """Most likely tokens that are sampled from; null takes all."""

    @model_validator(mode="after")
    def _fits(self) -> BenchmarkConfig:
        mistakes = list(self._mistakes())
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _mistakes(self) -> Iterator[str]:
        if self.template is not None and self.template.count(PLACE) != 1:
            yield f"template must hold {PLACE} once"
        if self.domain is not None and self.columns.domain is None:
            yield "domain needs columns.domain"
        if self.temperature == 0 and self.samples > 1:
            yield "temperature 0 gives one response only: set samples to 1"


class EvaluationConfig(Section):
    """One evaluation of a model (docs/evaluation.md)."""

    benchmarks: Annotated[dict[str, BenchmarkConfig], Field(min_length=1)]
    """Name to benchmark."""
    output: Path | None = None
    """Folder of the results; null: runs/eval/ and the last two parts of the model's path."""
    existing: Literal["refuse", "archive", "resume"] = "resume"
    """What to do with a folder that is there: refuse, move it aside under its time, or go on where it stopped."""
    limit: PositiveInt | None = None
    """Only the first so many problems of each benchmark; null takes all."""
    pass_at: list[PositiveInt] = [1, 2, 4, 8, 16, 32]
    """The k of pass@k; those above a benchmark's samples are left out for it."""
    keep_texts: bool = False
    """Whether the responses themselves are kept."""
    source: Path | None = None
    """Hugging Face folder with config and tokenizer of a Megatron checkpoint; null takes that of its run."""
    max_prompt_tokens: PositiveInt = 4096
    """Most tokens of a problem after template and chat template; a longer one is an error."""
    images: ImagesConfig = ImagesConfig()
    """Images of problems; only a multimodal model can be asked about any."""
    concurrency: PositiveInt = 64
    """Problems under way at once."""
    attempts: PositiveInt = 4
    """Tries for one request; they go to different servers where there are several."""
    seed: int = 0
    """Seed of intervals and tests, and of responses where engine.deterministic is on."""
    engine: EngineConfig = EngineConfig()
    server: ServerConfig = ServerConfig()
    """The engines that sample."""
    verifiers: VerifierConfig = VerifierConfig()
    """How outcomes are decided; which verifier is the benchmark's own affair."""

    @model_validator(mode="after")
    def _parts_fit(self) -> EvaluationConfig:
        mistakes = list(self._misfits())
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _misfits(self) -> Iterator[str]:
        for name, benchmark in self.benchmarks.items():
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9+._-]*", name):
                yield f"benchmarks.{name}: a name has letters, digits and + . _ - only"
            if benchmark.verifier == "judge" and self.verifiers.judge is None:
                yield f"benchmarks.{name}.verifier is judge: set verifiers.judge.url and verifiers.judge.model"
        if "kinds" in self.verifiers.model_fields_set:
            yield "verifiers.kinds is of training: set benchmarks.<name>.verifier"
        if self.server.engine != "sglang":
            yield "server.engine must be sglang, the only one that samples"

    @property
    def images_folder(self) -> Path:
        """Folder of resized images, which runs share."""
        return self.images.folder or Path("runs/.images")

    @property
    def judging(self) -> VerifierConfig:
        """The verifiers, each under its benchmark's name, which is the domain of its prompts."""
        kinds = {name: benchmark.verifier for name, benchmark in self.benchmarks.items()}
        return self.verifiers.model_copy(update={"kinds": kinds})
