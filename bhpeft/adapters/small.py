"""Small work of the adapters on a CPU, by a little C: one call in place of some thirty tensor operations.

Matrices of 2 to 12 rows, and attention within short texts, take torch longer to dispatch than to compute: on MiniLM
with batches of 8 sentences that was a quarter of BH-PEFT's step. `small_matrices.c` and `small_attention.c` have them,
and `small_gelu.c` the base's GELU, forward and backward, for float32 and bfloat16, in one thread, with float32 sums.
They are compiled at first use (a second) into torch's folder of extensions. Where there is no compiler, and for
whatever `takes` refuses, torch's operations stay. Random numbers are torch's in both, and the same ones.
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
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.activations import GELUActivation

logger = logging.getLogger(__name__)
SOURCES = ("small_rows.h", "small_matrices.c", "small_attention.c", "small_gelu.c")
# Not -ffast-math: it changes how the whole process rounds, and -inf in a mask must stay what it is.
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fPIC", "-shared")
LARGEST = 2**21  # numbers of an input times torch's threads, up to which C is faster: in one thread twice as fast
PLAIN = (torch.Tensor, torch.nn.Parameter)
KINDS = {torch.float32: 0, torch.bfloat16: 1}
floats = functools.partial(torch.empty, dtype=torch.float32)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None, with a line in the log, where they cannot be had."""
    try:
        loaded = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1:]
        logger.info("small kernels are not compiled, torch's operations take their place: %s", *said or [error])
        return None
    for name in ("flipout_forward", "flipout_backward", "gelu_forward", "gelu_backward"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p]
    for name in ("up_forward", "up_backward"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p, ctypes.c_double]
    for name in ("gated_forward", "gated_backward"):
        getattr(loaded, name).argtypes = [ctypes.c_void_p, ctypes.c_double, ctypes.c_double]
    for name in ("flipout", "up", "gated", "gelu"):
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
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def takes(size: int, x: torch.Tensor, *others: torch.Tensor | None) -> bool:
    """Whether the functions here take these tensors: on a CPU, x in float32 or bfloat16 and not large, the parameters
    behind it whole and in float32; plain tensors, no subclasses; with gradients, and neither while torch compiles nor
    while something counts its operations or stands in for them. They know nothing of torch.func and of second
    derivatives.

    Args:
        size: numbers of what comes in or goes out, whichever is more.
    """
    if type(x) is not torch.Tensor or not x.is_cpu or x.dtype not in KINDS:
        return False
    if not 0 < size * torch.get_num_threads() <= LARGEST:
        return False
    for other in others:
        if other is None:
            continue
        if other.dtype != torch.float32 or type(other) not in PLAIN or not other.is_contiguous():
            return False
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return torch.is_grad_enabled() and not watched and library() is not None


