"""``megatron-opd doctor``: every check, one after the other, whatever the ones before it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import typer
from rich.console import Console
from rich.live import Live

from megatron_opd.config import Config, load_config
from megatron_opd.doctor.collective import check_all_reduce
from megatron_opd.doctor.finding import Check, Finding, by_error, ok, skipped
from megatron_opd.doctor.gpus import check_gpus
from megatron_opd.doctor.machine import check_packages, check_python, check_shared_memory, check_torch
from megatron_opd.doctor.models import check_data, check_images, check_models, check_sizes, check_tokenizers
from megatron_opd.doctor.run import run_check
from megatron_opd.doctor.servers import check_engines, check_handshakes
from megatron_opd.doctor.settings import (
    check_batch,
    check_disk,
    check_placement,
    check_ports,
    check_run_folder,
    check_sink_modes,
)
from megatron_opd.doctor.table import as_plain, is_good, make_console, show
from megatron_opd.doctor.verifying import check_sandbox, check_verifiers
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.supervision import signals_raise

# Of the machine; they say more with a config, and something without one.
MACHINE: dict[str, tuple[float, Callable[[Config | None], Iterable[Finding]]]] = {
    "torch": (120, check_torch),
    "GPUs": (90, check_gpus),
    "sandbox": (120, check_sandbox),
}
# Of the config: name, seconds it may take, and the check.
CONFIG: dict[str, tuple[float, Callable[[Config], Iterable[Finding]]]] = {
    "batch": (10, check_batch),
    "placement": (180, check_placement),
    "models": (60, check_models),
    "sizes": (60, check_sizes),
    "tokenizers": (300, check_tokenizers),
    "images": (60, check_images),
    "data": (600, check_data),
    "verifiers": (300, check_verifiers),
    "engines": (300, check_engines),
    "handshakes": (600, check_handshakes),
    "all-reduce": (180, check_all_reduce),
    "shared memory": (30, check_shared_memory),
    "ports": (30, check_ports),
    "run folder": (30, check_run_folder),
    "disk": (30, check_disk),
    "sinks": (30, check_sink_modes),
}


def doctor(path: Path, overrides: list[str], *, as_json: bool) -> bool:
    """Print what every check finds, as a table or as JSON; whether none failed. Raises StoppedBySignal."""
    config, first = _read(path, overrides)
    console = make_console()
    with signals_raise():
        findings = [first, *_run(checks(config), Console(stderr=True))]
    if as_json:
        typer.echo(json.dumps(as_plain(findings)))
    else:
        show(findings, console)
    return is_good(findings)


def _read(path: Path, overrides: list[str]) -> tuple[Config | None, Finding]:
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        return None, by_error("config", error)
    return config, ok("config", f"{path}: run {config.name}, {config.steps} steps")


def checks(config: Config | None) -> Iterator[Check]:
    """All of them, in the order of the table; without a config those that do not need one."""
    yield Check("python", 10, check_python)
    yield Check("packages", 60, check_packages)
    for name, (limit_s, work) in MACHINE.items():
        yield Check(name, limit_s, partial(work, config))
    if config is None:
        yield Check("others", 10, lambda: [skipped("others", f"no config for {', '.join(CONFIG)}")])
        return
    for name, (limit_s, work) in CONFIG.items():
        yield Check(name, limit_s, partial(work, config))


def _run(wanted: Iterable[Check], console: Console) -> Iterator[Finding]:
    """One after the other, so that none slows another down; a terminal shows which one is under way."""
    # Without a thread that redraws: checks are forks of this process.
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for check in wanted:
            if console.is_terminal:
                live.update(f"checking {check.name} (at most {check.limit_s:g} s)", refresh=True)
            yield from run_check(check)
