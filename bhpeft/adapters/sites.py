"""The three places of a transformer layer where the tuner adds something; each can be switched off and on.

    LoRA               q += (alpha / r) B A x                        Hu et al. 2022
    parallel adapter   h = FFN(x) + s W_up ReLU(W_down x), s = 4     He et al. 2022, before residual and norm
    prefix             K_p, V_p = W_up tanh(W_down E)                Li & Liang 2021; E, W_down shared by all layers

What is added is added to a module's *output*, so that Linear, Conv1D and 4-bit layers are one case. Each site holds its
parts in a dictionary by adapter name, as peft expects; one adapter is active at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn


class Site(nn.Module, BaseTunerLayer):
    """Part of a tuner that peft can find, save, freeze and switch."""

    adapter_layer_names = ("bh_parts",)
    other_param_names = ()

    def __init__(self):
        super().__init__()
        self.bh_parts = nn.ModuleDict()

    def part(self) -> nn.Module | None:
        """What is active here, or None if the adapter is off."""
        if self._disable_adapters:
            return None
        active, parts = self._active_adapter, self.bh_parts._modules  # each site runs for each token: no detours
        for name in (active,) if isinstance(active, str) else active:
            if name in parts:
                return parts[name]
        return None

    def _no_merge(self, *args, **kwargs):
        raise NotImplementedError(
            "a BH-PEFT adapter cannot be merged in place; where LoRA is its only site, util/export_adapter.py --to "
            "merged does it (prefix and parallel adapter have no weight to merge into)"
        )

    merge = unmerge = _no_merge


class LoraSite(Site):
    """base(x) + delta(x), around a linear layer of any kind."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """base(x) + delta(x), in the dtype of base(x); base(x) alone where the adapter is off."""
        result = self.base_layer(x, *args, **kwargs)
        part = self.part()
        return result if part is None else part(x, onto=result)


class ParallelSite(LoraSite):
    """FFN(x) + delta(x), around a feed-forward block that is one module."""


class ParallelEntrySite(Site):
    """The first layer of a feed-forward block in two modules (BERT, RoBERTa): takes delta(x) of the block's input."""

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.delta: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """base(x); delta(x) is kept for the block's exit."""
        part = self.part()
        self.delta = None if part is None else part(x)
        return self.base_layer(x, *args, **kwargs)


class ParallelExitSite(Site):
    """The last layer of such a block: adds what the entry took, before dropout, residual and norm."""

    def __init__(self, base_layer: nn.Module, entry: ParallelEntrySite):
        super().__init__()
        self.base_layer = base_layer
        self._entry = [entry]  # in a list: not a submodule of this one

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """base(x) + the entry's delta, which is given up with it."""
        result = self.base_layer(x, *args, **kwargs)
        delta, self._entry[0].delta = self._entry[0].delta, None
        return result if delta is None else result + delta.to(result.dtype)


class PrefixHidden(nn.Module):
    """tanh(W_down E), what all layers' prefixes are made from: (n, P, bottleneck), n as `GaussianLinear` returns."""

    def __init__(self, length: int, width: int, down: nn.Module):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(length, width) * 0.02)
        self.down = down

    def forward(self, batch: int) -> torch.Tensor:
        """(n, P, bottleneck) for `batch` rows that share the prefix: n is 1, S or `batch`."""
        hidden = torch.tanh(self.down(self.embedding.clone(), batch))
        return hidden if hidden.dim() == 3 else hidden[None]


class PrefixSource(Site):
    """Sits on the backbone and computes the shared hidden prefix once a forward pass, before its first layer."""

    def __init__(self):
        super().__init__()
        self.hidden: torch.Tensor | None = None
        self.kept: dict[PrefixSite, tuple] | None = None  # each layer's prefix, where weights do not change meanwhile

    def before_backbone(self, args: tuple, kwargs: dict) -> None:
        """Compute the hidden prefix for the batch that the backbone is called with."""
        part = self.part()
        if part is not None and self.kept and self.hidden is not None:
            return
        tensors = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        batch = next(len(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor))
        self.hidden = None if part is None else part(batch)


class PrefixUp(nn.Module):
    """One layer's K_p and V_p from the hidden prefix, and its gate."""

    def __init__(self, up: nn.Module, heads: int, head_width: int, kv_heads: int, gated: bool):
        super().__init__()
        self.up, self.kv_heads, self.head_width = up, kv_heads, head_width
        self.gate = nn.Parameter(torch.zeros(heads)) if gated else None

    def forward(self, hidden: torch.Tensor, rows: int):
        """K_p and V_p for `rows` rows, each (rows, kv_heads, P, head_width), and the gate (heads,) or None."""
        pair = self.up(hidden)  # (n, P, 2 * kv_heads * head_width)
        n, length, _ = pair.shape
        pair = pair.view(n, length, 2, self.kv_heads, self.head_width).permute(2, 0, 3, 1, 4)
        if n == 1:
            pair = pair.expand(2, rows, -1, -1, -1)
        elif n != rows:  # S samples over S * B rows, sample by sample
            pair = pair.repeat_interleave(rows // n, 1)
        keys, values = pair.unbind()
        return keys, values, None if self.gate is None else self.gate.clone()


class PrefixSite(Site):
    """On an attention module as `bh_prefix`: gives its layer's prefix to the attention function."""

    def __init__(self, source: PrefixSource):
        super().__init__()
        self._source = [source]  # in a list: not a submodule of this one

    def forward(self, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """(rows, KV heads, P, head width) keys and values, and a gate a head or None; None if the adapter is off."""
        part, source = self.part(), self._source[0]
        if part is None or source.hidden is None:
            return None
        made = None if source.kept is None else source.kept.get(self)
        if made is None or made[0].shape[0] != rows:
            made = part(source.hidden, rows)
            if source.kept is not None:
                source.kept[self] = made
        return made


@contextlib.contextmanager
def prefix_kept(model: nn.Module) -> Iterator[None]:
    """Within the block each layer's prefix is computed once and used again.

    It is for many forward passes with the same weights, or the same samples of them, and batches of one size: the
    tokens of one answer. Not for training, nor under ZeRO-3, where every rank runs every module.
    """
    sources = [module for module in model.modules() if isinstance(module, PrefixSource)]
    for source in sources:
        source.kept = {}
    try:
        yield
    finally:
        for source in sources:
            source.kept = None
