"""docs/coming_from.md: each command of ours parses, recipes and flags, as it stands there."""

import re
import shlex

import pytest
from conftest import ROOT

from bhpeft.config import parse_arguments

BLOCKS = re.findall(r"```runnable\n(.*?)```", (ROOT / "docs/coming_from.md").read_text(encoding="utf-8"), re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines()]


def test_there_is_one_for_each_source_project():
    for recipe in ("bh_peft_roberta_sst2", "prompt_llama2_generics", "qlora_pythia_amazon", "hybrid_gpt2_oasst1",
                   "qlora_llama2_sst2"):  # fmt: skip
        assert any(f"recipes/{recipe}.yaml" in command for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_is_understood(command, monkeypatch, tmp_path):
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    if words[script] != "parameter_efficient_fine_tuning.py":
        return
    monkeypatch.chdir(ROOT)
    run = parse_arguments([*words[script + 1 :], "--output_dir", str(tmp_path)])
    assert run.data.dataset_name and (run.base.base_model or run.adapter.adapter_path)
