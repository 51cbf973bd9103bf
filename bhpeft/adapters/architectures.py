"""Where the three sites are, by architecture: a new one is a line here."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from bhpeft.errors import InputError


class Places(NamedTuple):
    """Names of modules, matched at the end of a module's full name.

    `feed_forward` is one module, or the first and the last layer of a block that is written out in its layer.
    """

    attention: str  # the module that calls the attention function
    lora: tuple[str, ...]  # query and value projections, or the fused projection that holds them
    feed_forward: tuple[str, ...]


_BERT = Places("attention.self", ("self.query", "self.value"), ("intermediate.dense", ".output.dense"))
_LLAMA = Places("self_attn", ("self_attn.q_proj", "self_attn.v_proj"), ("mlp",))

PLACES = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": Places("attention", ("attention.q_lin", "attention.v_lin"), ("ffn",)),
    "gpt2": Places("attn", ("attn.c_attn",), ("mlp",)),
    "gpt_neox": Places("attention", ("attention.query_key_value",), ("mlp",)),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}


def places_of(config: PretrainedConfig) -> Places:
    """The places of an architecture.

    Raises:
        InputError: the table has no such architecture.
    """
    if config.model_type not in PLACES:
        raise InputError(
            f"architecture {config.model_type!r}: BH-PEFT knows no places for it; known: {', '.join(sorted(PLACES))}. "
            "A new one is a line in bhpeft/adapters/architectures.py"
        )
    return PLACES[config.model_type]


def layers_of(base: nn.Module) -> nn.ModuleList:
    """The stack of layers of an architecture of the table: the first list there is."""
    return next(module for module in base.modules() if isinstance(module, nn.ModuleList))


def attention_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """(heads, key/value heads, width of a head) of a configuration, whatever it calls them."""
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_width
