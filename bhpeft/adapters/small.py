"""Small work of the adapters on a CPU, by a little C: one call in place of some thirty tensor operations.

Matrices of 2 to 12 rows, and attention within short texts, take torch longer to dispatch than to compute: on MiniLM with
batches of 8 sentences that was a third of BH-PEFT's step. `small_matrices.c` and `small_attention.c` have them, forward and
backward, for float32 and bfloat16, one thread, with float32 sums. They are compiled at first use (about a second) into
torch's folder of extensions; where there is no compiler, and for whatever `takes` refuses, torch's operations stay. Random
numbers are torch's in both, and the same ones.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

logger = logging.getLogger(__name__)
SOURCES = ("small_rows.h", "small_matrices.c", "small_attention.c")
# Not -ffast-math: it changes how the whole process rounds, and -inf in a mask must stay what it is.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
LARGEST = 2**20  # numbers of an input, up to which one thread of C is faster
KINDS = {torch.float32: 0, torch.bfloat16: 1}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, with a line in the log, where they cannot be had."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        logger.info("small kernels are not compiled, torch's operations take their place: %s", *said or [error])
        return None
    for name in ("flipout_forward", "flipout_backward"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p]
    for name in ("up_forward", "up_backward"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p, ctypes.c_double]
    for name in ("gated_forward", "gated_backward"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p, ctypes.c_double, ctypes.c_double]
    for name in ("flipout", "up", "gated"):
        for way in ("forward", "backward"):
            getattr(loaded, f"{name}_{way}").restype = None
    return loaded


def _compiled() -> Path:
    """The library's file, named by all it depends on, so that machines of several kinds may share the folder."""
    from torch.utils.cpp_extension import get_default_build_root

    compiler = shlex.split(os.environ.get("CC") or "cc")
    command = [shutil.which(compiler[0]) or compiler[0], *compiler[1:], *FLAGS]
    here = Path(__file__).parent
    parts = [(here / name).read_bytes() for name in SOURCES]
    parts += [" ".join(command).encode(), _cpu().encode()]
    digest = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "bhpeft"
    file = folder / f"small-{digest}.so"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:  # another process may be at it too
            made = Path(beside) / file.name
            words = [*command, *(str(here / name) for name in SOURCES if name.endswith(".c")), "-o", str(made), "-lm"]
            subprocess.run(words, check=True, capture_output=True, text=True, timeout=120)
            os.replace(made, file)
    return file


def _cpu() -> str:
    """What -march=native goes by."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))


def takes(x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the functions here take these tensors: on a CPU, x in float32 or bfloat16 and not large, the parameters
    behind it in float32; plain tensors, with gradients, and not while torch compiles or counts without computing."""
    return (
        type(x) is torch.Tensor
        and x.device.type == "cpu"
        and x.dtype in KINDS
        and 0 < x.numel() <= LARGEST
        and torch.is_grad_enabled()
        and all(
            other is None or other.dtype == torch.float32 and type(other) in (torch.Tensor, torch.nn.Parameter)
            for other in others
        )
        and not torch.compiler.is_compiling()
        and library() is not None
    )


def _call(name: str, values: list[int], *numbers: float) -> None:
    getattr(library(), name)((ctypes.c_int64 * len(values))(*values), *numbers)


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class SmallFlipout(torch.autograd.Function):
    """`gaussian.py: _Flipout`, the same but for rounding; signs and eps are drawn by the caller."""

    @staticmethod
    def forward(ctx, x, mu, g, layer, dtype, signs, eps):
        if not (x.is_contiguous() or x[0].is_contiguous()):  # examples may be one and the same
            x = x.contiguous()
        mu, g, prior_mu, prior_sigma = (t.contiguous() for t in (mu, g, layer.prior_mu, layer.prior_sigma))
        y, kept = x.new_empty((*x.shape[:-1], len(mu)), dtype=dtype), mu.new_empty((5, *mu.shape))
        kl, sigma, square = (mu.new_empty(()) for _ in range(3))
        tokens = x[0].numel() // mu.shape[1]
        sizes = [len(x), tokens, mu.shape[1], len(mu), x.stride(0), KINDS[x.dtype], KINDS[dtype]]
        tensors = (x, mu, g, prior_mu, prior_sigma, eps, signs, kept, kl, sigma, square, y)
        _call("flipout_forward", [*sizes, *map(_at, tensors), 0, 0, 0, 0, 0])
        layer.mean_sigma, layer.kl_gradient_square, layer.nll_gradient_square = sigma, square, None
        ctx.save_for_backward(x, signs, kept)
        ctx.layer, ctx.sizes = layer, sizes
        ctx.set_materialize_grads(False)
        return y, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, by_y, by_kl):
        x, signs, kept = ctx.saved_tensors
        layer = ctx.layer
        layer.kl = layer.kl.detach()  # as in _Flipout
        by_x = x.new_empty(x.shape) if by_y is not None and ctx.needs_input_grad[0] else None
        by_mu, by_g, square = torch.empty_like(kept[0]), torch.empty_like(kept[0]), kept.new_empty(())
        by_y = None if by_y is None else by_y.contiguous()
        tensors = x, None, None, None, None, None, signs, kept, None, None, square, None, by_y, by_kl, by_x, by_mu, by_g
        _call("flipout_backward", [*ctx.sizes, *map(_at, tensors)])
        if by_y is not None:
            before = layer.nll_gradient_square
            layer.nll_gradient_square = square if before is None else before + square
        return by_x, by_mu, by_g, None, None, None, None


