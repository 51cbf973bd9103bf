"""Attention over a learned prefix, through transformers' attention interface.

    K' = [K_p; K],  V' = [V_p; V]                                       Li & Liang 2021
    Attn(q, K', V') = (1 - l) Attn(q, K, V) + l Attn(q, K_p, V_p)       He et al. 2022, eq. 6; l: the prefix's share
    ours: share g l in place of l, a gate g a head that starts at 0, so that attention starts as it was:
    out = Attn(q, K, V) + g (Attn(q, K', V') - Attn(q, K, V))

Every current transformers model calls the function that `config._attn_implementation` names, with its attention module
first. The functions registered here look for a `bh_prefix` on that module and call the model's own implementation
around it: sdpa twice, for the text and for both. Where attention is "eager", both come of one product (`_merged`).
Positions and the KV cache stay as they are: the prefix is put before what the cache returns, each time. An encoder
without a prefix calls them too: on CPUs dropout keeps torch from fused attention, and C takes its place (`_alone`).
"""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bhpeft.adapters import small
from bhpeft.adapters.architectures import PLACES
from bhpeft.errors import InputError

SUPPORTED = ("sdpa", "eager")


def use_short_attention(model: nn.Module) -> None:
    """Let an encoder of a known architecture train by `_alone` where it can, on CPUs."""
    known = model.config.model_type in PLACES and model.config._attn_implementation in SUPPORTED
    if known and not torch.cuda.is_available():
        use_prefix_attention(model)


def use_prefix_attention(model: nn.Module) -> None:
    """Make a model call the functions below.

    Raises:
        InputError: the model runs an implementation that is not supported. flash_attention_2 is refused because it
            takes no mask, and a prefix that padding must not hide needs one.
    """
    current = model.config._attn_implementation
    if current.startswith("bhpeft_"):
        return
    if current not in SUPPORTED:
        raise InputError(
            f"--attn_implementation {current}: the prefix widens the attention mask, which {current} does not take; "
            f"give {' or '.join(SUPPORTED)}"
        )
    model.config._attn_implementation = f"bhpeft_{current}"


def _base_attention(module: nn.Module, name: str):
    if name == "eager":  # each model file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _attend(name: str):
    def attend(module, query, key, value, attention_mask, **kwargs):
        base = _base_attention(module, name)
        site = getattr(module, "bh_prefix", None)
        prefix = site(query.shape[0]) if site is not None else None
        if name == "eager" and prefix is not None and prefix[2] is not None:
            return _merged(module, query, key, value, attention_mask, prefix, **kwargs)
        if prefix is None:
            found = _alone(module, query, key, value, attention_mask, **kwargs)
            return base(module, query, key, value, attention_mask, **kwargs) if found is None else found
        output, weights = None, None
        if prefix[2] is not None:
            output, weights = base(module, query, key, value, attention_mask, **kwargs)
        prefix_key, prefix_value, gate = prefix
        mask = causal_mask(module, query, key, attention_mask, kwargs.get("is_causal"))
        mask = widened(mask, prefix_key.shape[2])
        keys = torch.cat([prefix_key.to(key.dtype), key], 2)
        values = torch.cat([prefix_value.to(value.dtype), value], 2)
        both, seen = base(module, query, keys, values, mask, **kwargs)  # (B, L, heads, head width)
        if gate is None:
            return both, None if seen is None else seen[..., prefix_key.shape[2] :]
        return torch.lerp(output, both, gate.to(output.dtype)[:, None]), weights

    return attend


class _Gated(torch.autograd.Function):
    """Gated attention from one product with the keys of both, q K'^T = [s_p, s_t], prefix and text:

        l = sum of softmax([s_p, s_t]) over the prefix
        P = softmax(s_p),   T = softmax(s_t),   a = g l,   out = [a P, (1 - a) T] [V_p; V]

    and with [D_p, D_t] = dL/dout [V_p; V]^T and, row by row, A_p = D_p . P and A_t = D_t . T:

        dL/da = A_p - A_t,   dL/dg = sum of l dL/da,   e = a (1 - l) dL/da
        dL/ds_p = P (a (D_p - A_p) + e),   dL/ds_t = T ((1 - a) (D_t - A_t) - e)

    Nothing is divided by what one side leaves of the joint softmax, which may be nothing. One node of the graph in
    place of about twenty, whose overhead is the larger part of the time where texts are short.
    """

    @staticmethod
    def forward(ctx, query, keys, values, gate, mask, length, scaling, dropout, drawn, threshold):
        scaled = query * scaling
        scores = scaled @ keys.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        if scores.dtype != torch.float64:
            scores = scores.float()
        share = _softmax(scores)[..., :length].sum(-1, keepdim=True)
        of_prefix, of_text = _softmax(scores[..., :length]), _softmax(scores[..., length:])
        gated = gate.to(scores.dtype)[:, None, None] * share
        weights = torch.cat([of_prefix * gated, of_text * (1 - gated)], -1).to(query.dtype)
        kept = None
        if drawn is not None:
            kept = (drawn[: weights.numel()].view(weights.shape) >= threshold).to(weights.dtype).div_(1 - dropout)
            weights = weights * kept
        ctx.save_for_backward(scaled, keys, values, weights, of_prefix, of_text, share, gated, kept)
        ctx.length, ctx.scaling, ctx.gate_kind = length, scaling, gate.dtype
        ctx.mark_non_differentiable(of_text)
        return weights @ values, of_text

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output, _):
        scaled, keys, values, weights, of_prefix, of_text, share, gated, kept = ctx.saved_tensors
        by_output = by_output.to(values.dtype)
        by_values = weights.transpose(2, 3) @ by_output
        by_weights = by_output @ values.transpose(2, 3)
        if kept is not None:
            by_weights = by_weights * kept
        by_prefix, by_text = by_weights.to(of_text.dtype).split((ctx.length, of_text.shape[-1]), -1)
        mean_prefix, mean_text = (
            (by_prefix * of_prefix).sum(-1, keepdim=True),
            (by_text * of_text).sum(-1, keepdim=True),
        )
        by_gated = mean_prefix - mean_text
        moved = by_gated * gated * (1 - share)
        by_prefix = (by_prefix - mean_prefix).mul_(gated).add_(moved).mul_(of_prefix)
        by_text = (by_text - mean_text).mul_(1 - gated).sub_(moved).mul_(of_text)
        by_scores = torch.cat([by_prefix, by_text], -1).to(keys.dtype)
        by_gate = (by_gated * share).sum((0, 2, 3)).to(ctx.gate_kind)
        by_query = (by_scores @ keys).mul_(ctx.scaling)
        return by_query, by_scores.transpose(2, 3) @ scaled, by_values, by_gate, *[None] * 6


