"""Logits at labelled positions alone give the loss, and the gradients, of all logits."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from bhpeft.labelled_logits import at_labels, labelled_alone, takes_positions, virtual_tokens_of
from bhpeft.tasks.packing import PackingCollator

SHAPE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
KINDS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2")
ROWS = [
    {"input_ids": [5, 6, 7, 8, 9, 10, 11], "labels": [-100] * 5 + [10, 11]},
    {"input_ids": [12, 13, 14, 15], "labels": [-100] * 3 + [15]},
    {"input_ids": [16, 17, 18, 19, 20], "labels": [-100] * 4 + [20]},
]


def model_of(kind: str, adapter: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind, intermediate_size=64, **SHAPE, num_key_value_heads=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    base = AutoModelForCausalLM.from_config(config)
    if adapter == "lora":
        targets = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"]}.get(kind, ["q_proj", "v_proj"])
        settings = LoraConfig(target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    else:
        settings = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    return get_peft_model(base, settings)


def batch_of(rows: list[dict]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def stack(name: str, value: int) -> torch.Tensor:
        return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

    return {
        "input_ids": stack("input_ids", 0),
        "attention_mask": (stack("input_ids", -1) >= 0).long(),
        "labels": stack("labels", -100),
    }


def loss_and_gradients(model, batch: dict) -> tuple[torch.Tensor, list[torch.Tensor], int]:
    found = model(**batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return found.loss, torch.autograd.grad(found.loss, trained), found.logits.shape[1]


@pytest.mark.parametrize("adapter", ["lora", "prompt-tuning"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_all_logits(kind, adapter):
    model = model_of(kind, adapter)
    batch = batch_of(ROWS)
    whole, gradients, width = loss_and_gradients(model, batch)
    virtual = virtual_tokens_of(model)
    assert takes_positions(model) and virtual == (3 if adapter == "prompt-tuning" else 0)
    part, found, kept = loss_and_gradients(model, at_labels(batch, virtual))
    assert kept == 4 and width == 7 + virtual  # positions 2, 3, 4 and 5 foresee a label of some row
    with labelled_alone(model, at_labels(batch, virtual)) as chosen:
        alone, of_these, positions = loss_and_gradients(model, chosen)
        logits = model(**chosen).logits
    assert positions == 4 and logits.shape == (1, 4, SHAPE["vocab_size"])  # of 3 rows x 4
    for loss, others in ((part, found), (alone, of_these)):
        assert torch.allclose(whole, loss, rtol=1e-5)
        for a, b in zip(gradients, others, strict=True):
            assert torch.allclose(a, b, atol=1e-6)
    assert model(**batch).logits.shape[1] == width  # nothing is left behind


def test_the_sum_over_items_is_the_same_too():
    """Where the Trainer divides by the tokens of all micro-steps of a step."""
    model, batch = model_of("llama", "lora"), batch_of(ROWS)
    items = torch.tensor(11)
    whole = model(**batch, num_items_in_batch=items).loss
    assert torch.allclose(whole, model(**at_labels(batch), num_items_in_batch=items).loss, rtol=1e-5)
    with labelled_alone(model, at_labels(batch)) as chosen:
        assert torch.allclose(whole, model(**chosen, num_items_in_batch=items).loss, rtol=1e-5)


def test_rows_end_to_end():
    model = model_of("llama", "lora").eval()
    batch = PackingCollator(0)(ROWS)
    whole = model(**batch)
    part = model(**at_labels(batch))
    assert torch.allclose(whole.loss, part.loss, rtol=1e-5) and part.logits.shape[1] == 4 < whole.logits.shape[1]


def test_a_batch_without_labels_is_left_alone():
    batch = batch_of(ROWS) | {"labels": torch.full((3, 7), -100)}
    assert at_labels(batch) is batch
    with labelled_alone(model_of("llama", "lora"), batch) as chosen:
        assert chosen is batch
