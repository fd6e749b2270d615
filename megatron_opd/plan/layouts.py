"""All layouts of the student on a number of GPUs: those that fit, fastest first, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_opd.config import StudentConfig
from megatron_opd.plan.estimate import Models, StudentPlan, gib, plan_student
from megatron_opd.plan.work import Setting
from megatron_opd.student.sizes import size_mistakes

MEMORY = "It does not fit into a GPU's memory"
WIDEST_CONTEXT = 16  # ranks that split one sequence: more were never tried
SHORT = {
    "tensor_parallel": "tp",
    "pipeline_parallel": "pp",
    "virtual_pipeline": "vpp",
    "context_parallel": "cp",
    "data_parallel": "dp",
    "expert_parallel": "ep",
    "expert_tensor_parallel": "etp",
}


@dataclass(frozen=True)
class Candidate:
    """A layout that can be built and fits."""

    student: StudentConfig
    plan: StudentPlan


@dataclass
class Refusal:
    """Why some layouts are out: how many, and the one that is nearest to fitting, or the first."""

    what: str
    count: int
    layout: str
    numbers: str
    excess: float = 0.0  # bytes over the limit


@dataclass(frozen=True)
class Comparison:
    """What became of all layouts on ``ranks`` GPUs."""

    ranks: int
    fitting: list[Candidate]  # fastest first
    refused: list[Refusal]  # most frequent first


def compare_layouts(setting: Setting, models: Models, ranks: int) -> Comparison:
    """Try every layout of ``ranks`` ranks, each with every recomputation."""
    fitting: list[Candidate] = []
    refused: dict[str, Refusal] = {}
    for student in layouts(setting.config.student, models, ranks, setting.assumed.gpus_per_node):
        case = setting.with_student(student)
        mistakes = size_mistakes(case.config, models.student_config)
        if mistakes:
            _refuse(refused, mistakes[0].what, student, f"{mistakes[0].got}; expected {mistakes[0].expected}")
            continue
        plan = plan_student(case, models.student)
        if plan.fits:
            fitting.append(Candidate(student, plan))
        else:
            numbers = f"{gib(plan.peak)} GiB on a rank, {gib(plan.usable)} GiB usable"
            _refuse(refused, MEMORY, student, numbers, plan.peak - plan.usable)
    fitting.sort(key=lambda found: (found.plan.time.total, found.plan.peak))
    return Comparison(ranks, fitting, sorted(refused.values(), key=lambda refusal: -refusal.count))


def layouts(base: StudentConfig, models: Models, ranks: int, node: int) -> Iterator[StudentConfig]:
    """Every split of ``ranks``, other keys as in ``base``.

    Tensor and context parallelism are powers of two, the first within a node of ``node`` GPUs.
    """
    for tensor in powers_of_two(ranks, node):
        for stages in divisors(ranks // tensor, models.student.layers):
            for context in powers_of_two(ranks // tensor // stages, WIDEST_CONTEXT):
                copies = ranks // tensor // stages
                for experts in divisors(copies, models.student.experts) if models.student.experts else (1,):
                    sizes = {
                        "tensor_parallel": tensor,
                        "pipeline_parallel": stages,
                        "context_parallel": context,
                        "data_parallel": copies // context,
                        "expert_parallel": experts,
                        "sequence_parallel": tensor > 1,
                    }
                    yield from _variants(base, sizes)


def divisors(number: int, limit: int) -> list[int]:
    """Divisors of ``number`` up to ``limit``."""
    return [divisor for divisor in range(1, min(number, limit) + 1) if number % divisor == 0]


def powers_of_two(number: int, limit: int) -> list[int]:
    """Those of ``divisors`` that are powers of two."""
    return [divisor for divisor in divisors(number, limit) if divisor & (divisor - 1) == 0]


def describe(student: StudentConfig) -> str:
    """Sizes of a layout in the field's short names; those of 1 are left out."""
    sizes = [f"{short} {getattr(student, name)}" for name, short in SHORT.items() if _says_something(student, name)]
    return " ".join(sizes) or "one rank"


def as_overrides(student: StudentConfig) -> list[str]:
    """``key=value`` arguments that choose a layout."""
    names = [*SHORT, "sequence_parallel", "recompute"]
    values = {name: getattr(student, name) for name in names}
    return [f"student.{name}={'null' if value is None else str(value).lower()}" for name, value in values.items()]


def _says_something(student: StudentConfig, name: str) -> bool:
    return getattr(student, name) is not None and (getattr(student, name) > 1 or name == "expert_tensor_parallel")


def _variants(base: StudentConfig, sizes: dict[str, int | bool]) -> Iterator[StudentConfig]:
    """The split with each recomputation, with and without interleaving and divided experts."""
    alone = sizes["data_parallel"] * sizes["context_parallel"] == 1
    overlap = {} if not alone else {"overlap_gradients": False, "overlap_parameters": False}
    undivided = sizes["expert_parallel"] > 1 and sizes["tensor_parallel"] > 1
    for virtual in (1, 2, 4) if sizes["pipeline_parallel"] > 1 else (1,):
        for expert_tensor in (None, 1) if undivided else (None,):
            for recompute in ("none", "selective", "full"):
                more = {"virtual_pipeline": virtual, "expert_tensor_parallel": expert_tensor, "recompute": recompute}
                yield base.model_copy(update={**sizes, **overlap, **more})


def _refuse(refused: dict[str, Refusal], what: str, student: StudentConfig, numbers: str, excess: float = 0.0) -> None:
    layout = f"{describe(student)}, recompute {student.recompute}"
    known = refused.get(what)
    if known is None:
        refused[what] = Refusal(what, 1, layout, numbers, excess)
        return
    known.count += 1
    if excess < known.excess:
        known.layout, known.numbers, known.excess = layout, numbers, excess
