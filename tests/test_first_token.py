"""The last layer for the first token alone: logits, gradients and counted work, against the whole layer."""

from __future__ import annotations

import pytest
import torch
from test_bh_peft import ENCODERS, batch, config_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, AutoModelForSequenceClassification

from bhpeft.adapters import attach_adapter
from bhpeft.adapters.posterior import posterior_noise
from bhpeft.arguments import AdapterArguments
from bhpeft.base_model import load_with_head
from bhpeft.feature_distance import mean_features
from bhpeft.first_token import read_first_token_alone

SMALL = {"prefix_length": 4, "bn_reduction_factor": 8, "lora_rank": 4}
WHOLE = {"output_hidden_states": True}  # who asks for them gets the last layer of every token: the second path


def adapted(kind, adapter, folder, task="classification"):
    """A model of random weights, its adapter moved away from its start, and a padded batch."""
    torch.manual_seed(0)
    AutoModel.from_config(config_of(kind)).save_pretrained(folder)
    base, modules = load_with_head(str(folder), task, ("a", "b", "c"), pad_token_id=1, dropout=0.0)
    model = attach_adapter(base, AdapterArguments(adapter_name=adapter, **SMALL), str(folder), task, modules)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith(".g"):
            torch.nn.init.normal_(parameter, std=0.3)
    inputs = batch()
    inputs["attention_mask"][1, 7:] = 0
    if task == "multiple_choice":
        return model, {name: value.view(1, 3, -1) for name, value in inputs.items()} | {"labels": torch.tensor([1])}
    return model, {**inputs, "labels": torch.tensor([0, 1, 2])}


def learned(model, inputs, seed, **asked):
    torch.manual_seed(seed)
    model.zero_grad()
    found = model(**inputs, **asked)
    found.loss.backward()
    return found, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task", ["classification", "multiple_choice"])
@pytest.mark.parametrize("adapter", ["lora", "mam"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_logits_and_gradients_are_those_of_the_whole_layer(kind, adapter, task, checkpointing, tmp_path):
    model, inputs = adapted(kind, adapter, tmp_path, task)
    model.train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    short, own = learned(model, inputs, 3)
    whole, expected = learned(model, inputs, 3, **WHOLE)
    rows = inputs["input_ids"].shape[-2]
    assert whole.hidden_states[-1].shape[:2] == (rows, 10)
    assert torch.allclose(short.logits, whole.logits, atol=1e-5)
    assert own.keys() == expected.keys() and len(own) >= 10
    for name, gradient in own.items():
        bound = 1e-4 * max(1, expected[name].abs().max().item())
        assert torch.allclose(gradient, expected[name], atol=bound), name


def test_posterior_samples_are_those_of_the_whole_layer(tmp_path):
    model, inputs = adapted("bert", "bh-peft", tmp_path)
    model.eval()
    inputs = {name: value.repeat(3, *[1] * (value.dim() - 1)) for name, value in inputs.items()}
    with torch.no_grad(), posterior_noise(model, 3):
        assert torch.allclose(model(**inputs).logits, model(**inputs, **WHOLE).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODERS)
def test_so_much_work_is_left_out(kind):
    """Of B L tokens all but B leave out the query, the output projection and both layers of the feed-forward block."""
    model = AutoModelForSequenceClassification.from_config(config_of(kind)).eval()
    read_first_token_alone(model)
    counted = []
    for asked in ({}, WHOLE):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**batch(3, 10), **asked)
        counted.append(counter.get_total_flops())
    assert counted[1] - counted[0] == 2 * 3 * (10 - 1) * (2 * 64 * 64 + 2 * 64 * 128)


def test_features_are_of_every_token(tmp_path):
    model, inputs = adapted("roberta", "lora", tmp_path)
    inputs.pop("labels")
    plain = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    with torch.no_grad(), model.disable_adapter():
        assert torch.allclose(mean_features(model.eval(), inputs), mean_features(plain, inputs), atol=1e-5)


def test_an_encoder_that_is_not_known_stays_as_it_is(tmp_path):
    AutoModel.from_config(config_of("electra")).save_pretrained(tmp_path)
    model, _ = load_with_head(str(tmp_path), "classification", ("a", "b"), pad_token_id=1)
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_attention_of_a_known_encoder_is_ours_and_is_not_saved(tmp_path):
    AutoModel.from_config(config_of("bert")).save_pretrained(tmp_path)
    model, _ = load_with_head(str(tmp_path), "classification", ("a", "b"), pad_token_id=1)
    assert model.config._attn_implementation == ("sdpa" if torch.cuda.is_available() else "bhpeft_sdpa")
    model.save_pretrained(tmp_path / "saved")
    assert "bhpeft" not in (tmp_path / "saved/config.json").read_text()


def test_an_architecture_that_is_not_known_stays_whole():
    model = AutoModelForSequenceClassification.from_config(config_of("gpt2"))
    read_first_token_alone(model)
    assert not any(module._forward_pre_hooks for module in model.modules())
