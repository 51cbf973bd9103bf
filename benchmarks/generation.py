"""How long until the chat's first token, against plain `generate`; how fast the hybrid generates, against its base?

    python benchmarks/generation.py --base_model FOLDER [--adapter_name hybrid] [--dtype bfloat16]
    python benchmarks/generation.py --tokenizer FOLDER_OF_GPT2_VOCAB [--shape gpt2 | gpt2-medium]

The second takes random weights in GPT-2's shape: speed does not depend on them. The adapter is untrained, its gates
opened. Each figure is the median over repeats, base and adapter taken in turn, in one process; only their ratios mean
anything on another machine, and where other programs run, CPU seconds mean more than the clock's. Targets: first token
within 1.5 times, the adapter at least 0.8 of the base's tokens a second. Prints a table and writes
results/benchmarks/generation.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from classify import PRECISIONS, quieten  # noqa: E402

quieten()

import torch  # noqa: E402
from chat import Terminal  # noqa: E402
from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast  # noqa: E402

from bhpeft.adapters import attach_adapter  # noqa: E402
from bhpeft.arguments import ADAPTER_NAMES, AdapterArguments  # noqa: E402
from bhpeft.base_model import load_base_model, load_tokenizer  # noqa: E402
from bhpeft.chat import ChatModel, Settings  # noqa: E402
from bhpeft.environment import hardware, library_versions  # noqa: E402
from bhpeft.errors import InputError, run_main  # noqa: E402
from bhpeft.files import write_atomic  # noqa: E402
from bhpeft.prediction import generate, greedy_config  # noqa: E402
from bhpeft.tasks.conversation import DialogueEncoder  # noqa: E402

SHAPES = {"gpt2": (768, 12, 12), "gpt2-medium": (1024, 24, 16)}  # width, layers, heads
TEMPLATE = "User: {text_input}\nAssistant:"
MESSAGE = "Tell me how the tides come about, and why there are two of them a day. " * 4


def gpt2_shaped(shape: str, vocabulary: Path, folder: Path) -> None:
    """A GPT-2 of random weights with the real tokenizer's `vocab.json` and `merges.txt`, saved into a folder."""
    tokenizer = Tokenizer(models.BPE.from_file(str(vocabulary / "vocab.json"), str(vocabulary / "merges.txt")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end).save_pretrained(folder)
    width, layers, heads = SHAPES[shape]
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=layers, n_head=heads)).save_pretrained(folder)


def open_gates(model: torch.nn.Module) -> None:
    """Give what starts at zero a value, so that nothing is skipped."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("gate" in name or not parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)


class Clock(io.StringIO):
    """Takes what is printed, and notes when the first piece of an answer came."""

    first: float | None = None

    def write(self, text: str) -> int:
        if self.first is None and text.strip() and not text.endswith("> "):
            self.first = time.perf_counter()
        return len(text)


def visible_from(chat: ChatModel) -> int:
    """Which token of the answer is the first with text to be seen: others are spaces, or a part of a character."""
    answer = chat.ask((), MESSAGE, Settings(max_new_tokens=8, do_sample=False))
    for _ in answer:
        answer.stop()
    for i, piece in enumerate(answer.pieces, 1):
        if piece.strip():
            return i
    raise InputError("the answer has no visible text, so that nothing can be timed; give another --base_model")


def first_token(chat: ChatModel, tokens: int) -> tuple[float, float]:
    """Seconds until there is something to see: plain `generate` of as many tokens, and the terminal."""
    ids = torch.tensor([chat.prompt((), MESSAGE, tokens)[0]], device=chat.model.device)
    started = time.perf_counter()
    made = generate(chat.model, ids, torch.ones_like(ids), greedy_config(chat.tokenizer, tokens))
    chat.tokenizer.decode(made[0])
    plain = time.perf_counter() - started
    clock = Clock()
    with contextlib.redirect_stdout(clock):
        terminal = Terminal(chat, Settings(max_new_tokens=tokens + 3, do_sample=False), False)
        started = time.perf_counter()
        terminal.ask(MESSAGE)
    return plain, clock.first - started


def speed(chat: ChatModel, tokens: int, adapted: bool) -> tuple[float, float]:
    """Tokens a second of one answer, its prompt included: by the clock, and of this process's CPU time."""
    ids = torch.tensor([chat.prompt((), MESSAGE, tokens)[0]], device=chat.model.device)
    config = greedy_config(chat.tokenizer, tokens)
    config.min_new_tokens = tokens
    with chat.switched(adapted):
        started, used = time.perf_counter(), time.process_time()
        generate(chat.model, ids, torch.ones_like(ids), config)
    return tokens / (time.perf_counter() - started), tokens / (time.process_time() - used)


