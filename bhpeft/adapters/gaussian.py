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


def gaussian_kl(
    mu: torch.Tensor, sigma: torch.Tensor, prior_mu: torch.Tensor, prior_sigma: torch.Tensor
) -> torch.Tensor:
    """KL(N(mu, sigma^2) || N(prior_mu, prior_sigma^2)) summed over all entries, a scalar in nats, in closed form."""
    ratio = (sigma.clamp(min=FLOOR) / prior_sigma) ** 2
    return 0.5 * (ratio + ((mu - prior_mu) / prior_sigma) ** 2 - 1 - ratio.log()).sum()


def gaussian_kl_gradient_square(
    mu: torch.Tensor, g: torch.Tensor, prior_mu: torch.Tensor, prior_sigma: torch.Tensor
) -> torch.Tensor:
    """|d KL / d (mu, g)|^2 with sigma = g^2, a scalar, in closed form:

    d KL / d mu = (mu - prior_mu) / prior_sigma^2,   d KL / d g = 2 g (sigma / prior_sigma^2 - 1 / sigma)
    """
    sigma = (g**2).clamp(min=FLOOR)
    by_mu = (mu - prior_mu) / prior_sigma**2
    by_g = 2 * g * (sigma / prior_sigma**2 - 1 / sigma)
    return by_mu.square().sum() + by_g.square().sum()


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
        sigma = g**2
        x = x.to(mu.dtype)
        if self.training and torch.is_grad_enabled():
            self._keep_kl()
            self.mean_sigma = sigma.detach().float().mean()
            self.nll_gradient_square = None
            for copy in (mu, g):  # the KL has copies of its own, so what flows back here is the rest of the loss
                copy.register_hook(self._note_gradient)
            y = self._flipout(x, mu, sigma, batch)
        elif self.eps is not None:
            y = self._draws(x, mu, sigma, batch)
        else:
            y = nn.functional.linear(x, mu)
        return y if self.bias is None else y + self.bias

    def _keep_kl(self) -> None:
        mu, g = self.mu.clone().float(), self.g.clone().float()
        prior = self.prior_mu.float(), self.prior_sigma.float()
        self.kl = gaussian_kl(mu, g**2, *prior)
        self.kl_gradient_square = gaussian_kl_gradient_square(mu.detach(), g.detach(), *prior)

    def _note_gradient(self, gradient: torch.Tensor) -> None:
        square = gradient.detach().float().square().sum()
        before = self.nll_gradient_square
        self.nll_gradient_square = square if before is None else before + square

    def _flipout(self, x: torch.Tensor, mu: torch.Tensor, sigma: torch.Tensor, batch: int | None) -> torch.Tensor:
        mean = nn.functional.linear(x, mu)
        if batch is not None:
            x, mean = x.expand(batch, *x.shape), mean.expand(batch, *mean.shape)
        middle = [1] * (x.dim() - 2)
        s = _signs(x.shape[0], *middle, self.in_features, like=x)
        r = _signs(x.shape[0], *middle, self.out_features, like=x)
        return mean + nn.functional.linear(x * s, sigma * torch.randn_like(sigma)) * r

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
    return torch.randint(0, 2, shape, device=like.device).to(like.dtype) * 2 - 1


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
        return self.up(torch.relu(hidden) if self.relu else hidden) * self.scale
