"""Logits at labelled positions alone give the loss, and the gradients, of all logits."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from bhpeft.adapters.architectures import layers_of
from bhpeft.adapters.bh_peft import BhPeftConfig
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
    own = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if kind == "gpt2" else {"intermediate_size": 64}
    if kind in ("llama", "mistral", "qwen2"):
        own["num_key_value_heads"] = 2
    config = AutoConfig.for_model(kind, **SHAPE, **own)
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


def positions_computed(model, batch: dict, rows: dict) -> list[int]:
    """How many positions of a row the last feed-forward block was given, in each pass."""
    found = []
    block = layers_of(model.get_base_model())[-1].mlp
    inner = next(module for module in block.modules() if isinstance(module, nn.Linear | Conv1D))
    hook = inner.register_forward_pre_hook(lambda module, args: found.append(args[0].shape[1]))
    with labelled_alone(model, at_labels(batch)) as chosen:
        model(**chosen)
    model(**rows)
    hook.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_feed_forward_block_gets_labelled_positions(kind):
    model, batch = model_of(kind, "lora"), batch_of(ROWS)
    assert positions_computed(model, batch, batch) == [2, 7]  # as many as the row with most has; then all, as before
    many = batch_of([{"input_ids": [5, 6, 7, 8, 9, 10, 11], "labels": [-100, -100, 7, 8, 9, 10, 11]}])
    assert positions_computed(model, many, many) == [7, 7]  # 5 of 7: not worth it


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_computed_again_are_left_whole(kind):
    model, batch = model_of(kind, "lora").train(), batch_of(ROWS)
    _, gradients, _ = loss_and_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with labelled_alone(model, at_labels(batch)) as chosen:
        loss = model(**chosen).loss
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for a, b in zip(gradients, torch.autograd.grad(loss, trained), strict=True):  # behind the block, as in training
        assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_sample_of_each_row_stays_with_its_row(kind):
    """The parallel adapter is around the block that gets fewer positions, and its noise may differ by row."""
    base = model_of(kind, "lora").unload()
    model = get_peft_model(base, BhPeftConfig(task_type="CAUSAL_LM", bayesian="all", initial_sigma=0.3))
    model.train()  # with noise
    batch = batch_of(ROWS)
    found = []
    for labelled in (False, True):
        torch.manual_seed(1)
        chosen = at_labels(batch) if labelled else batch
        with labelled_alone(model, chosen) if labelled else contextlib.nullcontext(batch) as chosen:
            loss = model(**chosen).loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        found.append([loss, *torch.autograd.grad(loss, trained)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


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
    _, gradients, _ = loss_and_gradients(model, batch)
    with labelled_alone(model, at_labels(batch)) as chosen:
        loss, alone, _ = loss_and_gradients(model, chosen)
    assert torch.allclose(whole.loss, loss, rtol=1e-5)
    for a, b in zip(gradients, alone, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert positions_computed(model, batch, batch) == [4, batch["input_ids"].shape[1]]


def test_a_batch_without_labels_is_left_alone():
    batch = batch_of(ROWS) | {"labels": torch.full((3, 7), -100)}
    assert at_labels(batch) is batch
    with labelled_alone(model_of("llama", "lora"), batch) as chosen:
        assert chosen is batch
