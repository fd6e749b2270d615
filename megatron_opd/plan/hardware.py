"""GPUs that a plan can be made for: peak speeds of the makers' data sheets, without sparsity.

Memory is what the driver reports, rounded down, which is what allocations see; data sheets round it to tens.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU; speeds in the units of data sheets: powers of ten."""

    name: str
    memory_gib: float
    bandwidth_gb_s: float  # of its memory
    bf16_tflops: float  # dense matrix products, float32 sums
    fp32_tflops: float  # outside tensor cores, as torch multiplies float32 unless told otherwise
    link_gb_s: float  # to the other GPUs of its node, one direction
    source: str

    @property
    def memory(self) -> float:
        """Bytes."""
        return self.memory_gib * 2**30

    @property
    def bandwidth(self) -> float:
        """Bytes a second."""
        return self.bandwidth_gb_s * 1e9

    def flops(self, dtype: str) -> float:
        """Peak operations a second of matrix products in ``dtype``, a type of the config."""
        return 1e12 * (self.bf16_tflops if dtype == "bfloat16" else self.fp32_tflops)


GPUS = {
    "a100-40": Gpu("A100 SXM 40 GB", 39, 1555, 312, 19.5, 300, "NVIDIA A100 data sheet, 2021"),
    "a100": Gpu("A100 SXM 80 GB", 79, 2039, 312, 19.5, 300, "NVIDIA A100 data sheet, 2021"),
    "h20": Gpu("H20", 95, 4000, 148, 44, 450, "quoted by resellers; NVIDIA has no public data sheet"),
    "h100": Gpu("H100 SXM", 79, 3350, 989, 67, 450, "NVIDIA H100 data sheet, 2023: 1,979 with sparsity"),
    "h200": Gpu("H200 SXM", 140, 4800, 989, 67, 450, "NVIDIA H200 data sheet, 2023: 1,979 with sparsity"),
    "b200": Gpu("B200 (HGX)", 178, 7700, 2250, 75, 900, "NVIDIA HGX B200 specification: 36 PFLOPS sparse for 8"),
    "l40s": Gpu("L40S", 44, 864, 362, 91.6, 32, "NVIDIA L40S data sheet, 2023; PCIe 4.0 x16"),
    "rtx4090": Gpu("RTX 4090", 23, 1008, 165, 82.6, 32, "NVIDIA Ada architecture paper, 2022; PCIe 4.0 x16"),
    "mi300x": Gpu("MI300X", 191, 5300, 1307, 163, 448, "AMD MI300X data sheet, 2023"),
}


def find_gpu(name: str) -> Gpu:
    """The GPU of that name. Raises ConfigError that lists all."""
    if name not in GPUS:
        raise ConfigError("No such GPU in the table", where="--gpu", got=name, expected=", ".join(GPUS))
    return GPUS[name]
