"""Runs the toy job again and again, kills something or answers falsely in the middle, and writes what was seen.

    python tools/fault_matrix.py [FAULT ...] [--folder runs/fault_matrix]

Without names it runs all faults; results add up in ``FOLDER/results.json``, and the table of docs/reliability.md is
written from them. Servers that are not to die are started once and shared. Exits with 1 when a run did not end whole,
lost or repeated a prompt, or when a wrong number reached the loss.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "fakes"))

from conftest import started_servers
from faults import (
    COORDINATOR,
    MATH,
    ROLLOUT,
    SMALL,
    STUDENT,
    await_doing,
    await_log,
    kill,
    log_length,
    lost_and_repeated,
    proxied,
    small_disk,
    until,
    wrong_numbers,
)
from faulty_server import FAULTS as REPLIES
from faulty_server import FaultyServer

from runs import COMMAND, ROOT, TOY, Run, Servers, finish

STEPS = 4
DISK, DISK_MB, FULL_S = "disk", 32, 5.0  # a small file system, and how long it stays full after that was noticed
DOCUMENT = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- made by tools/fault_matrix.py -->", "<!-- end -->"
Inject = Callable[[Run, FaultyServer], float]
"""Does it at the right moment of a run; the time at which it has."""


def scoring(number: signal.Signals, role: str = "teacher-math") -> Inject:
    def inject(run: Run, _: FaultyServer) -> float:
        await_doing(run, "step 2: rollouts")
        await_log(run, role, "POST /generate", log_length(run, role))
        kill(run, MATH, number)
        return time.time()

    return inject


def generating(number: signal.Signals) -> Inject:
    def inject(run: Run, _: FaultyServer) -> float:
        await_doing(run, "step 2: rollouts")
        kill(run, ROLLOUT, number)
        return time.time()

    return inject


def refreshing(text: str) -> Inject:
    def inject(run: Run, _: FaultyServer) -> float:
        await_doing(run, "step 2: training")
        await_log(run, "rollout", text, log_length(run, "rollout"))
        kill(run, ROLLOUT)
        return time.time()

    return inject


def job(part: str) -> Inject:
    def inject(run: Run, _: FaultyServer) -> float:
        await_doing(run, "step 3: rollouts")
        kill(run, part)
        return time.time()

    return inject


def fill_disk(run: Run, _: FaultyServer) -> float:
    """Take all room when step 2 begins, and give it back some time after the student has noticed."""
    await_doing(run, "step 2: rollouts")
    filling, noticed = run.folder.parent / DISK / "filling", log_length(run, "student")
    with filling.open("wb") as file:
        try:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        except OSError:
            pass  # it is full
    await_log(run, "student", "The disk is full", noticed)
    began = time.time()
    until(run, lambda: time.time() > began + FULL_S)
    filling.unlink()
    return began


def for_a_while(kind: str, times: int) -> Inject:
    def inject(run: Run, faulty: FaultyServer) -> float:
        await_doing(run, "step 2: rollouts")
        faulty.spoil_next(kind, times)
        return time.time()

    return inject


def every_second(*kinds: str) -> Inject:
    def inject(run: Run, faulty: FaultyServer) -> float:
        await_doing(run, "step 2: rollouts")
        faulty.plan[:] = kinds
        return time.time()

    return inject


def nothing(run: Run, _: FaultyServer) -> float:
    await_doing(run, "step 2: rollouts")
    return time.time()


@dataclass(frozen=True)
class Fault:
    """One row: what is done, which server the run has for itself, and the settings that it needs."""

    inject: Inject
    server: str = ""
    settings: tuple[str, ...] = ()


OWN_MATH, OWN_ROLLOUT, PROXY = "its own teacher", "its own engine", "a teacher behind a faulty server"
PATIENCE = ("engine.request_timeout_s=4", "scoring.max_dropped_share=1")
HANG = ("engine.hang_s=10", "engine.request_timeout_s=600")
FAULTS: dict[str, Fault] = {
    "nothing": Fault(nothing),
    "kill -9, the only replica of a teacher, scoring": Fault(scoring(signal.SIGKILL), OWN_MATH),
    "kill -9, one of two replicas of a teacher, scoring": Fault(
        scoring(signal.SIGKILL, "teacher-math-0"), OWN_MATH, ("teachers.math.server.replicas=2",)
    ),
    "kill -9, the only rollout engine, generating": Fault(generating(signal.SIGKILL), OWN_ROLLOUT),
    "kill -9, the only rollout engine, in a refresh by broadcast": Fault(
        refreshing("/begin_weight_update"), OWN_ROLLOUT, ("refresh.bucket_mb=1",)
    ),
    "kill -9, the only rollout engine, in a refresh by disk": Fault(
        refreshing("Update engine weights online from disk"), OWN_ROLLOUT, ("refresh.mode=disk",)
    ),
    "kill -9, one of two rollout engines, generating": Fault(
        generating(signal.SIGKILL), OWN_ROLLOUT, ("rollout.server.replicas=2",)
    ),
    "kill -9, the coordinator": Fault(job(COORDINATOR)),
    "kill -9, a rank of the student": Fault(job(STUDENT)),
    "SIGSTOP, the only replica of a teacher, scoring": Fault(scoring(signal.SIGSTOP), OWN_MATH, HANG),
    "SIGSTOP, the only rollout engine, generating": Fault(generating(signal.SIGSTOP), OWN_ROLLOUT, HANG),
    "a full disk in a refresh by disk": Fault(fill_disk, settings=("refresh.mode=disk", f"refresh.folder={{}}/{DISK}")),
    "a teacher answers 500 to 6 requests": Fault(for_a_while("error_500", 6), PROXY, PATIENCE),
    "a teacher answers 503 to 6 requests": Fault(for_a_while("error_503", 6), PROXY, PATIENCE),
    "a teacher hangs for 6 requests": Fault(for_a_while("hang", 6), PROXY, PATIENCE),
    **{
        f"3 replies of a teacher: {fault.what}": Fault(
            every_second(*[kind] * (4 if kind == "swapped" else 3)), PROXY, PATIENCE
        )
        for kind, fault in REPLIES.items()
    },
}


@dataclass(frozen=True)
class Seen:
    """What became of one fault."""

    what: str
    seconds: float  # from the fault to the next step's end, less a usual step
    lost: int
    repeated: int
    wrong: int

    @property
    def well(self) -> bool:
        return not (self.lost or self.repeated or self.wrong)


def settings_of(servers: Servers, fault: Fault, url: str, folder: Path) -> list[str]:
    """The overrides of a run: which servers it shares."""
    attached = [f"teachers.code.server.urls=[{servers.code}]"]
    if fault.server != OWN_ROLLOUT:
        attached.append(f"rollout.server.urls=[{servers.rollout}]")
    if fault.server != OWN_MATH:
        attached.append(f"teachers.math.server.urls=[{url if fault.server == PROXY else servers.math}]")
    return [*SMALL, *attached, f"steps={STEPS}", *(setting.format(folder) for setting in fault.settings)]


def try_one(name: str, servers: Servers, folder: Path) -> Seen:
    """Run the job with one fault. Raises AssertionError when it does not end complete."""
    fault = FAULTS[name]
    with ExitStack() as stack:
        if fault.inject is fill_disk:
            stack.enter_context(small_disk(folder / DISK, DISK_MB))
        faulty, url = stack.enter_context(proxied(servers.math, servers.code))
        settings, output = settings_of(servers, fault, url, folder), folder / "output.txt"
        argv = [str(COMMAND), "train", str(TOY), "name=run", f"output={folder}", *settings]
        with output.open("wb") as file:
            process = subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        run = Run(process, folder / "run", output)
        try:
            at = fault.inject(run, faulty)
            assert finish(run, 900) == 0, run.text()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)
    assert not faulty.plan and (faulty.times is None or faulty.spoilt == faulty.times), "not all replies were spoilt"
    lost, repeated = lost_and_repeated(run, STEPS, settings)
    ends = [event["time"] for event in run.events() if event["event"] == "step" and event["time"] > at]
    usual = median(row["time/step_s"] for row in run.metrics())
    return Seen(
        told(run), max(0.0, ends[0] - at - usual), lost, repeated, wrong_numbers(run, "math", servers.math, settings)
    )


def told(run: Run) -> str:
    """What the run said of it, in order, each once."""
    lines = []
    for event in run.events():
        match event["event"]:
            case "server_hangs":
                lines.append(f"{event['name']} hung for {event['seconds']:.0f} s")
            case "server_died":
                lines.append(f"{event['name']} started again")
            case "engines_out":
                lines.append(f"weights {event['version']} without {len(event['reasons'])} engine(s)")
            case "weights_sent_again":
                lines.append(f"weights {event['version']} sent again")
            case "resumed":
                lines.append(f"went on after step {event['step']}")
            case "dropped":
                lines += [f"dropped {reason.split(', such as')[0]}" for reason in event["reasons"]]
    if "waiting for at most" in (run.folder / "logs" / "student.log").read_text(errors="replace"):
        lines.append("the student waited for room")
    return "; ".join(dict.fromkeys(lines)) or "nothing dropped"


def table(results: dict[str, dict]) -> str:
    """The table as Markdown."""
    rows = [
        "| fault | what was seen | s lost | prompts lost / repeated | wrong numbers in the loss |",
        "|---|---|---|---|---|",
    ]
    for name in FAULTS:
        one = results.get(name)
        cells = (
            f"{one['what']} | {one['seconds']:.1f} | {one['lost']} / {one['repeated']} | {one['wrong']}"
            if one
            else "not run | | |"
        )
        rows.append(f"| {name} | {cells} |")
    return "\n".join(rows)


def write_document(results: dict[str, dict]) -> None:
    """Put the table into its place."""
    text = DOCUMENT.read_text()
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faults", nargs="*", choices=[[], *FAULTS], metavar="FAULT")
    parser.add_argument("--folder", type=Path, default=Path("runs/fault_matrix"))
    arguments = parser.parse_args()
    folder = arguments.folder.absolute() / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    file = arguments.folder / "results.json"
    results, failed = json.loads(file.read_text()) if file.exists() else {}, False
    with started_servers(folder) as servers:
        for number, name in enumerate(arguments.faults or FAULTS):
            place = folder / f"{number:02d}"
            place.mkdir()
            try:
                seen = try_one(name, servers, place)
            except AssertionError as error:
                print(f"FAILED  {name}: {error}", flush=True)
                failed = True
                continue
            failed |= not seen.well
            results[name] = vars(seen)
            file.write_text(json.dumps(results, indent=1) + "\n")
            write_document(results)
            print(f"{'ok' if seen.well else 'FAILED'}  {name}: {seen}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
