"""Linear layers of a frozen base on CPUs with AVX-512 that are not Intel's: by oneDNN, in fp32, up to twice as fast.

torch gives fp32 products to MKL, which takes a slower path where the vendor of the CPU is not Intel (pytorch/builder
issue 504, pull request 1245). oneDNN, which comes with torch too and does its bf16 products, goes by what the CPU can
do: on an EPYC with AVX-512 it reaches 200 GFLOP/s a core where MKL reaches 95 (on a Zen 4, with units half as wide,
both reach 100). Weights stay as they lie. As they are frozen, the backward pass is one product: dL/dx = D W.
"""

from __future__ import annotations

import functools
import math
import os
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import register_flop_formula
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.pytorch_utils import Conv1D

LEAST_TOKENS = 8  # below, MKL's are as fast


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # torch's counters of operations do not know it

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _operations(x_shape, weight_shape, *rest, out_shape=None, **named) -> int:
        return 2 * math.prod(x_shape) * weight_shape[0]


class _Product(torch.autograd.Function):
    """y = x W^T + b for x (..., in), W (out, in), b (out,) or None, where neither W nor b needs a gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight  # frozen: not saved as a tensor, which checkpointing would compute the product again for
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx, by_y):
        return _Product.apply(by_y.contiguous(), ctx.weight.t(), None), None, None


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    trained = weight.requires_grad or bias is not None and bias.requires_grad
    return (
        not torch.compiler.is_compiling()  # inductor takes this product with constant weights alone
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and x.numel() >= LEAST_TOKENS * x.shape[-1]
        and not (trained and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
    )


class FrozenLinear(nn.Linear):
    """`torch.nn.Linear`, the same but for rounding; with a weight that is trained, or in another dtype, its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        taken = _takes(x, self.weight, self.bias)
        return _Product.apply(x, self.weight, self.bias) if taken else super().forward(x)


class FrozenConv1D(Conv1D):
    """GPT-2's layer, whose weight lies transposed, likewise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., nx) -> (..., nf)."""
        taken = _takes(x, self.weight, self.bias)
        return _Product.apply(x, self.weight.t(), self.bias) if taken else super().forward(x)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether there is an x86 CPU that is not Intel's, with AVX-512, and oneDNN."""
    try:
        intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux: nothing known
        return False
    able = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    able = able and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return able and not intel and torch.backends.cpu.get_cpu_capability() == "AVX512"


def use_onednn(model: nn.Module) -> None:
    """Let a frozen model's own linear layers (no subclasses: those of 4 bit stay) go by oneDNN, where it is faster.

    Not under ZeRO-3, whose linear layers take their weights together in a way of their own, nor in compiled code. The
    layers know nothing of torch.func and forward-mode derivatives.
    """
    if is_deepspeed_zero3_enabled() or not onednn_is_faster():
        return
    kinds = {nn.Linear: FrozenLinear, Conv1D: FrozenConv1D}
    taken = [m for m in model.modules() if type(m) in kinds and m.weight.dtype == torch.float32]
    for module in taken:
        module.__class__ = kinds[type(module)]
    # What oneDNN prepares for a product it keeps, 0.1 to 0.4 MB for each number of tokens, shape and direction, 1,024
    # of them by default: on texts of many lengths a fifth of a small model's peak memory. Made again in 0.1 ms, which
    # large products in fp32 do not feel; in bf16 it would be a quarter of a step.
    if taken:
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
