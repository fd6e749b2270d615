"""Whether what code returned or printed is what it should have been. No code of the response runs here."""

from __future__ import annotations

from megatron_opd.verifiers.sandbox.inside.plain import decode

FLOAT_ERROR = 1e-6  # relative, absolute below 1; for printed numbers whose expected form has a point or an exponent


def same_value(content: object, expected: object) -> tuple[object, bool]:
    """The value that a call returned, and whether it equals what JSON expects.

    ``content`` is as ``plain.encode`` wrote it. Raises ValueError, TypeError or RecursionError if it is not.
    """
    value = _like_json(decode(content))
    return value, _same(value, expected)


def _like_json(value: object) -> object:
    """As JSON would have it: tuples are lists and keys are texts."""
    if isinstance(value, list | tuple):
        return [_like_json(item) for item in value]
    if isinstance(value, dict):
        return {_key(key): _like_json(item) for key, item in value.items()}
    return value


def _key(key: object) -> object:
    if key is None or isinstance(key, bool):
        return {None: "null", True: "true", False: "false"}[key]
    return str(key) if isinstance(key, int | float) else key


def _same(value: object, expected: object) -> bool:
    """Equal all the way down: 1 is 1.0, but True is not 1."""
    if isinstance(value, list) and isinstance(expected, list):
        return len(value) == len(expected) and all(map(_same, value, expected))
    if isinstance(value, dict) and isinstance(expected, dict):
        return value.keys() == expected.keys() and all(_same(value[key], expected[key]) for key in value)
    if isinstance(value, bool) or isinstance(expected, bool):
        return value is expected
    if isinstance(value, int | float) and isinstance(expected, int | float):
        return value == expected
    return type(value) is type(expected) and value == expected


def same_text(printed: str, expected: str) -> bool:
    """The same lines, but for blanks at their ends, blank lines around all, and the last digits of fractions."""
    ours, theirs = printed.strip().splitlines(), expected.strip().splitlines()
    return len(ours) == len(theirs) and all(map(_same_line, ours, theirs))


def _same_line(printed: str, expected: str) -> bool:
    if printed.strip() == expected.strip():
        return True
    ours, theirs = printed.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_same_word, ours, theirs))


def _same_word(printed: str, expected: str) -> bool:
    if printed == expected:
        return True
    if not set(".eE") & set(expected):
        return False
    try:
        ours, theirs = float(printed), float(expected)
    except ValueError:
        return False
    return abs(ours - theirs) <= FLOAT_ERROR * max(1.0, abs(theirs))
