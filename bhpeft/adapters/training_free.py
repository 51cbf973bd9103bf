"""A trained LoRA made Gaussian without training (Shi et al. 2025, "Training-Free Bayesianization", arXiv 2412.05723).

    B = U diag(d) V^T (thin SVD),   B' = U diag(d),   A' = V^T A:   B' A' = B A
    A'_ij ~ N(., (sigma_q / d_i)^2),  B' fixed:   each column of B A then varies by sigma_q^2 U U^T, in every direction
                                                  that B has by the same sigma_q, and in no other
    sigma_q: the largest that costs no more than a tolerance on held-out rows, by bisection of log sigma_q

The result is an adapter of the form of `bayesian-lora` (down Gaussian, sigma = g^2), which answers with posterior
samples as any other. Where d_i is (almost) 0 the direction is not there, and its sigma is 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from bhpeft.adapters.attach import read_adapter_config, weight_shapes
from bhpeft.adapters.bh_peft import PEFT_TYPE, BhPeftConfig, gaussian_layers
from bhpeft.errors import InputError
from bhpeft.files import write_atomic

TINY = 1e-6  # of the largest d: below it a direction is none
RANGE = (1e-4, 1.0)  # of sigma_q, which is searched
# Settings of stock LoRA that change its equation: where they are set, B A is not all there is.
OTHER_FORMS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "lora_bias", "bias", "layer_replication")


def gaussian_form(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A', B' and 1 / d of A (r, in) and B (out, r): B' A' = B A, the columns of B' at right angles, of length d.

    Returns:
        (r, in), (out, r) and (r,): what sigma_q is multiplied by in each row of A', 0 where d is none.
    """
    u, d, v = torch.linalg.svd(b.double(), full_matrices=False)
    there = d > TINY * d.max().clamp(min=torch.finfo(d.dtype).tiny)
    inverse = torch.where(there, 1 / d.clamp(min=torch.finfo(torch.float32).tiny), torch.zeros_like(d))
    return (v @ a.double()).float(), (u * d).float(), inverse.float()


def gaussian_weights(weights: dict[str, torch.Tensor], sigma_q: float, source: str | Path) -> dict[str, torch.Tensor]:
    """Weights of stock LoRA under BH-PEFT's names, with A' Gaussian; what is no LoRA (a head) goes along as it is.

    Args:
        weights: as of the adapter's file.
        source: where they come from, for messages.

    Raises:
        InputError: there is no LoRA among them, or half of one.
    """
    found = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
    firsts = [name for name in weights if name.endswith(".lora_A.weight")]
    if not firsts or 2 * len(firsts) + len(found) != len(weights):
        raise InputError(f"{source}: its weights are not pairs of LoRA matrices; give an adapter of stock peft's LoRA")
    for name in firsts:
        module = name.removesuffix(".lora_A.weight")
        other = weights.get(f"{module}.lora_B.weight")
        if other is None:
            raise InputError(f"{source}: {module} has a LoRA matrix A and no B; was saving cut short?")
        down, up, inverse = gaussian_form(weights[name], other)
        g = (sigma_q * inverse).sqrt()[:, None].expand_as(down)
        part = f"{module}.bh_parts.default"
        found |= {f"{part}.down.mu": down, f"{part}.down.g": g, f"{part}.up.weight": up}
        found |= {f"{part}.down.prior_mu": torch.zeros_like(down)}
        found |= {f"{part}.down.prior_sigma": torch.full_like(down, BhPeftConfig.prior_sigma)}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def write_gaussian(adapter_path: str | Path, out: str | Path, sigma_q: float = 1.0) -> None:
    """Write a stock LoRA adapter as a Gaussian one, from its files alone; the folder `out` is made.

    Raises:
        InputError: it is no LoRA of stock peft's plain form, or `out` holds something.
    """
    saved = read_adapter_config(str(adapter_path))
    if saved["peft_type"] != "LORA":
        raise InputError(f"{adapter_path}: peft_type {saved['peft_type']!r}; only a trained LoRA of stock peft can be "
                         "made Gaussian here")  # fmt: skip
    other = [name for name in OTHER_FORMS if saved.get(name) not in (None, False, {}, [], "none")]
    if other:
        raise InputError(f"{adapter_path}: LoRA with {', '.join(other)} is not of the form B A; train a plain one")
    out = Path(out)
    check_free(out)
    weight_shapes(str(adapter_path))
    weights = gaussian_weights(load_file(Path(adapter_path) / "adapter_model.safetensors"), sigma_q, adapter_path)
    out.mkdir(parents=True, exist_ok=True)
    save_file(weights, out / "adapter_model.safetensors", metadata={"format": "pt"})
    write_atomic(out / "adapter_config.json", json.dumps(_config(saved), indent=2, sort_keys=True) + "\n")


def check_free(out: Path) -> None:
    """Raise `InputError` if there is something where an adapter is to be written."""
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise InputError(f"{out}: exists and is not empty; choose another folder")


def _config(saved: dict[str, Any]) -> dict[str, Any]:
    """The BH-PEFT configuration that says what a stock LoRA's says."""
    own = BhPeftConfig(
        sites=["lora"], bayesian="down", lora_rank=saved["r"], lora_alpha=saved["lora_alpha"],
        lora_dropout=saved.get("lora_dropout", 0.0), modules_to_save=saved.get("modules_to_save"),
    )  # fmt: skip
    shared = ("task_type", "auto_mapping", "base_model_name_or_path", "revision")
    made = dataclasses.asdict(own) | {name: saved.get(name) for name in shared}
    return {**made, "peft_type": PEFT_TYPE, "inference_mode": True}


@torch.no_grad()
def rescale_sigma(model: nn.Module, factor: float) -> None:
    """Multiply the deviation of every Gaussian weight of a model by `factor`."""
    for layer in gaussian_layers(model):
        layer.g *= math.sqrt(factor)


def check_sites(model: PeftModel, adapter_path: str | Path) -> None:
    """Raise `InputError` if the adapter's LoRA stood on other modules than those that our tuner knows."""
    sites = {name.split(".bh_parts")[0] for name, layer in model.named_modules() if layer in gaussian_layers(model)}
    given = {name.split(".lora_A")[0] for name in weight_shapes(str(adapter_path)) if ".lora_A." in name}
    if sites != given:
        odd = min(sites ^ given).removeprefix("base_model.model.")
        raise InputError(
            f"{adapter_path}: its LoRA and the places of bhpeft's differ ({odd}); train it on the query and value "
            "projections (--target_modules as by default)"
        )


def largest_sigma(cost: Callable[[float], float], tolerance: float, steps: int = 7) -> float:
    """The largest sigma_q in `RANGE` whose cost is at most `tolerance`, by bisection of its logarithm.

    The cost should rise with sigma_q. An end of the range is given where all of it, or nothing, costs so little.

    Args:
        cost: of a sigma_q, on held-out rows, against the point weights; 1e-9 above the tolerance counts as at it, for
            a difference of shares is rounded (0.90 - 0.89 > 0.01).
        steps: halvings; 7 leave sigma_q known to 7 %.
    """
    low, high = map(math.log, RANGE)
    tolerance += 1e-9
    if cost(RANGE[1]) <= tolerance:
        return RANGE[1]
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(math.exp(middle)) <= tolerance else (low, middle)
    return math.exp(low)
