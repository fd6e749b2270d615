"""Runs one check in a process of its own, so that one that crashes, hangs or leaves processes behind hurts no other."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from megatron_opd.doctor.finding import Check, Finding, by_error, failed
from megatron_opd.errors import OpdError, ProcessError
from megatron_opd.runtime.process import adopt_orphans, die_with_parent, stop_all
from megatron_opd.runtime.supervision import StoppedBySignal, ignore_signals, signals_raise

GRACE_S = 5.0  # for a check that was asked to end


def run_check(check: Check) -> list[Finding]:
    """What it finds, or that it took too long, or died. No process of it is left, however this ends."""
    # A fork needs no import anew. This process has neither threads nor torch.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(prefix="doctor-", suffix=".log") as log:
        process = context.Process(target=_work, args=(check, sender, log.name))
        process.start()
        sender.close()
        told = False
        try:
            if not receiver.poll(check.limit_s):
                return [failed(check.name, "no result in time", f"within {check.limit_s:g} s")]
            told = True
            return receiver.recv()
        except EOFError:
            process.join(GRACE_S)
            return [failed(check.name, f"the check died ({_how(process)}): {_last_line(log.name)}")]
        finally:
            receiver.close()
            _end(process, told)


def _work(check: Check, sender: Connection, log: str) -> None:
    """In the child: what the check and its libraries print goes to ``log``."""
    die_with_parent()
    adopt_orphans()
    output = os.open(log, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        with signals_raise():
            sender.send(_found(check, log))
    except StoppedBySignal:
        pass  # the parent wants no result any more
    finally:
        ignore_signals()  # the clean-up is not interrupted
        stop_all(grace_s=1.0)


def _found(check: Check, log: str) -> list[Finding]:
    try:
        return list(check.work())
    except ProcessError as error:  # of a process that may have said more, to the output that it shares with this one
        return [failed(check.name, f"{error.what}: {error.got}; {_last_line(log)}", fix=error.fix or "")]
    except OpdError as error:
        return [by_error(check.name, error)]
    except Exception as error:  # noqa: BLE001 - a check that breaks is told like any other failure, and the next one runs
        return [failed(check.name, f"{type(error).__name__}: {error}")]


def _last_line(log: str) -> str:
    lines = Path(log).read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _how(process: BaseProcess) -> str:
    code = process.exitcode
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _end(process: BaseProcess, told: bool) -> None:
    """A check that told its findings ends by itself, another is asked to; in the end all that it began is killed."""
    if not told:
        process.terminate()
    process.join(GRACE_S)
    if process.is_alive():
        tree = psutil.Process(process.pid)
        for one in [*tree.children(recursive=True), tree]:
            one.kill()
        process.join()
