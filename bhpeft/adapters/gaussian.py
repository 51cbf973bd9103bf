"""Low-rank matrices, with point or Gaussian weights: the ground of all three sites.

A Gaussian matrix W ~ N(mu, sigma^2), independent entries, is trained by its mean and deviation (Blundell et al. 2015):

    sigma    = g^2                                                                 g free, so sigma >= 0
    start    mu ~ U(-b, b), b = sqrt(6 / max(in, out));  g ~ U(e / sqrt 2, e), e = 0.05
    KL       sum over entries of  log(s_p / s) + (s^2 + (m - m_p)^2) / (2 s_p^2) - 1/2,   s = sigma, m = mu, p = prior
    noise    y_i = x_i mu^T + ((x_i * s_i) (sigma * eps)^T) * r_i,   eps ~ N(0, 1) once a batch,
             s_i, r_i in {-1, 1} once an example (Flipout, Wen et al. 2018): each example sees a weight of its own,
             all its tokens the same one, at the price of one more low-rank product
    mean     y = x mu^T                                                            evaluation
    draws    y_s = x_s (mu + sigma * eps_s)^T, s = 1 .. S                          posterior samples, in one product
"""

from __future__ import annotations

import math

import torch
from torch import nn

SPREAD = 0.05  # e: g starts in (e / sqrt 2, e), so sigma in (e^2 / 2, e^2)
FLOOR = 1e-12  # sigma is kept above it inside the logarithm


class _GaussianKL(torch.autograd.Function):
    """KL(N(mu, g^4) || N(prior_mu, prior_sigma^2)) with its gradient in closed form, which costs a third of autograd's:

    d KL / d mu = (mu - prior_mu) / prior_sigma^2,   d KL / d g = 2 g (sigma^2 / prior_sigma^2 - 1) / sigma
    """

    @staticmethod
    def forward(ctx, mu, g, prior_mu, prior_sigma):
        mu, g = (tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in (mu, g))
        sigma = (g * g).clamp_(min=FLOOR)
        precision = prior_sigma.to(mu.dtype).square().reciprocal_()
        distance = mu - prior_mu
        by_mu = distance * precision
        ratio = sigma.square() * precision
        kl = 0.5 * (torch.dot(distance.flatten(), by_mu.flatten()) + (ratio - ratio.log()).sum() - mu.numel())
        by_g = (2 * g) * (ratio - 1) / sigma
        square = torch.dot(by_mu.flatten(), by_mu.flatten()) + torch.dot(by_g.flatten(), by_g.flatten())
        ctx.save_for_backward(by_mu, by_g)  # of its own making: the parameters' storage is freed by ZeRO-3
        ctx.mark_non_differentiable(square)
        return kl, square

    @staticmethod
    def backward(ctx, gradient, _):
        by_mu, by_g = ctx.saved_tensors
        return gradient * by_mu, gradient * by_g, None, None


def gaussian_kl(
    mu: torch.Tensor, g: torch.Tensor, prior_mu: torch.Tensor, prior_sigma: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(N(mu, g^4) || N(prior_mu, prior_sigma^2)) summed over all entries, in nats, in closed form.

    Args:
        mu, g, prior_mu, prior_sigma: tensors of one shape; sigma = g^2.

    Returns:
        The KL, a scalar with a gradient by mu and g; and the square of that gradient's norm, a scalar without one.
    """
    return _GaussianKL.apply(mu, g, prior_mu, prior_sigma)


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

    def forward(self, x: torch.Tensor, batch: int | None = None) -> torch.Tensor:
        """(..., in_features) -> (..., out_features); `batch` is taken for `GaussianLinear`'s sake and not used."""
        return nn.functional.linear(x.to(self.weight.dtype), self.weight, self.bias)


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
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        zero: bool = False,
        prior_mu: float = 0.0,
        prior_sigma: float = 0.1,
    ):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        shape = (out_features, in_features)
        bound = 0.0 if zero else math.sqrt(6 / max(shape))
        self.mu = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.g = nn.Parameter(torch.empty(shape).uniform_(SPREAD / math.sqrt(2), SPREAD))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("prior_mu", torch.full(shape, prior_mu))
        self.register_buffer("prior_sigma", torch.full(shape, prior_sigma))
        self.kl: torch.Tensor | None = None
        self.kl_gradient_square: torch.Tensor | None = None
        self.nll_gradient_square: torch.Tensor | None = None
        self.mean_sigma: torch.Tensor | None = None
        self.eps: torch.Tensor | None = None

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
        # Copies: autograd must not save the parameters themselves, whose storage ZeRO-3 frees after this forward.
        mu, g = self.mu.clone(), self.g.clone()
        sigma = g * g
        x = x.to(mu.dtype)
        if self.training and torch.is_grad_enabled():
            self.kl, self.kl_gradient_square = gaussian_kl(self.mu, self.g, self.prior_mu, self.prior_sigma)
            self.mean_sigma = sigma.detach().mean(dtype=torch.float32)
            self.nll_gradient_square = None
            for copy in (mu, g):  # the KL has taken the parameters, so what flows back here is the rest of the loss
                copy.register_hook(self._note_gradient)
            y = self._flipout(x, mu, sigma, batch)
        elif self.eps is not None:
            y = self._draws(x, mu, sigma, batch)
        else:
            y = nn.functional.linear(x, mu)
        return y if self.bias is None else y + self.bias

    def _note_gradient(self, gradient: torch.Tensor) -> None:
        gradient = gradient.detach().float().flatten()
        square = torch.dot(gradient, gradient)
        before = self.nll_gradient_square
        self.nll_gradient_square = square if before is None else before + square

    def _flipout(self, x: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, batch: int | None) -> torch.Tensor:
        mean = nn.functional.linear(x, mu)
        if batch is not None:
            x, mean = x.expand(batch, *x.shape), mean.expand(batch, *mean.shape)
        middle = [1] * (x.dim() - 2)
        signs = _signs(x.shape[0], *middle, self.in_features + self.out_features, like=x)
        s, r = signs.split((self.in_features, self.out_features), -1)
        return torch.addcmul(mean, nn.functional.linear(x * s, sigma * torch.randn_like(sigma)), r)

    def _draws(self, x: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, batch: int | None) -> torch.Tensor:
        weights = mu + sigma * self.eps.to(mu)  # (S, out, in)
        samples = len(weights)
        if batch is not None:
            return torch.einsum("...i,soi->s...o", x, weights)
        # Rows come sample by sample: (S * B, ..., in).
        y = torch.bmm(x.reshape(samples, -1, self.in_features), weights.transpose(1, 2))
        return y.reshape(*x.shape[:-1], self.out_features)


def _signs(*shape: int, like: torch.Tensor) -> torch.Tensor:
    """Random -1 and 1, each with probability one half."""
    return torch.empty(shape, device=like.device, dtype=like.dtype).bernoulli_(0.5).mul_(2).sub_(1)


class LowRank(nn.Module):
    """delta(x) = scale * up(activation(down(x))): LoRA without an activation, the parallel adapter with ReLU.

    `up` starts at zero, so delta does.
    """

    def __init__(self, down: nn.Module, up: nn.Module, scale: float, relu: bool = False, dropout: float = 0.0):
        super().__init__()
        self.down, self.up, self.scale, self.relu = down, up, scale, relu
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """delta(x), in the shape that `up` gives: (..., out_features)."""
        hidden = self.down(self.dropout(x) if self.training else x)
        delta = self.up(torch.relu(hidden) if self.relu else hidden)
        return delta if self.scale == 1 else delta * self.scale
