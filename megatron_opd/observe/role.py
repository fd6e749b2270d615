"""The start of our own long-lived processes: what the coordinator and each student rank have in common."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from megatron_opd.observe.recorder import Recorder, tell_failures
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.runtime.rundir import RunDirectory


def run_role(name: str, work: Callable[[RunDirectory], Awaitable[None]]) -> None:
    """Do ``work`` on the run directory that the command line names; log, tell failures, and end with the parent.

    Lines of this package go, with their time, to standard error, which the supervisor keeps in the role's log; other
    packages keep their own levels.
    """
    die_with_parent()
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("megatron_opd").setLevel(logging.INFO)
    run = RunDirectory(Path(sys.argv[1]))
    with run.present(), tell_failures(name, Recorder(run.events, run.metrics)):
        asyncio.run(work(run))
