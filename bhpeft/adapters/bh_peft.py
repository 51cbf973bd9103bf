"""BH-PEFT: prefix, LoRA and parallel adapter in one PEFT method, each optional, with point or Gaussian weights.

Chai et al. 2025 (arXiv 2508.02711) put Gaussian down matrices into the mix of adapters of He et al. 2022 (unified view,
MAM); the presets name well-known cases of the same tuner:

    bh-peft         prefix + LoRA + parallel adapter, down matrices Gaussian
    mam             prefix + parallel adapter, point weights                       He et al. 2022
    hybrid          prefix + LoRA, point weights
    bayesian-lora   LoRA, A Gaussian                                               BLoB, Wang et al. 2024
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from bhpeft.adapters.architectures import attention_shape, places_of
from bhpeft.adapters.gaussian import INITIAL_SIGMA, GaussianLinear, LowRank, PointLinear
from bhpeft.adapters.prefix_attention import use_prefix_attention
from bhpeft.adapters.sites import (
    LoraSite,
    ParallelEntrySite,
    ParallelExitSite,
    ParallelSite,
    PrefixHidden,
    PrefixSite,
    PrefixSource,
    PrefixUp,
    Site,
)
from bhpeft.adapters.small import use_short_dropout
from bhpeft.errors import InputError

PEFT_TYPE = "BH_PEFT"
BAYESIAN = ("down", "all", "none")
SITES = ("prefix", "lora", "adapter")
PRESETS = {
    "bh-peft": {"sites": ["prefix", "lora", "adapter"], "bayesian": "down"},
    "mam": {"sites": ["prefix", "adapter"], "bayesian": "none"},
    "hybrid": {"sites": ["prefix", "lora"], "bayesian": "none"},
    "bayesian-lora": {"sites": ["lora"], "bayesian": "down"},
}


@dataclass
class BhPeftConfig(PeftConfig):
    """Configuration of BH-PEFT; the names are the papers'.

    Attributes:
        sites: which of "prefix", "lora", "adapter" there are.
        bayesian: which matrices are Gaussian: the "down" ones, "all", or "none".
        prefix_length, prefix_bottleneck_size: P and the width of tanh(W_down E).
        prefix_start: "identity" (gated, starts as no prefix) or "random" (the papers': no gate).
        lora_rank, lora_alpha, lora_dropout: r, alpha, dropout on the input of A.
        bn_reduction_factor, adapter_scaling: hidden size / bottleneck of the parallel adapter, and its scale s.
        prior_mu, prior_sigma: of the Gaussian prior every Gaussian weight starts with.
        initial_sigma: the posterior's deviations start between half of it and all of it.
    """

    sites: list[str] = field(default_factory=lambda: list(SITES))
    bayesian: str = "down"
    prefix_length: int = 30
    prefix_bottleneck_size: int = 8
    prefix_start: str = "identity"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    bn_reduction_factor: int = 96
    adapter_scaling: float = 4.0
    prior_mu: float = 0.0
    prior_sigma: float = 0.1
    initial_sigma: float = INITIAL_SIGMA
    target_modules: list[str] | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.bayesian not in BAYESIAN:
            raise InputError(f"--bayesian {self.bayesian}: must be one of {', '.join(BAYESIAN)}")
        if not self.sites or set(self.sites) - set(SITES):
            raise InputError(f"sites {self.sites}: must be one or more of {', '.join(SITES)}")
        if self.prefix_start not in ("identity", "random"):
            raise InputError(f"--prefix_start {self.prefix_start}: must be identity or random")
        for name in ("prefix_length", "prefix_bottleneck_size", "lora_rank", "bn_reduction_factor"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: must be at least 1")
        for name in ("prior_sigma", "initial_sigma"):
            if getattr(self, name) <= 0:
                raise InputError(f"--{name} {getattr(self, name)}: must be above 0")


class BhPeftModel(BaseTuner):
    """Puts the sites of a `BhPeftConfig` into a transformers model."""

    prefix = "bh_"
    tuner_layer_cls = Site

    def train(self, mode: bool = True) -> BhPeftModel:
        """As any module's; a model that trains is not gone over again, for the Trainer asks in every step."""
        return self if mode and self.training and self.model.training else super().train(mode)

    @staticmethod
    def _prepare_adapter_config(peft_config: BhPeftConfig, model_config: dict) -> BhPeftConfig:
        return peft_config

    def _pre_injection_hook(self, model: nn.Module, config: BhPeftConfig, adapter_name: str) -> None:
        """Find the places, and put the source of the prefix on the backbone, before the layers are visited."""
        places = places_of(model.config)
        self._entries: dict[str, ParallelEntrySite] = {}
        self._places = {
            "lora": places.lora if "lora" in config.sites else (),
            "prefix": (places.attention,) if "prefix" in config.sites else (),
            "adapter": places.feed_forward if "adapter" in config.sites else (),
        }
        # peft matches these with whole names; an expression, for a place may be named by more than its last part.
        names = sorted({name for group in self._places.values() for name in group})
        config.target_modules = r".*\.\d+(\..*)?(" + "|".join(re.escape("." + n.lstrip(".")) for n in names) + ")"
        if "prefix" in config.sites:
            use_prefix_attention(model)
            self._source = getattr(model.base_model, "bh_source", None) or PrefixSource()
            width = model.config.hidden_size
            down = self._matrix(config, "down", width, config.prefix_bottleneck_size)
            self._source.bh_parts[adapter_name] = PrefixHidden(config.prefix_length, width, down)

    def _post_injection_hook(self, model: nn.Module, config: BhPeftConfig, adapter_name: str) -> None:
        """Put the prefix's source on the backbone. Not earlier: peft would take it for an adapter that was there
        before, and leave the base model as trainable as it found it."""
        use_short_dropout(model)
        backbone = model.base_model
        if "prefix" not in config.sites or hasattr(backbone, "bh_source"):
            return
        backbone.bh_source = self._source
        backbone.bh_source.set_adapter(adapter_name, inference_mode=config.inference_mode)
        backbone.register_forward_pre_hook(_compute_prefix, with_kwargs=True)

    @staticmethod
    def _matrix(config: BhPeftConfig, which: str, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """A down matrix, or an up matrix that starts at zero; Gaussian if the configuration says so."""
        shape = {"in_features": inputs, "out_features": outputs, "bias": bias, "zero": which == "up"}
        if config.bayesian == "all" or config.bayesian == which:
            normal = {"prior_mu": config.prior_mu, "prior_sigma": config.prior_sigma}
            return GaussianLinear(**shape, **normal, initial_sigma=config.initial_sigma)
        return PointLinear(**shape)

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        def is_at(name: str) -> bool:
            # The leading dot of ".output.dense" keeps BERT's "attention.output.dense" out.
            if name.startswith("."):
                return current_key.endswith(name) and not current_key.endswith(".attention" + name)
            return current_key.endswith("." + name)

        if any(map(is_at, self._places["prefix"])):
            self._add_prefix(peft_config, adapter_name, target)
        if any(map(is_at, self._places["lora"])):
            site = target if isinstance(target, LoraSite) else LoraSite(target)
            inputs, outputs = _features(site.base_layer)
            down = self._matrix(peft_config, "down", inputs, peft_config.lora_rank)
            up = self._matrix(peft_config, "up", peft_config.lora_rank, outputs)
            scale = peft_config.lora_alpha / peft_config.lora_rank
            part = LowRank(down, up, scale, dropout=peft_config.lora_dropout)
            self._put(parent, target_name, site, adapter_name, part)
        block = [is_at(name) for name in self._places["adapter"]]
        if any(block):
            width = self.model.config.hidden_size
            bottleneck = max(1, width // peft_config.bn_reduction_factor)
            down = self._matrix(peft_config, "down", width, bottleneck)
            up = self._matrix(peft_config, "up", bottleneck, width, bias=True)
            part = LowRank(down, up, peft_config.adapter_scaling, relu=True)
            if len(block) == 1:
                site = target if isinstance(target, ParallelSite) else ParallelSite(target)
                self._put(parent, target_name, site, adapter_name, part)
            elif block[0]:
                site = target if isinstance(target, ParallelEntrySite) else ParallelEntrySite(target)
                self._entries[current_key.removesuffix(self._places["adapter"][0])] = site
                self._put(parent, target_name, site, adapter_name, part)
            else:
                entry = self._entries[current_key.removesuffix(self._places["adapter"][1].lstrip("."))]
                setattr(parent, target_name, ParallelExitSite(target, entry))

    @staticmethod
    def _put(parent: nn.Module, name: str, site: Site, adapter_name: str, part: nn.Module) -> None:
        site.bh_parts[adapter_name] = part
        setattr(parent, name, site)

    def _add_prefix(self, config: BhPeftConfig, adapter_name: str, attention: nn.Module) -> None:
        heads, kv_heads, head_width = attention_shape(self.model.config)
        up = self._matrix(config, "up", config.prefix_bottleneck_size, 2 * kv_heads * head_width, bias=True)
        _start_at_random(up)  # what starts at zero here is the gate, or nothing in the papers' start
        if not hasattr(attention, "bh_prefix"):
            attention.bh_prefix = PrefixSite(self._source)
        part = PrefixUp(up, heads, head_width, kv_heads, gated=config.prefix_start == "identity")
        attention.bh_prefix.bh_parts[adapter_name] = part


def _compute_prefix(backbone: nn.Module, args: tuple, kwargs: dict) -> None:
    backbone.bh_source.before_backbone(args, kwargs)


def _start_at_random(up: nn.Module) -> None:
    weight = up.mu if isinstance(up, GaussianLinear) else up.weight
    nn.init.normal_(weight, std=0.5)  # hidden values are below 1: keys and values then have the size of the model's


def _features(layer: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer of any kind: Linear, 4-bit, or GPT-2's Conv1D, whose weight lies transposed."""
    if hasattr(layer, "in_features"):
        return layer.in_features, layer.out_features
    return layer.nx, layer.nf


def gaussian_layers(model: nn.Module) -> list[GaussianLinear]:
    """All Gaussian matrices of a model, in module order."""
    return [module for module in model.modules() if isinstance(module, GaussianLinear)]


def kl_divergence(layers: Sequence[GaussianLinear]) -> torch.Tensor | None:
    """Sum of the KL that each Gaussian matrix kept in the last forward pass of training, in nats, or None.

    None where there is no Gaussian matrix, or none has run in training mode.
    """
    kept = [layer.kl for layer in layers if layer.kl is not None]
    return torch.stack(kept).sum() if kept else None


def kl_gradient_norm(layers: Sequence[GaussianLinear]) -> torch.Tensor:
    """|d KL / d (all mu, all g)| of the last forward pass in training, a scalar."""
    return torch.stack([layer.kl_gradient_square for layer in layers]).sum().sqrt()


def nll_gradient_norm(layers: Sequence[GaussianLinear]) -> torch.Tensor:
    """|d L / d (all mu, all g)| of the last backward pass, L the loss without the KL, as scaled as the loss was."""
    kept = [layer.nll_gradient_square for layer in layers]
    return torch.stack([square for square in kept if square is not None]).sum().sqrt()


def mean_sigma(layers: Sequence[GaussianLinear]) -> torch.Tensor:
    """Mean standard deviation of all Gaussian weights, each matrix by its size, in the last forward pass."""
    layers = [layer for layer in layers if layer.mean_sigma is not None]
    means = torch.stack([layer.mean_sigma for layer in layers])
    sizes = means.new_tensor([layer.in_features * layer.out_features for layer in layers])
    return (means @ sizes) / sizes.sum()
