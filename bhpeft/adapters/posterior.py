"""Samples of the posterior: S weights at once, in one batched pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from bhpeft.adapters.bh_peft import gaussian_layers


@contextlib.contextmanager
def posterior_noise(model: nn.Module, samples: int, seed: int = 0) -> Iterator[list[torch.Tensor]]:
    """Within the block, every Gaussian matrix uses `samples` drawn weights in place of its mean.

    Rows of a batch come sample by sample: row i uses weight i // (rows / samples). The model must be in evaluation
    mode. The noise depends on the seed alone, so every rank draws the same weights.

    Yields:
        The noise, one (samples, out, in) tensor a Gaussian matrix.

    Raises:
        ValueError: the model has no Gaussian matrix, or is in training mode.
    """
    layers = gaussian_layers(model)
    if not layers:
        raise ValueError("no Gaussian weights to sample; train with --bayesian down or all")
    if model.training:
        raise ValueError("posterior samples are drawn in evaluation mode; call model.eval() first")
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        layer.eps = torch.randn(samples, layer.out_features, layer.in_features, generator=generator)
    try:
        yield [layer.eps for layer in layers]
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
