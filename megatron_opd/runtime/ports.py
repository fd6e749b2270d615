"""TCP ports of this machine."""

from __future__ import annotations

import errno
import random
import socket

from megatron_opd.errors import ConfigError

# Below those that Linux gives to outgoing connections (32768 and up): a server that is started again needs its own port
# once more, and any program's connection could have taken it meanwhile.
LOWEST, HIGHEST = 20000, 32767
_given: set[int] = set()  # by this process


def free_port(host: str = "127.0.0.1") -> int:
    """A port that was free a moment ago. Raises OSError when ``host`` is no address of this machine."""
    while True:
        port = random.SystemRandom().randint(LOWEST, HIGHEST)
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
        if port not in _given:
            _given.add(port)
            return port


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
