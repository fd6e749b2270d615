"""A pool of worker processes that verify responses and can be killed one by one.

    pool = VerifierPool(VerifierConfig(workers=2))
    verdict = await pool.verify(prompt, r"... \boxed{18}")     # Verdict(Outcome.CORRECT, "equal")
    await pool.close()

A response whose verification takes longer than ``timeout_s`` is UNKNOWN: its worker is killed and replaced, the
others go on. Workers start at the first calls, from the thread of the event loop, and die with that thread.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process

from megatron_opd.config import VerifierConfig
from megatron_opd.errors import ConfigError, ProcessError
from megatron_opd.records import Prompt
from megatron_opd.runtime.env import child_environment
from megatron_opd.verifiers import Verdict
from megatron_opd.verifiers.base import unknown
from megatron_opd.verifiers.worker import verdict_of

START_TIMEOUT_S = 120.0  # importing sympy on a busy machine
LINGER_S = 1.0  # between closing its end of the pipe and exiting


class VerifierPool:
    """At most ``config.workers`` verifications run at the same time."""

    def __init__(self, config: VerifierConfig) -> None:
        self._config = config
        self._kinds = config.kinds
        self._workers, self._timeout_s = config.workers, config.timeout_s
        self._processes: set[Process] = set()
        self._idle: asyncio.LifoQueue[Process | None] = asyncio.LifoQueue()  # None: a place without a process
        for _ in range(self._workers):
            self._idle.put_nowait(None)
        self._closed = False
        self.under_way = 0  # responses that are not judged yet

    async def verify(self, prompt: Prompt, response: str) -> Verdict:
        """Judge one response. Raises ConfigError for an unknown domain and ProcessError if no worker can start."""
        domain = prompt.domain
        if domain not in self._kinds:
            raise ConfigError(
                "No verifier for this domain",
                where="verifiers.kinds",
                got=domain,
                expected=", ".join(sorted(self._kinds)),
                fix=f'set verifiers.kinds.{domain}, to "none" if nothing can judge its responses',
            )
        request = json.dumps([self._kinds[domain], prompt.text, response, prompt.answer]).encode() + b"\n"
        self.under_way += 1
        try:
            return await self._verify(request)
        finally:
            self.under_way -= 1

    async def _verify(self, request: bytes) -> Verdict:
        process = await self._idle.get()
        answered = False
        try:
            if self._closed:
                raise ProcessError("The verifier pool is closed")
            if process is None or process.returncode is not None:  # killed before, or died while idle
                process = None
                process = await self._start()
            verdict = await self._ask(process, request)
            answered = verdict is not None
            return verdict or unknown(f"the verifier process died ({await self._bury(process)})")
        except TimeoutError:
            return unknown(f"timed out after {self._timeout_s:g} s")
        finally:  # also when this call is cancelled: whatever the worker is doing, nobody waits for it
            if not answered and process:
                self._kill(process)
            self._idle.put_nowait(process if answered else None)

    async def close(self) -> None:
        """Kill all workers and wait until they are gone. Calls that are under way answer UNKNOWN or raise."""
        self._closed = True
        for process in self._processes:
            self._kill(process)
        for _ in range(self._workers):  # taking every place waits for the calls under way
            await self._idle.get()
        for process in self._processes:
            process.stdin.close()
            await process.stdout.read()  # to the end of the file: the loop may be closed next, so no pipe stays open
            await process.wait()
        self._processes.clear()
        for _ in range(self._workers):
            self._idle.put_nowait(None)

    async def _start(self) -> Process:
        config = self._config.model_dump_json()
        command = [sys.executable, "-m", "megatron_opd.verifiers.worker", str(os.getpid()), config]
        environment = child_environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1")
        process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=environment)
        self._processes = {old for old in self._processes if old.returncode is None} | {process}
        if self._closed:  # meanwhile
            self._kill(process)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                ready = await process.stdout.readline()
        except TimeoutError:
            ready = b""
        except asyncio.CancelledError:
            self._kill(process)
            raise
        if not ready:
            raise ProcessError(
                "A verifier process did not start",
                where=" ".join(command),
                got=await self._bury(process),
                fix="its error is in this process's standard error, above",
            )
        return process

    async def _ask(self, process: Process, request: bytes) -> Verdict | None:
        """None if the worker died. Raises TimeoutError."""
        async with asyncio.timeout(self._timeout_s):
            try:
                process.stdin.write(request)
                await process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError):
                return None
            line = await process.stdout.readline()
        return verdict_of(line) if line.endswith(b"\n") else None

    def _kill(self, process: Process) -> None:
        if process.returncode is None:
            process.kill()

    async def _bury(self, process: Process) -> str:
        """Wait for a process that hung up, kill it if it lingers, and tell what it died of."""
        try:
            async with asyncio.timeout(LINGER_S):  # to kill a process that has just ended would lose its exit code
                code = await process.wait()
        except TimeoutError:
            self._kill(process)
            code = await process.wait()
        return f"signal {-code}" if code < 0 else f"exit code {code}"
