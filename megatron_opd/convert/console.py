"""What a person sees of a conversion."""

from __future__ import annotations

from pathlib import Path

from megatron_opd.convert.ranks import Converted
from megatron_opd.observe.console import ProgressConsole
from megatron_opd.runtime.conversion import ConversionJob


class ConversionConsole(ProgressConsole):
    """Prints one conversion."""

    def checking(self) -> None:
        self._say("checking the input")

    def converting(self, job: ConversionJob, given: Path, log: Path) -> None:
        """The facts that matter, before anything starts."""
        student = job.student
        sizes = {"TP": student.tensor_parallel, "PP": student.pipeline_parallel, "EP": student.expert_parallel}
        shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "TP 1"
        processes = f"{student.ranks} process{'es' if student.ranks > 1 else ''}"
        self._say(f"converting {given.absolute()}")
        self._say(f"  with      {processes} on the CPU: {shown}")
        self._say(f"  log       tail -F {log}")

    def stopping(self) -> None:
        self._say("stopping all processes of the conversion")

    def result(self, out: Path, converted: Converted) -> None:
        """What was made, and what it took."""
        peak = max(rank.peak for rank in converted.ranks)
        self._say(
            f"{out.absolute()}: {converted.bytes / 1e6:.1f} MB in {converted.seconds:.1f} s; "
            f"no process used more than {peak / 1e6:.0f} MB of memory"
        )
