import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable

import psutil
import pytest

from megatron_opd.config import VerifierConfig
from megatron_opd.errors import ConfigError, ProcessError
from megatron_opd.records import Outcome, Prompt
from megatron_opd.verifiers import Verdict
from megatron_opd.verifiers.pool import VerifierPool

from runs import command_of

CONFIG = VerifierConfig(kinds={"math": "math", "code": "code", "chat": "none"}, workers=2, timeout_s=2.0)
HANGS = r"\boxed{9^{9^{9^{9}}}}"  # sympy computes it
SUM = json.dumps({"fn_name": "f", "inputs": [[[1, 2]]], "outputs": [3]})


def ask(pool: VerifierPool, domain: str, response: str, reference: str) -> Awaitable[Verdict]:
    return pool.verify(Prompt("p", domain, "", (), reference), response)


def workers(parent: int | None = None) -> list[psutil.Process]:
    children = psutil.Process(parent).children()
    return [child for child in children if "megatron_opd.verifiers.worker" in command_of(child)]


def alive(processes: list[psutil.Process]) -> int:
    return sum(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


async def fall_to(count: int, processes: list[psutil.Process], seconds: float = 5.0) -> bool:
    """Whether ``count`` of the processes are alive soon: a killed one takes a moment to give back its memory."""
    deadline = time.monotonic() + seconds
    while alive(processes) > count and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    return alive(processes) == count


@pytest.fixture
async def pool():
    made = VerifierPool(CONFIG)
    yield made
    await made.close()
    assert workers() == []


async def test_every_kind_answers(pool):
    assert await ask(pool, "math", r"\boxed{18.0}", "#### 18") == Verdict(Outcome.CORRECT, "equal")
    assert (await ask(pool, "math", r"\boxed{17}", "18")).outcome is Outcome.INCORRECT
    code = "```python\ndef f(xs):\n    return sum(xs)\n```"
    assert await ask(pool, "code", code, SUM) == Verdict(Outcome.CORRECT, "1 test passed")
    assert (await ask(pool, "chat", "hello", "")).outcome is Outcome.UNKNOWN


async def test_responses_of_any_size_and_text(pool):
    response = "\u00e9\ud800\n\0" * 300_000 + r"\boxed{18}"
    assert (await ask(pool, "math", response, "18")).outcome is Outcome.CORRECT
    assert len((await ask(pool, "math", rf"\boxed{{{'x+' * 900}1}}", "1" * 5000)).reason) <= 500


async def test_unknown_names(pool):
    with pytest.raises(ConfigError) as caught:
        await ask(pool, "poetry", "x", "y")
    assert (caught.value.got, caught.value.expected) == ("poetry", "chat, code, math")


async def test_a_hang_is_killed_alone(pool):
    await asyncio.gather(*(ask(pool, "math", r"\boxed{1}", "1") for _ in range(4)))
    before = workers()
    assert len(before) == 2
    hang = asyncio.create_task(ask(pool, "math", HANGS, "18"))
    others = await asyncio.gather(*(ask(pool, "math", rf"\boxed{{{i}}}", f"{i}.0") for i in range(40)))
    assert {verdict.outcome for verdict in others} == {Outcome.CORRECT}
    assert not hang.done()
    assert await hang == Verdict(Outcome.UNKNOWN, "timed out after 2 s")
    assert await fall_to(1, before)
    assert (await ask(pool, "math", r"\boxed{18}", "18")).outcome is Outcome.CORRECT


async def test_an_endless_loop_is_the_responses_mistake(pool):
    verdict = await ask(pool, "code", "```python\ndef f(xs):\n    while True: pass\n```", SUM)
    assert verdict == Verdict(Outcome.INCORRECT, "1 of 1 tests failed; test 1: timed out after 1.6 s")


async def test_a_worker_that_dies_is_replaced(pool):
    await ask(pool, "math", r"\boxed{1}", "1")
    (worker,) = workers()
    hang = asyncio.create_task(ask(pool, "math", HANGS, "18"))
    await asyncio.sleep(0.2)
    worker.kill()
    assert await hang == Verdict(Outcome.UNKNOWN, "the verifier process died (signal 9)")
    assert (await ask(pool, "math", r"\boxed{1}", "1")).outcome is Outcome.CORRECT
    (worker,) = workers()
    worker.kill()  # idle
    assert await fall_to(0, [worker])
    await asyncio.sleep(0.1)
    assert (await ask(pool, "math", r"\boxed{1}", "1")).outcome is Outcome.CORRECT


async def test_cancelling_frees_the_place(pool):
    hangs = [asyncio.create_task(ask(pool, "math", HANGS, "18")) for _ in range(2)]
    while len(workers()) < 2:
        await asyncio.sleep(0.05)
    for hang in hangs:
        hang.cancel()
    await asyncio.gather(*hangs, return_exceptions=True)
    assert (await ask(pool, "math", r"\boxed{1}", "1")).outcome is Outcome.CORRECT


async def test_the_loop_is_not_blocked(pool):
    longest = 0.0

    async def watch() -> None:
        nonlocal longest
        while True:
            started = time.monotonic()
            await asyncio.sleep(0.01)
            longest = max(longest, time.monotonic() - started)

    await ask(pool, "math", r"\boxed{1}", "1")
    watcher = asyncio.create_task(watch())
    await ask(pool, "math", HANGS, "18")
    watcher.cancel()
    assert 0.0 < longest < 0.5


async def test_ctrl_c_does_not_end_workers(pool):
    await ask(pool, "math", r"\boxed{1}", "1")
    (worker,) = workers()
    worker.send_signal(signal.SIGINT)
    assert (await ask(pool, "math", r"\boxed{1}", "1")).outcome is Outcome.CORRECT
    assert workers() == [worker]


async def test_closing_ends_what_is_under_way():
    pool = VerifierPool(CONFIG.model_copy(update={"workers": 2, "timeout_s": 30.0}))
    await asyncio.gather(*(ask(pool, "math", r"\boxed{1}", "1") for _ in range(2)))
    hangs = [asyncio.create_task(ask(pool, "math", HANGS, "18")) for _ in range(3)]
    await asyncio.sleep(0.2)
    left = workers()
    await pool.close()
    assert await fall_to(0, left, 0.5)
    outcomes = await asyncio.gather(*hangs, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [Verdict, Verdict, ProcessError]
    with pytest.raises(ProcessError, match="closed"):
        await ask(pool, "math", r"\boxed{1}", "1")


async def test_closing_while_a_worker_starts():
    pool = VerifierPool(CONFIG.model_copy(update={"workers": 1, "timeout_s": 30.0}))
    call = asyncio.create_task(ask(pool, "math", HANGS, "18"))
    await asyncio.sleep(0)
    await pool.close()
    with pytest.raises(ProcessError):
        await call
    assert workers() == []


async def test_a_worker_that_cannot_start(monkeypatch, capfd):
    monkeypatch.setattr("megatron_opd.verifiers.pool.sys.executable", "/bin/false")
    pool = VerifierPool(CONFIG.model_copy(update={"workers": 1, "timeout_s": 1.0}))
    for _ in range(2):  # the place is not lost
        with pytest.raises(ProcessError) as caught:
            await ask(pool, "math", r"\boxed{1}", "1")
        assert caught.value.got == "exit code 1"
    await pool.close()


@pytest.mark.parametrize("response", [r"\boxed{1}", HANGS])
async def test_workers_die_with_their_parent(response):
    script = (
        "import asyncio, sys\n"
        "from megatron_opd.config import VerifierConfig\n"
        "from megatron_opd.records import Prompt\n"
        "from megatron_opd.verifiers.pool import VerifierPool\n"
        "async def main():\n"
        "    pool = VerifierPool(VerifierConfig(kinds={'math': 'math'}, timeout_s=60.0))\n"
        "    await pool.verify(Prompt('p', 'math', '', (), '1'), '\\\\boxed{1}')\n"
        "    print('ready', flush=True)\n"
        "    await pool.verify(Prompt('p', 'math', '', (), '18'), sys.argv[1])\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    command = [sys.executable, "-c", script, response]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert await asyncio.to_thread(parent.stdout.readline) == "ready\n"
        await asyncio.sleep(0.2)
        left = workers(parent.pid)
        os.kill(parent.pid, signal.SIGKILL)
    assert len(left) == 1
    assert await fall_to(0, left)
