"""The command line: verbs only. Each is a few lines that call the package; nothing heavy is imported for --help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_opd.errors import OpdError, system_error

if TYPE_CHECKING:
    from megatron_opd.observe.console import ProgressConsole

app = typer.Typer(
    name="megatron-opd",
    help="Large-scale on-policy distillation: one student, several frozen teachers, its own rollouts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Argument(help="YAML file, for example conf/toy.yaml", metavar="CONFIG")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to it, for example steps=2", metavar="KEY=VALUE")]

NewFolder = Annotated[Path, typer.Argument(help="Folder to write, which must not exist", metavar="OUT")]
Options = Annotated[
    list[str] | None, typer.Argument(help="Options, for example tensor_parallel=2", metavar="KEY=VALUE")
]


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    only_plan: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print places and commands, start nothing")
    ] = False,
) -> None:
    """Start every process of a run, here or on the nodes of a SLURM job, watch it, and stop it all at the end."""
    from megatron_opd.config import load_config
    from megatron_opd.observe.console import RunConsole
    from megatron_opd.train.supervisor import dry_run
    from megatron_opd.train.supervisor import train as run_training

    with RunConsole() as console, _told(console):
        settings = load_config(config, overrides or [])
        if only_plan:
            typer.echo("\n".join(dry_run(settings)))
            return
        summary = run_training(settings, console)
        if summary is None:
            console.paused(settings.run_dir)
        else:
            console.result(summary, settings.run_dir)


@app.command()
def difficulty(config: ConfigFile, overrides: Overrides = None) -> None:
    """Measure how often the student solves each training prompt, and write a prompt file that repeats them by it."""
    from megatron_opd.config import load_config
    from megatron_opd.difficulty.command import estimate
    from megatron_opd.difficulty.console import DifficultyConsole

    with DifficultyConsole() as console, _told(console):
        estimate(load_config(config, overrides or []), [str(config), *(overrides or [])], console)


@app.command("eval")
def evaluate(
    model: Annotated[
        Path, typer.Argument(help="Hugging Face folder, run, or Megatron checkpoint", metavar="CHECKPOINT_OR_HF_DIR")
    ],
    configs: Annotated[
        list[str], typer.Argument(help="YAML files, for example conf/eval/math.yaml, and changes", metavar="CONFIG...")
    ],
) -> None:
    """Sample k responses to each problem of one or more benchmarks, and say how many are correct, and how sure that is.

    Changes are KEY=VALUE, for example server.urls=[http://127.0.0.1:30000]; docs/evaluation.md lists all keys.
    """
    from megatron_opd.config import load_evaluation
    from megatron_opd.evaluation.command import evaluate as run_evaluation
    from megatron_opd.evaluation.console import EvaluationConsole

    with EvaluationConsole() as console, _told(console):
        run_evaluation(model, load_evaluation(configs), console)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Folder of an evaluation", metavar="A")],
    second: Annotated[Path, typer.Argument(help="Folder of another one, of the same problems", metavar="B")],
    as_json: Annotated[bool, typer.Option("--json", help="Numbers for a program")] = False,
) -> None:
    """Test whether the second of two evaluated models is better than the first, problem by problem."""
    from megatron_opd.evaluation.compare import compare as run_comparison
    from megatron_opd.evaluation.compare import comparison_json, other_settings
    from megatron_opd.evaluation.console import EvaluationConsole

    console = EvaluationConsole()
    with _told(console):
        a, b, found = run_comparison(first, second)
        if as_json:
            typer.echo(comparison_json(a, b, found))
        else:
            console.comparison((a.model, b.model), found, other_settings(a, b))


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="Format of the files, for example gsm8k (docs/data.md)", metavar="NAME")],
    files: Annotated[list[Path], typer.Argument(help="jsonl, jsonl.gz, json or parquet, in order", metavar="FILES...")],
    out: Annotated[Path, typer.Argument(help="New .jsonl file of prompts", metavar="OUT")],
    options: Annotated[
        list[str] | None, typer.Option("--set", help="Further options, for example domain=math", metavar="KEY=VALUE")
    ] = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="FORMAT=FILE whose questions must not be trained on; may be repeated")
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Model folder whose tokenizer counts for --max-tokens")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt after the chat template")] = None,
    max_bad: Annotated[int | None, typer.Option(min=0, help="Records that may be unusable; else none")] = None,
) -> None:
    """Convert published data sets to one prompt file, without what is too long, doubled or in a benchmark.

    Keys of --set: domain, template, min_difficulty, images, ngram.
    """
    from megatron_opd.config import PrepareConfig, load_options
    from megatron_opd.prepare.command import parse_benchmarks
    from megatron_opd.prepare.command import prepare as run_prepare
    from megatron_opd.prepare.console import PrepareConsole

    with PrepareConsole() as console, _told(console):
        listed = parse_benchmarks(benchmark) if benchmark else None
        flags = {"benchmarks": listed, "tokenizer": tokenizer, "max_tokens": max_tokens, "max_bad": max_bad}
        given = {key: value for key, value in flags.items() if value is not None}
        settings = load_options(PrepareConfig, options or [], "--set").model_copy(update=given)
        run_prepare(name, files, out, settings, console)


@app.command()
def audit(
    run: Annotated[Path, typer.Argument(help="Folder of a run, for example runs/toy", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="Folder of audit.json and audit.html; else the run's own")] = None,
) -> None:
    """Compute every diagnostic of a run from its saved rollouts, without a model, and write a page about them."""
    from megatron_opd.audit.report import audit as run_audit
    from megatron_opd.observe.console import RunConsole

    with _told(RunConsole()):
        typer.echo("\n".join(run_audit(run, out).lines()))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: a100, h20, h100, h200, b200 and others")] = "h100",
    assume: Annotated[list[str] | None, typer.Option(help="key=value that the config does not say")] = None,
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Try all layouts of the student, rank those that fit")
    ] = False,
    scale: Annotated[bool, typer.Option("--scale", help="The models on 8, 64, 512 and 4096 GPUs")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Numbers for a program")] = False,
) -> None:
    """Calculate memory, work and time of a run, before any GPU is rented. Exit code 1: it does not fit."""
    from megatron_opd.config import load_config
    from megatron_opd.observe.console import RunConsole
    from megatron_opd.plan.command import plan as make_plan

    with _told(RunConsole()):
        settings = load_config(config, overrides or [])
        if not make_plan(settings, gpu, assume or [], layouts=layouts, scaled=scale, as_json=as_json):
            raise typer.Exit(1)


@app.command()
def doctor(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Findings for a program")] = False,
) -> None:
    """Check this machine, the config, its models, data, servers and verifiers. Exit code 1: something failed."""
    from megatron_opd.doctor.command import doctor as examine
    from megatron_opd.observe.console import RunConsole

    with _told(RunConsole()):
        if not examine(config, overrides or [], as_json=as_json):
            raise typer.Exit(1)


@app.command()
def view(
    run: Annotated[Path, typer.Argument(help="Folder of a run, for example runs/toy", metavar="RUN")],
    out: Annotated[Path | None, typer.Option(help="Folder of view.html; else the run's own")] = None,
) -> None:
    """Write a page about a run, while it goes on or after it: curves, a step's timeline, rollouts, faults."""
    from megatron_opd.observe.console import RunConsole
    from megatron_opd.view.report import view as write_view

    with _told(RunConsole()):
        typer.echo("\n".join(write_view(run, out)))


convert = typer.Typer(
    help="Convert weights between a Hugging Face folder and a Megatron checkpoint.", no_args_is_help=True
)
app.add_typer(convert, name="convert")


@convert.command("to-megatron")
def convert_to_megatron(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder with safetensors", metavar="HF_DIR")],
    out: NewFolder,
    options: Options = None,
) -> None:
    """Write the weights of a Hugging Face folder as a Megatron checkpoint (torch_dist), which any layout loads.

    Keys: tensor_parallel, pipeline_parallel, expert_parallel, expert_tensor_parallel, threads_per_rank, dtype.
    """
    from megatron_opd.convert.command import to_megatron
    from megatron_opd.convert.console import ConversionConsole

    with ConversionConsole() as console, _told(console):
        to_megatron(source, out, options or [], console)


@convert.command("to-hf")
def convert_to_hf(
    checkpoint: Annotated[
        Path, typer.Argument(help="Megatron checkpoint: iter_0000010, release, or the folder above", metavar="CKPT")
    ],
    out: NewFolder,
    options: Options = None,
) -> None:
    """Write the weights of a Megatron checkpoint, of a run or of to-megatron, as a Hugging Face folder.

    Keys: source, shard_gb, tensor_parallel, pipeline_parallel, expert_parallel, expert_tensor_parallel,
    threads_per_rank.
    """
    from megatron_opd.convert.command import to_hf
    from megatron_opd.convert.console import ConversionConsole

    with ConversionConsole() as console, _told(console):
        to_hf(checkpoint, out, options or [], console)


@app.command("config")
def show_config() -> None:
    """Print every key of the config with its type, default and meaning."""
    from megatron_opd.observe.reference import config_reference

    typer.echo(config_reference())


@contextmanager
def _told(console: ProgressConsole) -> Iterator[None]:
    """Show an error of ours, or the signal that stopped the command, and end with the exit code that belongs to it.

    A file or folder that the system refuses is the user's affair too, wherever it is met.
    """
    from megatron_opd.runtime.supervision import StoppedBySignal

    try:
        yield
    except OpdError as error:
        console.error(error)
        raise typer.Exit(1) from None
    except OSError as error:
        if error.filename is None:  # of no file: a defect
            raise
        console.error(system_error(error))
        raise typer.Exit(1) from None
    except StoppedBySignal as stop:
        console.error(stop)
        raise typer.Exit(128 + stop.number) from None


def main() -> None:
    """Entry point of the ``megatron-opd`` command."""
    app()


if __name__ == "__main__":
    main()
