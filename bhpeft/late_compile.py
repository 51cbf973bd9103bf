"""bitsandbytes, imported without torch's compiler, which it would load for functions that hardly a run calls.

peft imports bitsandbytes wherever it is installed, and that calls `torch.compile` on four functions of its default
backend: with torch 2.13 and bitsandbytes 0.50 the compiler's modules are a second and 45 MB of every process, most of
which quantise nothing. Imported in here, the functions are compiled when they are first called.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def compiling_late() -> Iterator[None]:
    """Within the block `torch.compile` of a function puts the work off until that function is called."""
    compile_now = torch.compile

    def compile_late(function: Callable | None = None, **settings):
        if function is None:
            return functools.partial(compile_late, **settings)
        compiled: list[Callable] = []

        @functools.wraps(function)
        def call(*args, **kwargs):
            if not compiled:
                compiled.append(compile_now(function, **settings))
            return compiled[0](*args, **kwargs)

        return call

    torch.compile = compile_late
    try:
        yield
    finally:
        torch.compile = compile_now


with compiling_late(), contextlib.suppress(Exception):  # whoever needs it says what is wrong with it
    import bitsandbytes  # noqa: F401
