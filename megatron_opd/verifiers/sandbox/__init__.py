"""Runs untrusted Python in processes of its own; ``levels`` tells how well they are fenced in.

What holds at every level, because the process of the response never has what it would need:

* Expected outputs of calls and programs never enter a sandbox: values and prints come out and are compared outside.
* Assertions run in a process beside the response's. It was forked before the tests were read, and values reach the
  tests as copies of plain built-in types: no ``__eq__`` trick, patched module, exit or print decides anything there.
* A process that ends, hangs or breaks the protocol has failed, whatever was written before.

    Sandbox("namespaces").run(Request("calls", source="def f(x): return x + 1", fn_name="f", inputs=[[1]]), 4.0)
    -> Run(rows=[["value", 2]], end="exited with code 0")
"""

from megatron_opd.verifiers.sandbox.levels import LEVELS, Level, Probe, choose, probes
from megatron_opd.verifiers.sandbox.process import FILE_BYTES, Request, Run, Sandbox

__all__ = ["FILE_BYTES", "LEVELS", "Level", "Probe", "Request", "Run", "Sandbox", "choose", "probes"]
