"""What tests share: a tiny model made here, the folder of real data, and ways to run the trainer."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import forked
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="bhpeft-rows-")  # rows kept between starts are kept there
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

TRAINER = "parameter_efficient_fine_tuning.py"
PROGRESS = re.compile(r"\d+%\|.*(it/s|s/it|\?)")
SEVERAL_RANKS = ("tests/distributed/", "tests/real_data/test_stories260k.py", "tests/test_demo.py")
KINDS = ["cats", "dogs", "robins", "trout", "ants", "oaks", "frogs", "bees", "cows", "owls", "eels", "roses"]
ACTS = ["swim in lakes", "fly", "sleep", "eat grass", "have six legs", "sing at dawn"]


def statement_rows() -> list[tuple[str, str]]:
    """Statements of a toy world: kinds with an even number may, the others may not. Answers differ in length."""
    rows = []
    for i, kind in enumerate(KINDS):
        for act in ACTS:
            may = i % 2 == 0
            rows.append((f"Do {kind} {act}?", f"True, {kind} {act}." if may else f"False, no {kind} ever do that."))
    return rows


def pytest_xdist_make_scheduler(config, log):
    """Tests of several ranks run one after the other: ranks wait for each other without sleeping, and four on two
    cores take longer than two and two. The other files run beside them.
    """
    from xdist.scheduler import LoadFileScheduling

    class RanksApart(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:  # --dist loadgroup does nothing under pytest 9.2, xdist 3.8
            return "ranks" if nodeid.startswith(SEVERAL_RANKS) else super()._split_scope(nodeid)

    config.option.loadscopereorder = False  # the folder of several ranks, the longest, comes first
    return RanksApart(config, log)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the project; tests that need it are skipped where it is absent."""
    folder = Path(os.environ.get("BHPEFT_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the folder of real data, ../shared/data or BHPEFT_SHARED_DATA, is absent")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A LLaMA-shaped model of 0.1 M random weights (grouped-query heads) with a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(row) for row in statement_rows()] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    model = LlamaForCausalLM(config)
    _pretrain(model, fast)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def _pretrain(model, tokenizer, steps: int = 60) -> None:
    """Teach the words of the toy world, not its answers: an adapter on random weights has nothing to turn to."""
    import torch

    texts = [half for row in statement_rows() for half in row]
    batch = tokenizer([f"{t}</s>" for t in texts], padding=True, return_tensors="pt", padding_side="right")
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory) -> Path:
    """A RoBERTa of 0.1 M random weights, saved without head and pooler as roberta-base is, with a tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaModel

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(row) for row in statement_rows()] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", mask_token="<mask>",
    )  # fmt: skip
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=514, type_vocab_size=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder") / "tiny-roberta"
    RobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def statements(tmp_path_factory) -> tuple[Path, Path]:
    """(train.csv, test.csv) of `statement_rows`, every sixth row in the test."""
    import csv

    folder = tmp_path_factory.mktemp("statements")
    rows = statement_rows()
    parts = {"train": [r for i, r in enumerate(rows) if i % 6 != 5], "test": rows[5::6]}
    for name, part in parts.items():
        with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["text_input", "text_label"])
            writer.writerows(part)
    return folder / "train.csv", folder / "test.csv"


@pytest.fixture
def labelled(tmp_path) -> Path:
    """The statements as a file of two classes: text_input, text_label "yes" or "no"."""
    import csv

    with open(tmp_path / "labelled.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text_input", "text_label"])
        writer.writerows((q, "yes" if answer.startswith("True") else "no") for q, answer in statement_rows())
    return tmp_path / "labelled.csv"


def run_command(
    words: list, cwd: Path = ROOT, timeout: int = 240, real: bool = False, **environment
) -> subprocess.CompletedProcess:
    """Run a command with this Python's programs; a hang fails instead of stalling.

    What would import torch afresh is forked from a process that has (see `forked.py`), unless it has to be `real`.
    """
    words = list(map(str, words))
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    if not real and forked.split(words):
        finished = forked.run(words, cwd, timeout, environment)
    else:
        finished = subprocess.run(
            words, cwd=cwd, env=environment, timeout=timeout, capture_output=True, text=True, check=False
        )
    # Progress bars would push what a failed run said out of sight.
    finished.stderr = "".join(x for x in finished.stderr.splitlines(keepends=True) if not PROGRESS.search(x))
    return finished


@pytest.fixture
def train(tiny_model, statements, tmp_path):
    """Run the trainer on the tiny model: `train(*flags, launcher=[...])`; results go to `tmp_path/results`.

    `data` takes the place of the statements and of the tiny model.

    Returns the finished process; a failed one fails the test, with what it printed.
    """

    def run(*flags, launcher: list | None = None, script: str = TRAINER, data=None, real: bool = False):
        own = ["--base_model", tiny_model, "--dataset_name", statements[0], "--test_file", statements[1]]
        words = [
            *(launcher or [sys.executable]), ROOT / script, *(data or own),
            "--results_dir", tmp_path / "results", "--output_dir", tmp_path / "adapter",
            "--max_length", 48, "--max_new_tokens", 12, "--logging_steps", 1, *flags,
        ]  # fmt: skip
        finished = run_command(words, cwd=tmp_path, real=real)
        assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
        return finished

    return run
