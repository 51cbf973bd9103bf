"""Monte Carlo dropout: dropout stays on while answering, and each pass is a sample (Gal and Ghahramani 2016).

    p = mean_s softmax(f(x; m_s)),   m_s: masks of every dropout in the model, drawn anew for each row and sample

It is dropout as it was trained with: that of the adapter (`--lora_dropout`) and of the base (`--base_dropout`).
arXiv 1506.02142. The masks of a batch follow from the seed and from which rows are in it, so that neither the order of
batches nor the number of passes before it matters; another size of batches draws other masks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PretrainedConfig

from bhpeft.adapters.bh_peft import PRESETS
from bhpeft.base_model import DROPOUTS, is_encoder
from bhpeft.errors import InputError

OF_HEADS = ("classifier_dropout", "seq_classif_dropout")


def has_lora(arguments) -> bool:
    """Whether the adapter of an `AdapterArguments` has a LoRA update, which is where `--lora_dropout` drops."""
    preset = PRESETS.get(arguments.adapter_name)
    if preset is None:
        return "lora" in arguments.adapter_name  # lora, qlora; of other programs also adalora
    return "lora" in (arguments.sites or preset["sites"])


def check_dropout(run, config: PretrainedConfig) -> None:
    """Raise `InputError` where `--mc_dropout_samples` is asked for and no dropout would be in the model.

    Args:
        run: a `Run`, its adapter's settings adopted.
        config: of the base model.
    """
    if not run.data.mc_dropout_samples or (run.adapter.lora_dropout > 0 and has_lora(run.adapter)):
        return
    # Decoders' heads have no dropout, although GPT-NeoX's configuration names one.
    names = [name for name in DROPOUTS if is_encoder(config) or name not in OF_HEADS]
    own = [value for name in names if (value := getattr(config, name, None)) is not None]
    if run.base.base_dropout is not None:
        own = [run.base.base_dropout for _ in own]  # it takes the place of each, of 0.0 as well
    if max(own, default=0.0) <= 0:
        raise InputError(
            "--mc_dropout_samples: there is no dropout in the model; train an adapter with LoRA and --lora_dropout 0.1 "
            "(one at --adapter_path keeps its own), or give --base_dropout where the base has dropout"
        )


@contextlib.contextmanager
def dropout_noise(model: nn.Module, seed: int) -> Iterator[None]:
    """Within the block every dropout of the model drops, by masks that `seed` decides; nothing else changes.

    All modules are in training mode, without gradients: attention takes its dropout's rate by its own mode, and
    Gaussian matrices give their mean where no gradient is asked for. Random states are as before afterwards.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model.train()
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode


def batch_seed(seed: int, index: torch.Tensor) -> int:
    """The seed of a batch's masks, by the rows in it.

    Args:
        index: (B,) which rows of the data they are.
    """
    mixed = seed
    for i in index.tolist():
        mixed = (mixed * 6364136223846793005 + i + 1442695040888963407) % 2**63
    return mixed
