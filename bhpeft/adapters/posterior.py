"""Samples of the posterior: S weights at once, in batched passes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from bhpeft.adapters.bh_peft import gaussian_layers

TOKENS = 4096  # of a pass, where the batch itself has fewer
CPU_TOKENS = 1024  # the same on a CPU: larger passes are paged in afresh, a third of their time (docs/pitfalls.md)
BY_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # inputs whose last axis is the tokens'


def drawn_noise(model: nn.Module, samples: int, seed: int = 0) -> list[torch.Tensor]:
    """Standard normal noise of S posterior samples: a (samples, out, in) tensor on the CPU for each Gaussian matrix.

    Drawn in pairs: sample s + ceil(S / 2) has sample s's noise with the other sign (antithetic variates, Hammersley and
    Morton 1956). Each is a draw from the posterior, and what the noise moves linearly falls out of their mean.
    It depends on the seed alone, so every rank draws the same weights.

    Raises:
        ValueError: the model has no Gaussian matrix.
    """
    layers = gaussian_layers(model)
    if not layers:
        raise ValueError("no Gaussian weights to sample; train bh-peft or bayesian-lora")
    generator = torch.Generator().manual_seed(seed)
    half = [
        torch.randn(-(-samples // 2), layer.out_features, layer.in_features, generator=generator) for layer in layers
    ]
    return [torch.cat([eps, -eps])[:samples] for eps in half]


@contextlib.contextmanager
def posterior_noise(
    model: nn.Module, samples: int, seed: int = 0, noise: list[torch.Tensor] | None = None
) -> Iterator[list[torch.Tensor]]:
    """Within the block, every Gaussian matrix uses `samples` drawn weights in place of its mean.

    Rows of a batch come sample by sample: row i uses weight i // (rows / samples). The model must be in evaluation
    mode.

    Args:
        noise: what `drawn_noise` gave for these samples and this seed, to be drawn once for many batches: for one
            short text it takes a good part of a pass's time.

    Yields:
        The noise, one (samples, out, in) tensor a Gaussian matrix.

    Raises:
        ValueError: the model has no Gaussian matrix, or is in training mode; or the noise is of other samples.
    """
    if model.training:
        raise ValueError("posterior samples are drawn in evaluation mode; call model.eval() first")
    layers = gaussian_layers(model)
    noise = drawn_noise(model, samples, seed) if noise is None else noise
    if any(len(eps) != samples for eps in noise):
        raise ValueError(f"noise of {len(noise[0])} samples, yet {samples} are asked for")
    for layer, eps in zip(layers, noise, strict=True):
        layer.eps = eps
    try:
        yield noise
    finally:
        for layer in layers:
            layer.eps = None


@torch.no_grad()
def posterior_samples(model: nn.Module, inputs: dict[str, torch.Tensor], samples: int, seed: int = 0) -> torch.Tensor:
    """Logits of a batch under several weights drawn from the posterior, in one forward pass.

    Args:
        inputs: a batch of B rows, without labels.
        samples: S.

    Returns:
        (S, B, ...) logits.
    """
    with posterior_noise(model, samples, seed):
        repeated = {name: value.repeat(samples, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
        logits = model(**repeated).logits
    return logits.view(samples, -1, *logits.shape[1:])


def sampled(score: Callable[[dict], torch.Tensor], inputs: dict[str, torch.Tensor], samples: int) -> torch.Tensor:
    """Scores of B rows under each of S weights, within `posterior_noise`, in a batch's memory and less than its time.

    Ten times the rows are ten times the padding: rows of like length share a pass, cut to their longest, all S samples
    of them together. A pass has no more tokens than the batch, or `TOKENS` (`CPU_TOKENS`), or one row under all
    samples. Under ZeRO-3 all is one pass, for ranks whose rows have other lengths must run as many of them.

    Args:
        score: scores of a batch's rows, (rows, ...), whatever the padding.
        inputs: a batch of B rows with an attention_mask, (B, L) or (B, choices, L).

    Returns:
        (S, B, ...).
    """
    parts, rows, mask = [], [], inputs["attention_mask"]
    for group in [slice(None)] if is_deepspeed_zero3_enabled() else passes(mask, samples):
        part = {name: tensor[group] for name, tensor in inputs.items()}
        seen = part["attention_mask"].flatten(0, -2).any(0)  # (L,)
        part = {name: tensor[..., seen] if name in BY_TOKEN else tensor for name, tensor in part.items()}
        repeated = {name: tensor.repeat(samples, *[1] * (tensor.dim() - 1)) for name, tensor in part.items()}
        parts.append(score(repeated).unflatten(0, (samples, -1)))
        rows.append(torch.arange(len(mask), device=mask.device)[group])
    return torch.cat(parts, 1)[:, torch.cat(rows).argsort()]


def passes(mask: torch.Tensor, samples: int) -> list[torch.Tensor]:
    """Places of the rows of each pass of `sampled`, all rows once, the longest first.

    Args:
        mask: (B, L) or (B, choices, L).
    """
    least = min(CPU_TOKENS, TOKENS) if mask.device.type == "cpu" else TOKENS
    seen = mask.bool() if mask.dim() == 2 else mask.bool().any(1)
    lengths, order = seen.sum(1).sort(descending=True, stable=True)
    lengths, choices, found, start = lengths.tolist(), mask[0].numel() // seen.shape[1], [], 0
    while start < len(lengths):
        count = rows_at_once(max(mask.numel(), least), choices * lengths[start], samples)
        found.append(order[start : start + count])
        start += count
    return found


def rows_at_once(tokens: int, row_tokens: int, samples: int) -> int:
    """How many rows of so many tokens share a pass of at most `tokens`, each under all samples."""
    return max(1, tokens // (samples * max(1, row_tokens)))
