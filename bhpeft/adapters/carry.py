"""What one round leaves to the next: its posterior as a prior, or a place that the weights are held to.

posterior   p_{t+1}(W) = q_t(W): prior_mu <- mu, prior_sigma <- f g^2; f >= 1 forgets: the prior of a round is wider
            than the posterior that it comes from
            Nguyen et al. 2018 (variational continual learning), arXiv 1710.10628, section 2
anchor      w / 2 |theta - theta_t|^2, all weights alike
            the L2 baseline of Kirkpatrick et al. 2017 (EWC), arXiv 1612.00796, figure 2
"""

from __future__ import annotations

import torch
from torch import nn

from bhpeft.adapters.bh_peft import gaussian_layers
from bhpeft.adapters.gaussian import FLOOR, GaussianLinear


@torch.no_grad()
def posterior_to_prior(model: nn.Module, widening: float = 1.0) -> None:
    """Make the posterior of every Gaussian matrix its prior, in place; the KL is 0 then, but for `widening`.

    The weights have to be whole: before DeepSpeed takes the model.

    Args:
        widening: factor on the carried deviations.

    Raises:
        ValueError: there is no Gaussian matrix, or its weights are shards.
    """
    layers = gaussian_layers(model)
    if not layers:
        raise ValueError("no Gaussian weights, so no posterior to carry")
    for layer in layers:
        if layer.mu.shape != layer.prior_mu.shape:
            raise ValueError("the posterior is sharded; carry it before DeepSpeed takes the model")
        layer.prior_mu.copy_(layer.mu)
        layer.prior_sigma.copy_(widening * (layer.g**2).clamp(min=FLOOR))


class Anchor:
    """|theta - theta_0|^2 over the trainable weights of a model, theta_0 those it has now.

    Like the KL it is computed where the weights can be read under ZeRO-3: behind the forward of the module that owns
    them, in training, from copies. theta_0 is kept whole on every rank.
    """

    def __init__(self, model: nn.Module, gaussian: bool = True):
        """Args:
        model: its weights whole: before DeepSpeed takes it.
        gaussian: the means and deviations of Gaussian matrices are held, too.
        """
        self._squares: dict[nn.Module, torch.Tensor] = {}
        self._start: dict[nn.Module, dict[str, torch.Tensor]] = {}
        for module in model.modules():
            free = ("mu", "g") if isinstance(module, GaussianLinear) and not gaussian else ()
            own = {
                name: parameter.detach().clone().float()
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.requires_grad and name not in free
            }
            if own:
                self._start[module] = own
                module.register_forward_hook(self._measure)

    def _measure(self, module: nn.Module, inputs, output) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        squares = []
        for name, start in self._start[module].items():
            now = getattr(module, name).clone().float()
            squares.append((now - start.to(now.device)).square().sum())
        self._squares[module] = torch.stack(squares).sum()

    def distance_square(self) -> torch.Tensor:
        """|theta - theta_0|^2 of the last forward pass in training, a scalar.

        Modules that took no part in it are left out: nothing moves them.
        """
        return torch.stack(list(self._squares.values())).sum()
