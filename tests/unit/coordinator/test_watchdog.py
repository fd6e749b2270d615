"""Silence is noticed once it is long enough, and told again each time it has doubled."""

from __future__ import annotations

import asyncio
from pathlib import Path

from pools import pool_of

from megatron_opd.coordinator.app import BatchBoard
from megatron_opd.coordinator.watchdog import Watchdog, watch
from megatron_opd.observe.recorder import Recorder, read_events
from megatron_opd.runtime.http import TransientError
from megatron_opd.runtime.messages import RefreshReport


def test_silence_is_told_when_it_is_long_and_whenever_it_has_doubled() -> None:
    dog = Watchdog(120, now=1000)
    assert dog.look((0, 1), 1100) is None
    told = {now: dog.look((0, 1), now) for now in range(1100, 2100, 10)}
    assert {now: silence for now, silence in told.items() if silence is not None} == {
        1220: 120,
        1340: 240,
        1580: 480,
        2060: 960,
    }
    assert dog.look((0, 2), 2100) is None and dog.look((0, 2), 2219) is None and dog.look((0, 2), 2220) == 120


async def test_it_says_who_waits_for_whom(tmp_path: Path) -> None:
    board, recorder = BatchBoard(), Recorder(tmp_path / "events", tmp_path / "metrics")
    (tmp_path / "events").touch()
    a, b = type("A", (), {"url": "http://a"})(), type("B", (), {"url": "http://b"})()
    busy, broken = pool_of(a), pool_of(b, probe=never)
    assert board.waits() == ["the coordinator waits for weights 0 of the student"]
    await board.refreshed(RefreshReport(version=0, refresh_s=0, refresh_bytes=0, probe_difference=0))

    async def forever(_: object) -> None:
        await asyncio.sleep(3600)

    async def fails(_: object) -> None:
        raise TransientError("no answer", got="reset")

    tasks = [asyncio.create_task(busy.call(number, 1, 1, forever)) for number in range(3)]
    tasks += [asyncio.create_task(broken.call(0, 1, 4, fails)), asyncio.create_task(board.batch(0, 0, 3600))]
    watching = watch(0.02, lambda: board.moved, lambda: [*busy.waits(), *broken.waits(), *board.waits()], recorder)
    tasks.append(asyncio.create_task(watching))
    while not (events := read_events(tmp_path / "events")) or "until a server" not in str(events[-1]):
        await asyncio.sleep(0.01)
    assert events[-1]["event"] == "stalled" and events[-1]["waits"] == [
        "3 requests wait for test http://a",
        "1 requests wait until a server of test is in rotation: http://b: 3 failures in a row, the last: "
        "no answer (reset)",
        "the student waits for batch 0",
    ]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await broken.close()


async def never(_: object) -> None:
    raise TransientError("still out")
