"""An encoder's last layer, for the first token alone: a head reads no other.

Keys and values are made of every token. Behind the attention each token goes its own way, and so the output
projection, the feed-forward block and whatever an adapter adds to it are computed for one token of L; so is the query.
Of a layer's 12 H^2 multiplications a token (Vaswani et al. 2017, a feed-forward block of 4 H) that leaves 2 H^2: a
model of N layers does 5 / (6 N) less in its layers, in either direction. Logits and gradients are the same but for
rounding; dropout draws other numbers.
"""

from __future__ import annotations

import torch
from torch import nn

from bhpeft.adapters.architectures import layers_of

# Model type -> within a layer, the query's projection, and the modules right behind the attention, whose arguments are
# (B, L, H). The heads of these architectures read hidden_states[:, 0].
FIRST_TOKEN_READ = {
    "bert": ("attention.self.query", "attention.output"),
    "roberta": ("attention.self.query", "attention.output"),
    "xlm-roberta": ("attention.self.query", "attention.output"),
    "distilbert": ("attention.q_lin", "attention.out_lin", "sa_layer_norm"),
}


class _LastLayer:
    """Hooks of a model's last layer, which share whether the forward pass that runs is one for the first token."""

    def __init__(self, model: nn.Module, query: nn.Module, *behind: nn.Module):
        self.short, self.length = False, 1
        model.register_forward_pre_hook(self.decide, with_kwargs=True)
        query.register_forward_pre_hook(self.cut_query)
        query.register_forward_hook(self.spread)
        for module in behind:
            module.register_forward_pre_hook(self.cut)

    def decide(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """A caller that asks for hidden states or attention weights gets those of every token."""
        asked = ("output_hidden_states", "output_attentions")
        told = [getattr(model.config, name, False) if kwargs.get(name) is None else kwargs[name] for name in asked]
        self.short = not any(told)

    def cut_query(self, module: nn.Module, args: tuple) -> tuple | None:
        """(B, L, H) -> (B, 1, H)."""
        self.length = args[0].shape[1]
        return self.cut(module, args)

    def cut(self, module: nn.Module, args: tuple) -> tuple | None:
        """Tensors (B, L, H) -> (B, 1, H)."""
        return tuple(x[:, :1] for x in args) if self.short else None

    def spread(self, module: nn.Module, args: tuple, query: torch.Tensor) -> torch.Tensor | None:
        """(B, 1, H) -> (B, L, H), the same query for every token: what the others find is not read."""
        return query.expand(-1, self.length, -1) if self.short else None


def read_first_token_alone(model: nn.Module) -> None:
    """Let an encoder's last layer compute what the model's head reads, where the architecture is known."""
    names = FIRST_TOKEN_READ.get(model.config.model_type)
    if names is not None:
        _LastLayer(model, *map(layers_of(model)[-1].get_submodule, names))
