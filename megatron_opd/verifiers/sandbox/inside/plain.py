"""Values of plain built-in types as JSON and back: what crosses between the tests and an untrusted function.

    encode((1, {2}))                                         -> {"tuple": [1, {"set": [2]}]}
    decode({"tuple": [1, {"set": [2]}]})                     -> (1, {2})

Only plain types come out of ``decode``, so that nothing the other side wrote can override ``__eq__`` or any method.
"""

from __future__ import annotations

BIG = 1 << 63  # longer integers travel in hexadecimal: Python limits the digits of decimal ones
SEQUENCES = {"tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: object) -> object:
    """What ``json.dumps`` takes. Subclasses lose what they add. Raises TypeError for a value that is not plain."""
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        return int(value) if -BIG < value < BIG else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    for name, kind in SEQUENCES.items():
        if isinstance(value, kind):
            return {name: [encode(item) for item in value]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": value.hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if hasattr(value, "tolist"):  # a number or an array of numpy
        return encode(value.tolist())
    raise TypeError(f"{type(value).__name__} is not a plain value")


def decode(content: object) -> object:
    """The inverse. Raises ValueError or TypeError for what ``encode`` cannot have written."""
    if isinstance(content, list):
        return [decode(item) for item in content]
    if not isinstance(content, dict):
        return content
    ((name, items),) = content.items()
    if name in SEQUENCES:
        return SEQUENCES[name](map(decode, items))
    if name == "dict":
        return {decode(key): decode(item) for key, item in items}
    if name == "int":
        return int(items, 16)
    if name == "bytes":
        return bytes.fromhex(items)
    if name == "complex":
        return complex(*items)
    raise ValueError(f"no value is written as {name!r}")
