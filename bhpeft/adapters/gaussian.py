"""Low-rank matrices, with point or Gaussian weights: the ground of all three sites.

A Gaussian matrix W ~ N(mu, sigma^2), independent entries, is trained by its mean and deviation (Blundell et al. 2015):

    sigma    = g^2                                                                 g free, so sigma >= 0
    start    mu ~ U(-b, b), b = sqrt(6 / max(in, out));  sigma = g^2 <= sigma_0, g ~ U(sqrt(sigma_0 / 2), sqrt(sigma_0))
    KL       sum over entries of  log(s_p / s) + (s^2 + (m - m_p)^2) / (2 s_p^2) - 1/2,   s = sigma, m = mu, p = prior
    noise    y_i = x_i mu^T + ((x_i * s_i) (sigma * eps)^T) * r_i,   eps ~ N(0, 1) once a batch,
             s_i, r_i in {-1, 1} once an example (Flipout, Wen et al. 2018): each example sees a weight of its own,
             all its tokens (and choices) the same one, at the price of one more low-rank product
    mean     y = x mu^T                                                            evaluation
    draws    y_s = x_s (mu + sigma * eps_s)^T, s = 1 .. S                          posterior samples, in one product
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from bhpeft.adapters import small

INITIAL_SIGMA = 0.0025  # sigma_0; g starts in (0.035, 0.05), as BLoB's does
FLOOR = 1e-12  # sigma is kept above it inside the logarithm


def _kl_and_gradient(mu, g, prior_mu, prior_sigma) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(N(mu, g^4) || N(prior_mu, prior_sigma^2)), and its gradient in closed form, in float32 at least:

    d KL / d mu = (mu - prior_mu) / prior_sigma^2,   d KL / d g = 2 g (sigma^2 / prior_sigma^2 - 1) / sigma
    """
    mu, g = (tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in (mu, g))
    sigma = (g * g).clamp_(min=FLOOR)
    precision = prior_sigma.to(mu.dtype).square().reciprocal_()
    distance = mu - prior_mu
    by_mu = distance * precision
    ratio = sigma.square() * precision
    kl = 0.5 * (torch.dot(distance.flatten(), by_mu.flatten()) + (ratio - ratio.log()).sum() - mu.numel())
    by_g = (2 * g) * (ratio - 1) / sigma
    return kl, by_mu, by_g


