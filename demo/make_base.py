"""Train the demo's base from scratch: a small LLaMA-shaped model that has read the plain text of the world.

    python demo/make_base.py --out demo/base

The folder it writes is part of the repository; this script shows where it comes from and can make it anew.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from world import plain_sentences, statements

BEGIN, END, PAD = "<s>", "</s>", "<pad>"
BLOCK, BATCH = 128, 32  # tokens in a training block, blocks in a step


def train_tokenizer(lines: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: most words of the world are one token, and any other text still encodes."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        lines,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[BEGIN, END, PAD],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained model; its widths are multiples of 64, the block size of 4-bit (NF4) weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, seed: int):
    """Tokens without end: lines of plain text, a few to a document, with the end token between documents."""
    rng = random.Random(seed)
    while True:
        lines = plain_sentences(rng.getrandbits(32))
        encoded = tokenizer(lines)["input_ids"]
        newline = tokenizer("\n")["input_ids"]
        for ids in encoded:
            if rng.random() < 0.5:
                yield from [tokenizer.eos_token_id] + [tokenizer.bos_token_id] * (rng.random() < 0.5)
            else:
                yield from newline
            yield from ids


def next_batch(stream) -> torch.Tensor:
    """The next blocks of the stream; they begin anywhere, in the middle of a line too."""
    return torch.tensor([[next(stream) for _ in range(BLOCK)] for _ in range(BATCH)])


def optimizers(model: torch.nn.Module, steps: int, rate: float) -> tuple[list, list]:
    """Muon for the layers' matrices, AdamW for the rest; a short warm-up, then a half cosine down to zero."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    both = [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)))

    return both, [torch.optim.lr_scheduler.LambdaLR(opt, factor) for opt in both]


def check_unseen(lines: list[str]) -> None:
    """Fail if any statement, or an answer in the form that the adapter learns, occurs in the plain text."""
    text = "\n".join(lines)
    for row in statements():
        assert row.text_input not in text, row.text_input
    assert "True," not in text and "False," not in text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "base", help="folder to write")
    parser.add_argument("--steps", type=int, default=1200, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--vocab", type=int, default=768)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    sample = [line for seed in range(4) for line in plain_sentences(seed)]
    check_unseen(sample)
    tokenizer = train_tokenizer(sample, args.vocab)
    model = new_model(tokenizer).train()
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, e.g. "
        f"{tokenizer.tokenize('Do penguins lay eggs? No.')}",
        flush=True,
    )
    opts, plans = optimizers(model, args.steps, args.lr)
    data, start, mean = token_stream(tokenizer, args.seed), time.time(), None
    for step in range(1, args.steps + 1):
        batch = next_batch(data)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in [*opts, *plans]:
            each.step()
        model.zero_grad()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 0 or step == args.steps:
            spent = time.time() - start
            print(f"step {step}/{args.steps}  loss {mean:.3f}  {spent:.0f} s", file=sys.stderr, flush=True)
    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
