"""TCP ports of this machine."""

from __future__ import annotations

import socket

from megatron_opd.errors import ConfigError


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def take_port(wanted: int, key: str, host: str = "127.0.0.1") -> int:
    """``wanted``, or a free port if it is 0. Raises ConfigError, which names ``key``, when ``wanted`` is in use."""
    if wanted == 0:
        return free_port(host)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, wanted))
        except OSError as error:
            raise ConfigError(
                "The port cannot be used",
                where=key,
                got=f"{host}:{wanted}: {error.strerror}",
                expected="a free port",
                fix=f"stop what listens there, or set {key}=0 for any free port",
            ) from error
    return wanted
