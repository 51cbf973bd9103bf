"""torch's compiler is not loaded for bitsandbytes' sake, and what was to be compiled still is, when it is called."""

from __future__ import annotations

import sys

import pytest
import torch
from conftest import TRAINER, run_command

from bhpeft.late_compile import compiling_late

IMPORTS = (
    "import sys; {first}import peft; print('torch._inductor.lowering' in sys.modules, 'bitsandbytes' in sys.modules)"
)


@pytest.mark.parametrize(("first", "found"), [("", "True True"), ("import bhpeft.late_compile; ", "False True")])
def test_peft_alone_loads_the_compiler_and_behind_this_does_not(first, found):
    pytest.importorskip("bitsandbytes")
    assert run_command([sys.executable, "-c", IMPORTS.format(first=first)]).stdout.split("\n")[-2] == found


@pytest.mark.parametrize("settings", [{}, {"dynamic": False}])
def test_a_function_is_compiled_when_it_is_called_and_once(settings, monkeypatch):
    asked = []

    def compile_now(function, **how):
        asked.append(how)
        return lambda x: ("compiled", function(x))

    monkeypatch.setattr(torch, "compile", compile_now)
    with compiling_late():
        double = torch.compile(**settings)(lambda x: 2 * x) if settings else torch.compile(lambda x: 2 * x)
    assert torch.compile is compile_now and not asked
    assert [double(1), double(2)] == [("compiled", 2), ("compiled", 4)]
    assert asked == [settings]


def test_help_is_all_that_help_prints():
    """Nothing of bitsandbytes' own on stderr, which warns of a kernel on CPUs that multiply in bf16."""
    ended = run_command([sys.executable, TRAINER, "--help"], real=True)
    assert ended.stdout.startswith("usage: ") and ended.stderr == ""
