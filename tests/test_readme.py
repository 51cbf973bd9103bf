"""README.md: every command of a block marked runnable is run, on made results and a tiny encoder, in a folder apart.

A block's commands run in their order and in one folder, as a reader's do. What stands there for the reader's own (RUN,
my.csv, NAME, adapters/RUN) is there under that name; the hub's model is a tiny one; `--smoke` is added to trainings.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TRAINER, run_command
from made_results import classifier, make_results
from safetensors.numpy import save_file

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```runnable\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
LEARNING = (TRAINER, "demo/")  # what needs a model; all else reads results alone
BASE = "FacebookAI/roberta-base"


def commands(block: str) -> list[list[str]]:
    """The words of each command of a block: lines joined, comments and [optional words] left out, loops written out.

    Of bash no more is known than README.md uses: `for NAME in WORDS; do COMMAND; done`.
    """
    text = re.sub(r"\\\n\s*", "", block)
    loop = re.compile(r"^for (\w+) in ([^;]+); do (.+?); done$", re.MULTILINE)
    text = loop.sub(lambda m: "\n".join(m[3].replace(f"${m[1]}", value) for value in m[2].split()), text)
    words = [shlex.split(re.sub(r"\[[^]]*\]", "", line), comments=True) for line in text.splitlines()]
    return [line for line in words if line]


@pytest.fixture
def home(tmp_path, monkeypatch, labelled):
    """The project as a reader has it, with the files that README.md takes for the reader's own."""
    shutil.copytree(ROOT / "util", tmp_path / "util")  # copied: they look for results/ beside themselves
    for name in ("bhpeft", "demo", "recipes", "ds_zero3_cpu.yaml", TRAINER):
        (tmp_path / name).symlink_to(ROOT / name)
    results = tmp_path / "results"
    make_results(results)
    classifier(results, "RUN", np.arange(40) % 2, {1, 5})
    for name, run in (("a", "weak"), ("b", "strong")):
        shutil.copy(results / "predictions" / f"{run}.csv", tmp_path / f"{name}.csv")
    for name in ("my.csv", "rows.csv"):
        shutil.copy(labelled, tmp_path / name)
    monkeypatch.chdir(tmp_path)  # a launcher's configuration is named as it is from there
    return tmp_path


def run(words: list[str], home) -> subprocess.CompletedProcess:
    """Run a command of README.md in `home`; who is asked something quits."""
    if words[0] == "python":
        words = [sys.executable, *words[1:]]
    if not any(word.startswith(LEARNING) for word in words):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(words, cwd=home, env=environment, input="q\n", capture_output=True, text=True,
                              encoding="utf-8", timeout=60, check=False)  # fmt: skip
    words = [str(ROOT / word) if word.startswith(LEARNING) else word for word in words]
    return run_command(words + ["--smoke"] * (str(ROOT / TRAINER) in words), cwd=home)


def check(words: list[str], home) -> None:
    """Run a command; one that fails, or neither says anything nor writes its `--out`, fails with what it said."""
    done = run(words, home)
    said = f"$ {shlex.join(words)}\nexit {done.returncode}\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
    assert done.returncode == 0, said
    out = home / words[words.index("--out") + 1] if "--out" in words else None
    assert done.stdout.strip() or (out and out.stat().st_size), f"nothing was said\n{said}"


def test_blocks_are_marked():
    assert sum(any(TRAINER in words for words in commands(block)) for block in BLOCKS) >= 2
    named = {word for block in BLOCKS for words in commands(block) for word in words}
    without = {"util/bayesianise.py", "util/export_adapter.py"}  # for one kind of adapter: tests of their own
    assert {f"util/{script.name}" for script in (ROOT / "util").glob("*.py")} - without <= named


def test_every_script_that_is_named_is_there():
    named = set(re.findall(r"\b(?:util|demo|benchmarks)/\w+\.py|\brecipes/[a-z]\w+\.yaml|\bdocs/\w+\.md", README))
    assert len(named) > 20 and not {name for name in named if not (ROOT / name).is_file()}


def test_blocks_are_read_as_bash_reads_them():
    block = "python a.py x.txt [--web]   # c\nfor r in 8 16; do python b.py \\\n    --rank $r --name r-$r; done\n"
    assert commands(block) == [["python", "a.py", "x.txt"], ["python", "b.py", "--rank", "8", "--name", "r-8"],
                               ["python", "b.py", "--rank", "16", "--name", "r-16"]]  # fmt: skip


def test_what_reads_results(home):
    adapter = home / "adapters" / "RUN"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    rng, layer = np.random.default_rng(0), "base_model.model.layers.0.self_attn.q_proj"
    parts = {"A": (2, 8), "B": (8, 2)}
    weights = {f"{layer}.lora_{k}.weight": rng.normal(size=shape).astype(np.float32) for k, shape in parts.items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    blocks = [block for block in BLOCKS if not any(word in block for word in LEARNING)]
    lines = [words for block in blocks for words in commands(block)]
    assert len(lines) >= 8
    for words in lines:
        check(words, home)
    for made in ("report.html", "plots/RUN/reliability.csv", "plots/RUN/interpret.png"):
        assert (home / "results" / made).stat().st_size > 0
    assert (home / "ensemble.csv").stat().st_size > 0
    with pytest.raises(AssertionError, match="--no_such_flag"):  # a wrong command is found
        check([*lines[0], "--no_such_flag"], home)


def test_what_trains_and_asks(home, tiny_encoder):
    for block in BLOCKS:
        if not any(word in block for word in LEARNING):
            continue
        for words in commands(block.replace(BASE, str(tiny_encoder))):
            check(words, home)
            trained = home / "adapters" / "mine"  # what it is called is the reader's choice
            if trained.is_dir() and not (home / "adapters" / "RUN").exists():
                shutil.copytree(trained, home / "adapters" / "RUN")
    assert (home / "results" / "predictions" / "mine.csv").is_file()
    assert (home / "answers.csv").is_file()