class SmallUp(torch.autograd.Function):
    """y = onto + scale * (a(x) W^T + b), a(x) = x or ReLU(x): x (..., in), W (out, in), b (out,) or None, `onto` None
    or (..., out), which gives y its dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, onto, relu, scale, dtype):
        x, weight = x.contiguous(), weight.contiguous()
        onto = None if onto is None else onto.contiguous()
        y = x.new_empty((*x.shape[:-1], len(weight)), dtype=dtype)
        kept = weight.new_empty(weight.shape[::-1])  # a copy: ZeRO-3 frees the parameter's storage
        tokens = x.numel() // weight.shape[1]
        kinds = [KINDS[x.dtype], KINDS[dtype], 0 if onto is None else KINDS[onto.dtype]]
        sizes = [tokens, weight.shape[1], len(weight), *kinds, int(relu)]
        _call("up_forward", [*sizes, *map(_at, (x, weight, bias, onto, kept, y)), 0, 0, 0, 0], scale)
        ctx.save_for_backward(x, kept)
        ctx.sizes, ctx.scale, ctx.of_onto = sizes, scale, None if onto is None else onto.dtype
        ctx.biased = bias is not None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, by_y):
        x, kept = ctx.saved_tensors
        by_y = by_y.contiguous()
        by_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        by_weight = kept.new_empty(kept.shape[::-1])
        by_bias = kept.new_empty(kept.shape[1]) if ctx.biased else None
        tensors = x, None, None, None, kept, None, by_y, by_x, by_weight, by_bias
        _call("up_backward", [*ctx.sizes, *map(_at, tensors)], ctx.scale)
        return by_x, by_weight, by_bias, None if ctx.of_onto is None else by_y.to(ctx.of_onto), None, None, None


NOWHERE = [0, 0, 0, 0]


def _place(tensor: torch.Tensor) -> list[int]:
    return [tensor.data_ptr(), *tensor.stride()[:3]]


class SmallGated(torch.autograd.Function):
    """`prefix_attention.py: _Gated`, the same but for rounding, with prefix and text apart: query (B, heads, L, D); keys and
    values (B, KV heads, T or P, D); gate (heads,); mask over the text, (B or 1, heads or 1, L, T), or None; the numbers
    that say what dropout leaves, and the least that stays; None without.

    Returns (B, heads, L, D), whose heads lie side by side, and the text's weights (B, heads, L, T).
    """

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, gate, mask, scaling, dropout, drawn, threshold):
        tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, prefix_key, prefix_value)]
        query, key, value, prefix_key, prefix_value = tensors
        lanes = library().small_lanes()
        (batch, heads, length, width), (_, kv_heads, total, _), prefix = query.shape, key.shape, prefix_key.shape[2]
        left, right = (-(-n // lanes) * lanes for n in (prefix, total))
        shares = query.new_empty((batch, heads, length, left + right), dtype=torch.float32)
        share = shares.new_empty((batch, heads, length))
        output = query.new_empty((batch, length, heads, width)).transpose(1, 2)
        mask_kind = 3 if mask is None else 2 if mask.dtype == torch.bool else KINDS[mask.dtype]
        sizes = [batch, heads, heads // kv_heads, length, prefix, total, width, KINDS[query.dtype], mask_kind]
        places = [place for tensor in tensors for place in _place(tensor)]
        if mask is None:
            of_mask = NOWHERE
        else:
            mask = mask.expand(batch, heads, length, total)
            mask = mask if mask.stride(-1) == 1 else mask.contiguous()
            of_mask = _place(mask)
        gate = gate.contiguous()
        rest = [threshold, _at(shares), _at(share), *_place(output), *NOWHERE * 6, 0]
        _call("gated_forward", [*sizes, *places, *of_mask, _at(gate), _at(drawn), *rest], scaling, dropout)
        ctx.save_for_backward(*tensors, gate, drawn, shares, share)
        ctx.sizes, ctx.numbers, ctx.threshold = sizes, (scaling, dropout), threshold
        text = shares[..., left : left + total]
        ctx.mark_non_differentiable(text)
        return output, text

    @staticmethod
    @once_differentiable
    def backward(ctx, by_output, _):
        *tensors, gate, drawn, shares, share = ctx.saved_tensors
        by_output = by_output if by_output.stride(-1) == 1 else by_output.contiguous()
        # As the base's layers and the prefix lay them out: heads of one token side by side.
        found = [t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2) for t in tensors]
        by_gate = torch.empty_like(gate)
        places = [place for tensor in tensors for place in _place(tensor)]
        rest = [_at(gate), _at(drawn), ctx.threshold, _at(shares), _at(share), *NOWHERE, *_place(by_output)]
        by = [place for tensor in found for place in _place(tensor)]
        _call("gated_backward", [*ctx.sizes, *places, *NOWHERE, *rest, *by, _at(by_gate)], *ctx.numbers)
        return *found, by_gate, None, None, None, None, None