def _square(*tensors: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of all entries, in float32 at least."""
    flat = [(tensor if tensor.dtype == torch.float64 else tensor.float()).flatten() for tensor in tensors]
    return sum(torch.dot(tensor, tensor) for tensor in flat)


class _Flipout(torch.autograd.Function):
    """y = x mu^T + ((x * s) V^T) * r with V = sigma * eps, and the KL; with D = dL/dy, in closed form

        dL/dx  = D mu + ((D * r) V) * s          dL/dmu = D^T x                        + d KL / d mu
        dL/dV  = (D * r)^T (x * s)               dL/dg  = dL/dV * eps * 2 g            + d KL / d g

    One node of the graph in place of about twenty, whose overhead is the larger part of a small matrix's time.
    What it keeps is of its own making, for the parameters' storage is freed by ZeRO-3 after the forward pass.
    """

    @staticmethod
    def forward(ctx, x, mu, g, layer, dtype, signs, eps):
        kl, by_mu, by_g = _kl_and_gradient(mu, g, layer.prior_mu, layer.prior_sigma)
        sigma = g * g
        layer.mean_sigma = sigma.mean(dtype=torch.float32)
        layer.kl_gradient_square = _square(by_mu, by_g)
        layer.nll_gradient_square = None
        weight, taken = mu.to(dtype, copy=True), x.to(dtype)
        signs = (1 - 2 * (signs[: len(x) * sum(mu.shape)] < 0).to(dtype)).view(len(x), *[1] * (x.dim() - 2), -1)
        s, r = signs.split((mu.shape[1], mu.shape[0]), -1)
        spread, signed = (sigma * eps).to(dtype), taken * s
        y = nn.functional.linear(taken, weight).addcmul_(nn.functional.linear(signed, spread), r)
        ctx.save_for_backward(taken, signed, s, r, weight, spread, (eps * g).mul_(2), by_mu, by_g)
        ctx.layer, ctx.kinds = layer, (x.dtype, mu.dtype)
        ctx.set_materialize_grads(False)
        return y, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, by_y, by_kl):
        taken, signed, s, r, weight, spread, by_spread, kl_by_mu, kl_by_g = ctx.saved_tensors
        kind, parameter_kind = ctx.kinds
        # Under checkpointing it is the KL of a pass that was only run to get these tensors back, and would keep them.
        ctx.layer.kl = ctx.layer.kl.detach()
        by_x = by_mu = by_g = None
        if by_y is not None:
            by_y = by_y.to(weight.dtype)
            flipped = by_y * r
            if ctx.needs_input_grad[0]:
                by_x = (by_y @ weight).addcmul_(flipped @ spread, s).to(kind)
            by_mu = by_y.flatten(0, -2).t() @ taken.flatten(0, -2)
            by_g = (flipped.flatten(0, -2).t() @ signed.flatten(0, -2)).to(parameter_kind) * by_spread
            by_mu = by_mu.to(parameter_kind)
            square, before = _square(by_mu, by_g), ctx.layer.nll_gradient_square
            ctx.layer.nll_gradient_square = square if before is None else before + square
        if by_kl is not None:
            by_mu = by_kl * kl_by_mu if by_mu is None else by_mu + by_kl * kl_by_mu
            by_g = by_kl * kl_by_g if by_g is None else by_g + by_kl * kl_by_g
        return by_x, by_mu, by_g, None, None, None, None


class PointLinear(nn.Module):
    """y = x W^T + b with point weights, in the weights' dtype."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, zero: bool = False):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        if zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as peft starts LoRA's A

    def forward(
        self,
        x: torch.Tensor,
        batch: int | None = None,
        relu: bool = False,
        scale: float = 1.0,
        onto: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(..., in_features) -> (..., out_features), from ReLU(x) if asked for, times `scale`, added to `onto`, whose
        dtype it then has; `batch` is taken for `GaussianLinear`'s sake and not used."""
        weight, bias = self.weight, self.bias
        plain = onto is None or type(onto) is torch.Tensor and onto.dtype in small.KINDS
        size = x.numel() // self.in_features * self.out_features
        if self.in_features < self.out_features and plain and small.takes(size, x, weight, bias):
            dtype = product_dtype(weight) if onto is None else onto.dtype
            return small.up(x, weight, bias, onto, relu, scale, dtype)
        y = nn.functional.linear((x.relu() if relu else x).to(weight.dtype), weight, bias)
        return _added(y, scale, onto)


class GaussianLinear(nn.Module):
    """y = x W^T + b with W ~ N(mu, g^4) and a point bias; see the head of this file for what runs when.

    Attributes:
        prior_mu, prior_sigma: (out, in) buffers, saved with the adapter; rounds replace them by the posterior.
        kl: scalar KL to the prior, kept by the last forward pass in training. A parameter sharded by ZeRO-3 can be
            read in its module's forward alone, so this is the one place where it can be computed.
        kl_gradient_square: |d KL / d (mu, g)|^2 of the same pass.
        nll_gradient_square: |d L / d (mu, g)|^2 of the last backward pass, L all of the loss but the KL, as scaled
            as the loss was.
        eps: (S, out, in) standard normal noise of S posterior samples, or None; see `posterior.py`.
        rows_an_example: how many rows of a training batch, one behind the other, are of one example and see one weight:
            the choices of a question, whose scores are compared with each other. Else 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        zero: bool = False,
        prior_mu: float = 0.0,
        prior_sigma: float = 0.1,
        initial_sigma: float = INITIAL_SIGMA,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        bound = 0.0 if zero else math.sqrt(6 / max(shape))
        self.mu = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.g = nn.Parameter(torch.empty(shape).uniform_(math.sqrt(initial_sigma / 2), math.sqrt(initial_sigma)))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("prior_mu", torch.full(shape, prior_mu))
        self.register_buffer("prior_sigma", torch.full(shape, prior_sigma))
        self.kl: torch.Tensor | None = None
        self.kl_gradient_square: torch.Tensor | None = None
        self.nll_gradient_square: torch.Tensor | None = None
        self.mean_sigma: torch.Tensor | None = None
        self.eps: torch.Tensor | None = None
        self.rows_an_example = 1

    def forward(self, x: torch.Tensor, batch: int | None = None) -> torch.Tensor:
        """Apply the matrix.

        Args:
            x: (B, ..., in); or (..., in) for an input that all examples share, with `batch` given.
            batch: number of examples that share x; the result then has a leading axis for them where they differ.

        Returns:
            (B, ..., out); for a shared x (batch, ..., out) in training, (S, ..., out) with S samples, else (..., out).
        """
        if self.eps is None and not torch.is_grad_enabled():  # the mean, and nothing is kept for a backward pass
            return nn.functional.linear(x.to(self.mu.dtype), self.mu, self.bias)
        if self.training and torch.is_grad_enabled():
            if batch is not None:
                x = x.expand(batch, *x.shape)
            mu, g = self.mu, self.g
            noise = self._signs(x), torch.randn_like(mu)
            in_c = small.takes(x.numel(), x, mu, g, self.prior_mu, self.prior_sigma)
            run = small.flipout if in_c else _Flipout.apply
            y, self.kl = run(x, mu, g, self, product_dtype(mu), *noise)
        else:
            # Copies: autograd must not save the parameters themselves, whose storage ZeRO-3 frees after this forward.
            mu, x = self.mu.clone(), x.to(self.mu.dtype)
            y = nn.functional.linear(x, mu) if self.eps is None else self._draws(x, mu, self.g.clone().square(), batch)
        return y if self.bias is None else y + self.bias

    def _signs(self, x: torch.Tensor) -> torch.Tensor:
        """s and r of each row, below 0 or not, row by row: at least B * (in + out) numbers."""
        width, together = self.in_features + self.out_features, self.rows_an_example
        signs = small.random_numbers(len(x) // together * width, torch.int8, x.device)
        if together > 1:
            signs = signs[: len(x) // together * width].view(-1, 1, width).expand(-1, together, -1).flatten()
        return signs

    def _draws(self, x: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, batch: int | None) -> torch.Tensor:
        weights = mu + sigma * self.eps.to(mu)  # (S, out, in)
        samples = len(weights)
        if batch is not None:
            return torch.einsum("...i,soi->s...o", x, weights)
        # Rows come sample by sample: (S * B, ..., in).
        y = torch.bmm(x.reshape(samples, -1, self.in_features), weights.transpose(1, 2))
        return y.reshape(*x.shape[:-1], self.out_features)


def product_dtype(weight: torch.Tensor) -> torch.dtype:
    """What a matrix product with this weight is computed in: autocast's dtype where that is on, else the weight's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _added(y: torch.Tensor, scale: float, onto: torch.Tensor | None) -> torch.Tensor:
    y = y if scale == 1 else y * scale
    return y if onto is None else onto + y.to(onto.dtype)


class LowRank(nn.Module):
    """delta(x) = scale * up(activation(down(x))): LoRA without an activation, the parallel adapter with ReLU.

    `up` starts at zero, so delta does.
    """

    def __init__(self, down: nn.Module, up: nn.Module, scale: float, relu: bool = False, dropout: float = 0.0):
        super().__init__()
        self.down, self.up, self.scale, self.relu = down, up, scale, relu
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, onto: torch.Tensor | None = None) -> torch.Tensor:
        """delta(x), in the shape that `up` gives, (..., out_features); with `onto` onto + delta(x), in its dtype."""
        hidden = self.down(self.dropout(x) if self.training else x)
        if type(self.up) is PointLinear:
            return self.up(hidden, relu=self.relu, scale=self.scale, onto=onto)
        return _added(self.up(hidden.relu() if self.relu else hidden), self.scale, onto)