def random_numbers(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """At least `count` and 16 more uniform numbers of all that an integer dtype holds, cut out of 64 random bits each:
    torch takes as long to draw one number of 8 bits as one of 64."""
    words = torch.empty(count * dtype.itemsize // 8 + 8, dtype=torch.int64, device=device)
    return words.random_(-(2**63), None).view(dtype)


def _call(name: str, values: list[int], *numbers: float) -> None:
    getattr(library(), name)((ctypes.c_int64 * len(values))(*values), *numbers)


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dropped_below(dropout: float) -> tuple[float, int]:
    """A probability in steps of 2^-16, the nearest to the one asked for, and the least of 16-bit numbers that stays."""
    share = round(dropout * 2**16)
    return share / 2**16, share - 2**15


class ShortDropout(torch.nn.Dropout):
    """`torch.nn.Dropout`, on CPUs with 16 random bits a number, four to a draw: torch's own are a twentieth of a small
    model's step."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x, some of it 0 and the rest larger for it, in training."""
        share, least = dropped_below(self.p)
        if not self.training or not 0 < share < 1 or not x.is_cpu or self.inplace:
            return super().forward(x)
        stays = random_numbers(x.numel(), torch.int16, x.device)[: x.numel()].view(x.shape) >= least
        return x * stays.to(x.dtype).mul_(1 / (1 - share))


def use_short_dropout(model: torch.nn.Module) -> None:
    """Let a model's own dropout layers (no subclasses) draw fewer random bits."""
    for module in model.modules():
        if type(module) is torch.nn.Dropout:
            module.__class__ = ShortDropout


class _Flipout(torch.autograd.Function):
    """`gaussian.py: _Flipout`, the same but for rounding; signs and eps are drawn by the caller."""

    @staticmethod
    def forward(ctx, x, mu, g, layer, dtype, signs, eps):
        shape = x.shape
        if not x.is_contiguous() and not x[0].is_contiguous():  # examples may be one and the same
            x = x.contiguous()
        out, width = mu.shape
        y, kept = torch.empty((*shape[:-1], out), dtype=dtype), floats(5, out, width)
        kl, sigma, square = floats(()), floats(()), floats(())
        sizes = [shape[0], shape[1:-1].numel(), width, out, x.stride(0), KINDS[x.dtype], KINDS[dtype]]
        tensors = (x, mu, g, layer.prior_mu, layer.prior_sigma, eps, signs, kept, kl, sigma, square, y)
        _call("flipout_forward", [*sizes, *[tensor.data_ptr() for tensor in tensors], 0, 0, 0, 0, 0])
        vars(layer).update(mean_sigma=sigma, kl_gradient_square=square, nll_gradient_square=None)  # 5 times as fast
        ctx.save_for_backward(x, signs, kept)
        ctx.layer, ctx.sizes = layer, sizes
        ctx.set_materialize_grads(False)
        return y, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, by_y, by_kl):
        x, signs, kept = ctx.saved_tensors
        layer, shape = ctx.layer, kept.shape[1:]
        kl, before = layer.kl.detach(), layer.nll_gradient_square  # as in _Flipout
        by_x = torch.empty(x.shape, dtype=x.dtype) if by_y is not None and ctx.needs_input_grad[0] else None
        by_mu, by_g, square = floats(shape), floats(shape), floats(())
        by_y = None if by_y is None else by_y.contiguous()
        at = [x.data_ptr(), 0, 0, 0, 0, 0, signs.data_ptr(), kept.data_ptr(), 0, 0, square.data_ptr(), 0]
        by = [_at(by_y), _at(by_kl), _at(by_x), by_mu.data_ptr(), by_g.data_ptr()]
        _call("flipout_backward", [*ctx.sizes, *at, *by])
        if by_y is not None:
            before = square if before is None else before + square
        vars(layer).update(kl=kl, nll_gradient_square=before)
        return by_x, by_mu, by_g, None, None, None, None


class _Up(torch.autograd.Function):
    """y = onto + scale * (a(x) W^T + b), a(x) = x or ReLU(x): x (..., in), W (out, in), b (out,) or None, `onto` None
    or (..., out), which gives y its dtype."""

    @staticmethod
    def forward(ctx, x, weight, bias, onto, relu, scale, dtype):
        x, onto = x.contiguous(), None if onto is None else onto.contiguous()
        out, width = weight.shape
        y = torch.empty((*x.shape[:-1], out), dtype=dtype)
        kept = floats(width, out)  # a copy: ZeRO-3 frees the parameter's storage
        kinds = [KINDS[x.dtype], KINDS[dtype], 0 if onto is None else KINDS[onto.dtype]]
        sizes = [x.numel() // width, width, out, *kinds, int(relu)]
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
        width, out = kept.shape
        by_weight = floats(out, width)
        by_bias = floats(out) if ctx.biased else None
        tensors = x, None, None, None, kept, None, by_y, by_x, by_weight, by_bias
        _call("up_backward", [*ctx.sizes, *map(_at, tensors)], ctx.scale)
        return by_x, by_weight, by_bias, None if ctx.of_onto is None else by_y.to(ctx.of_onto), None, None, None


NOWHERE = [0, 0, 0, 0]


def _place(tensor: torch.Tensor) -> list[int]:
    return [tensor.data_ptr(), *tensor.stride()[:3]]


class _Gated(torch.autograd.Function):
    """`prefix_attention.py: _Gated`, the same but for rounding, prefix and text apart: query (B, heads, L, D); keys
    and values (B, KV heads, T or P, D); gate (heads,); mask over the text, (B or 1, heads or 1, L, T), or None; the
    numbers that say what dropout leaves, None without, and the least that stays.

    Returns (B, heads, L, D), whose heads lie side by side, and the text's weights (B, heads, L, T).
    """

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, gate, mask, scaling, dropout, drawn, threshold):
        tensors = [t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value, prefix_key, prefix_value)]
        query, key, value, prefix_key, prefix_value = tensors
        lanes = library().small_lanes()
        (batch, heads, length, width), (_, kv_heads, total, _), prefix = query.shape, key.shape, prefix_key.shape[2]
        left, right = (-(-n // lanes) * lanes for n in (prefix, total))
        shares, share = floats(batch, heads, length, left + right), floats(batch, heads, length)
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


class _Gelu(torch.autograd.Function):
    """x Phi(x), in x's shape and dtype; its slope is kept in place of x."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        y, slope = torch.empty_like(x), torch.empty_like(x)
        _call("gelu_forward", [x.numel(), KINDS[x.dtype], x.data_ptr(), y.data_ptr(), slope.data_ptr()])
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, by_y):
        (slope,) = ctx.saved_tensors
        by_y = by_y.contiguous()
        by_x = torch.empty_like(by_y)
        tensors = by_y, by_x, slope
        _call("gelu_backward", [by_y.numel(), KINDS[by_y.dtype], *[tensor.data_ptr() for tensor in tensors]])
        return by_x


class ShortGelu(GELUActivation):
    """The library's exact GELU, but for rounding: on small inputs three quarters of its time, both ways together."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x Phi(x), of x's shape."""
        return _Gelu.apply(x) if takes(x.numel(), x) else super().forward(x)


def use_short_gelu(model: torch.nn.Module) -> None:
    """Let a frozen model's own exact GELUs (no subclasses, no tanh) go by C, where they are small."""
    for module in model.modules():
        if type(module) is GELUActivation and module.act is torch.nn.functional.gelu:
            module.__class__ = ShortGelu


flipout, up, gated = _Flipout.apply, _Up.apply, _Gated.apply