def measure(base_model: str, flags: argparse.Namespace) -> dict:
    """All repeats: seconds to the first token (plain, terminal), tokens a second and a CPU second (base, adapter)."""
    tokenizer = load_tokenizer(base_model)
    arguments = AdapterArguments(adapter_name=flags.adapter_name)
    model = load_base_model(base_model, PRECISIONS[flags.dtype], flags.load_in_4bit)
    model = attach_adapter(model, arguments, base_model).eval()
    open_gates(model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    encoder = DialogueEncoder(tokenizer, TEMPLATE, 2**62, later=TEMPLATE)
    chat = ChatModel(model, encoder, base_model, flags.adapter_name, None, model.config.max_position_embeddings)
    visible = visible_from(chat)
    first_token(chat, visible), speed(chat, 8, True), speed(chat, 8, False)  # warm
    found: dict = {name: [] for name in ("plain", "terminal", "base", "adapter", "base_cpu", "adapter_cpu")}
    for _ in range(flags.repeats):
        plain, terminal = first_token(chat, visible)
        found["plain"].append(plain)
        found["terminal"].append(terminal)
        for name, on in (("base", False), ("adapter", True)):
            clock, cpu = speed(chat, flags.tokens, on)
            found[name].append(clock)
            found[f"{name}_cpu"].append(cpu)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", help="hub id or folder of a causal model")
    parser.add_argument("--tokenizer", type=Path, help="folder with GPT-2's vocab.json and merges.txt")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2", help="of the random model (default: gpt2)")
    parser.add_argument("--adapter_name", choices=ADAPTER_NAMES, default="hybrid")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32")
    parser.add_argument("--load_in_4bit", action="store_true")
    parser.add_argument("--tokens", type=int, default=64, help="generated a repeat (default: 64)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "results/benchmarks/generation.json")
    flags = parser.parse_args()
    if (flags.base_model is None) == (flags.tokenizer is None):
        raise InputError("--base_model and --tokenizer: give one of them")
    with tempfile.TemporaryDirectory() as folder:
        if flags.tokenizer:
            gpt2_shaped(flags.shape, flags.tokenizer, Path(folder))
        found = measure(flags.base_model or folder, flags)
    name = Path(flags.base_model).name if flags.base_model else f"{flags.shape}, random weights"
    median = {key: statistics.median(values) for key, values in found.items()}
    ratios = {
        "first_token": median["terminal"] / median["plain"],
        "tokens_per_second": median["adapter"] / median["base"],
        "tokens_per_cpu_second": median["adapter_cpu"] / median["base_cpu"],
    }
    print(f"{name}, {flags.adapter_name}, {flags.dtype}, {hardware()['gpu']} GPU, {torch.get_num_threads()} threads\n")
    print(f"{'':<34}{'plain / base':>14}{'chat / adapter':>16}{'ratio':>8}{'target':>9}")
    for label, left, right, ratio, target, unit in (
        ("seconds to the first token", "plain", "terminal", "first_token", "<= 1.5", ".4f"),
        ("tokens a second", "base", "adapter", "tokens_per_second", ">= 0.8", ".1f"),
        ("tokens a CPU second", "base_cpu", "adapter_cpu", "tokens_per_cpu_second", "", ".1f"),
    ):
        print(f"{label:<34}{median[left]:>14{unit}}{median[right]:>16{unit}}{ratios[ratio]:>8.3f}{target:>9}")
    runs = json.loads(flags.out.read_text())["runs"] if flags.out.is_file() else []
    settings = {"model": name, **{key: getattr(flags, key) for key in ("adapter_name", "dtype", "load_in_4bit")}}
    settings |= {"tokens": flags.tokens, "threads": torch.get_num_threads(), **hardware()}
    runs = [run for run in runs if run["settings"] != settings]
    runs.append({"settings": settings, "ratios": ratios, "medians": median, "repeats": found})
    write_atomic(flags.out, json.dumps({"runs": runs, "versions": library_versions()}, indent=2) + "\n")


if __name__ == "__main__":
    run_main(main)
