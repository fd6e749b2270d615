"""The ways for weights from the trainer's first rank to the rollout engines."""

from megatron_opd.student.transports.base import Place, Sent, Transport
from megatron_opd.student.transports.broadcast import Broadcast
from megatron_opd.student.transports.disk import Disk
from megatron_opd.student.transports.shared_memory import SharedMemory

TRANSPORTS: dict[str, type[Transport]] = {"broadcast": Broadcast, "disk": Disk, "tensor": SharedMemory}

__all__ = ["TRANSPORTS", "Place", "Sent", "Transport"]
