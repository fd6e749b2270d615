"""Signals inside a coroutine: the task is cancelled, its clean-up is not."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from megatron_opd.errors import EngineError
from megatron_opd.runtime.supervision import StoppedBySignal, signals_cancel, signals_raise, signals_wait


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_cancels_and_is_told(number: signal.Signals) -> None:
    cleaned = []

    async def work() -> None:
        with signals_cancel():
            try:
                os.kill(os.getpid(), number)
                await asyncio.sleep(30)
            finally:
                os.kill(os.getpid(), number)  # nor does a second one disturb
                await asyncio.sleep(0.1)
                cleaned.append(True)

    before = signal.getsignal(number)
    with pytest.raises(StoppedBySignal) as caught, signals_raise():
        asyncio.run(work())
    assert caught.value.number == number and cleaned == [True] and signal.getsignal(number) is before


def test_the_handlers_of_before_are_back_afterwards() -> None:
    async def work() -> None:
        with signals_cancel():
            await asyncio.sleep(0)
        time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(30)

    with pytest.raises(StoppedBySignal), signals_raise():
        asyncio.run(work())


def test_other_errors_and_cancellations_pass() -> None:
    async def fail(error: BaseException) -> None:
        with signals_cancel():
            raise error

    for error in (EngineError("no answer"), asyncio.CancelledError()):
        with pytest.raises(type(error)):
            asyncio.run(fail(error))


def test_a_signal_during_a_clean_up_waits_for_its_end() -> None:
    done = []
    with pytest.raises(StoppedBySignal), signals_raise(), signals_wait():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done.append(True)
    assert done == [True]
    with signals_wait():
        pass