def _softmax(scores: torch.Tensor) -> torch.Tensor:
    """Over the last axis. On CPUs torch 2.13 takes up to ten times as long for widths that are no multiple of 8."""
    missing = -scores.shape[-1] % 8
    if scores.device.type != "cpu" or not missing:
        return scores.contiguous().softmax(-1)
    padded = nn.functional.pad(scores, (0, missing), value=-torch.inf)
    return padded.softmax(-1)[..., :-missing].contiguous()


def _merged(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    prefix: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated attention over prefix and text, in the query's dtype, softmaxes in float32.

    Args:
        query, key, value: (B, heads or KV heads, L or T, D).

    Returns:
        (B, L, heads, D), and the text's weights softmax(s_t), (B, heads, L, T).
    """
    prefix_key, prefix_value, gate = prefix
    length, kind = prefix_key.shape[2], query.dtype
    key, value, prefix_key, prefix_value = (t.to(kind) for t in (key, value, prefix_key, prefix_value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dropout, drawn, threshold = _drawn(query, length + key.shape[2], dropout if module.training else 0.0)
    mask = causal_mask(module, query, key, mask, is_causal)
    both = (query, key, value, prefix_key, prefix_value)
    if small.takes(query.numel(), query, gate) and (mask is None or mask.dtype in (torch.bool, *small.KINDS)):
        output, weights = small.gated(*both, gate, mask, scaling, dropout, drawn, threshold)
        return output.transpose(1, 2), weights
    mask = widened(mask, length)
    keys, values = torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2)
    if (groups := query.shape[1] // key.shape[1]) > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    with torch.autocast(query.device.type, enabled=False):  # dtypes are settled here, in both directions alike
        output, weights = _Gated.apply(query, keys, values, gate, mask, length, scaling, dropout, drawn, threshold)
    return output.transpose(1, 2), weights


def _alone(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Attention over the text alone in C, which is `_merged` with a prefix of no rows; else None.

    For small inputs with dropout, which keeps torch from its fused attention on CPUs; with masks that leave every query
    a key, as encoders have them.
    """
    if not dropout or not module.training or getattr(module, "is_causal", True) or is_causal:
        return None
    if not small.takes(query.numel(), query) or key.dtype != query.dtype or value.dtype != query.dtype:
        return None
    if mask is not None and mask.dtype not in (torch.bool, *small.KINDS):
        return None
    nothing, gate = key[:, :, :0], torch.zeros(query.shape[1])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    drawn = _drawn(query, key.shape[2], dropout)
    output, weights = small.gated(query, key, value, nothing, nothing, gate, mask, scaling, *drawn)
    return output.transpose(1, 2), weights


def _drawn(query: torch.Tensor, total: int, dropout: float) -> tuple[float, torch.Tensor | None, int]:
    """A random number a weight, and the least that stays. Of 16 bits, for drawing takes longer than what it is for; the
    probability is the nearest that they can express, and is returned."""
    share, least = small.dropped_below(dropout)
    if share == 0:
        return 0.0, None, 0
    count = query.shape[:3].numel() * total
    return share, small.random_numbers(count, torch.int16, query.device), least


def causal_mask(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, is_causal: bool | None
) -> torch.Tensor | None:
    """The mask, or if there is none and attention is causal the one that says so; None if all queries see all keys.

    Args:
        query, key: (B, heads, L, D) and (B, KV heads, T, D), the key with what the cache holds.
        mask: (B or 1, 1 or heads, L, T), boolean (True: seen) or added to the scores; None where nothing is masked
            beyond causality, which is then made explicit, for the last query sees the last key.
    """
    length, total = query.shape[2], key.shape[2]
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if mask is not None or not causal or length == 1:
        return mask
    return torch.ones(length, total, dtype=torch.bool, device=query.device).tril(total - length)[None, None]


def widened(mask: torch.Tensor | None, prefix_length: int) -> torch.Tensor | None:
    """The mask, (.., L, T), with columns for the prefix, which every query sees: (.., L, prefix_length + T)."""
    if mask is None:
        return None
    seen = mask.new_ones if mask.dtype == torch.bool else mask.new_zeros
    return torch.cat([seen(*mask.shape[:-1], prefix_length), mask], -1)


for _name in SUPPORTED:
    AttentionInterface.register(f"bhpeft_{_name}", _attend(_name))
    AttentionMaskInterface.register(f"bhpeft_{_name}", ALL_MASK_ATTENTION_FUNCTIONS[_name])
