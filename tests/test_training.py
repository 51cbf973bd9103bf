"""The loss: mean NLL + kl_weight * KL / N, the same whichever way the rows are spread over micro-steps."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoTokenizer, TrainingArguments

from bhpeft.adapters import attach_adapter, gaussian_layers, kl_divergence
from bhpeft.arguments import AdapterArguments
from bhpeft.base_model import load_base_model
from bhpeft.tasks import Example
from bhpeft.tasks.encoding import Collator, Encoder
from bhpeft.training import AdapterTrainer


def gradients(tiny_model, tmp_path, batch, accumulation, kl_weight):
    """Gradients of one optimizer step over the same eight rows, noise off, and the number of rows."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    queries = [f"Do {kind} sleep{'?' * (i % 3 + 1)}" for i, kind in enumerate(["cats", "dogs", "owls", "eels"] * 2)]
    examples = [Example(str(i), q, "True, so they do." if i % 2 else "False.", q) for i, q in enumerate(queries)]
    rows = Encoder(tokenizer, "{text_input}", 48).train_rows(examples, [])
    torch.manual_seed(0)
    settings = {"adapter_name": "bh-peft", "prefix_length": 4, "bn_reduction_factor": 8, "prior_sigma": 0.3}
    model = attach_adapter(load_base_model(str(tiny_model)), AdapterArguments(**settings), str(tiny_model))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith(".g"):
            torch.nn.init.normal_(parameter, std=0.2)
        elif parameter.requires_grad:
            parameter.data.fill_(1e-3)  # noise of 1e-6: the NLL's gradient is that of the mean
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        max_steps=1, max_grad_norm=0, report_to="none", save_strategy="no", remove_unused_columns=False,
        learning_rate=0.0, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = AdapterTrainer(
        model=model, args=arguments, train_dataset=rows, data_collator=Collator(tokenizer.pad_token_id)
    )
    trainer.kl_weight = kl_weight
    found = {}
    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    trainer.train()
    return found, model, len(rows)


def test_kl_is_counted_once_a_step_however_rows_are_spread(tiny_model, tmp_path):
    whole, model, _ = gradients(tiny_model, tmp_path, batch=8, accumulation=1, kl_weight=2.0)
    spread, _, _ = gradients(tiny_model, tmp_path, batch=2, accumulation=4, kl_weight=2.0)
    assert whole.keys() == spread.keys() and any(name.endswith(".mu") for name in whole)
    for name, grad in whole.items():
        assert torch.allclose(grad, spread[name], rtol=1e-3, atol=1e-5 * grad.abs().max().item() + 1e-7), name


def test_the_kl_part_of_the_gradient_is_the_closed_form(tiny_model, tmp_path):
    with_kl, model, rows = gradients(tiny_model, tmp_path, batch=8, accumulation=1, kl_weight=50.0)
    without, _, _ = gradients(tiny_model, tmp_path, batch=8, accumulation=1, kl_weight=0.0)
    checked = 0
    for name, module in model.named_modules():
        if module in gaussian_layers(model):
            part = with_kl[f"{name}.mu"] - without[f"{name}.mu"]
            closed = 50.0 / rows * (module.mu - module.prior_mu) / module.prior_sigma**2
            assert torch.allclose(part, closed, rtol=1e-3, atol=1e-3 * closed.abs().max().item()), name
            checked += 1
    assert checked == len(gaussian_layers(model)) == 7


@pytest.mark.parametrize("accumulation", [1, 4])
def test_gradient_norms_of_nll_and_kl_are_logged_apart(tiny_model, tmp_path, accumulation):
    """Over the Gaussian weights: that of the KL in closed form, that of the NLL from what flows back without the KL."""
    seen = {}
    original = AdapterTrainer.log
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            AdapterTrainer, "log", lambda self, logs, *a, **k: (original(self, logs, *a, **k), seen.update(logs))
        )
        with_kl, model, rows = gradients(tiny_model, tmp_path, 8 // accumulation, accumulation, kl_weight=50.0)
    without, _, _ = gradients(tiny_model, tmp_path, 8, 1, kl_weight=0.0)
    names = [name for name in with_kl if name.endswith((".mu", ".g"))]
    kl = sum((with_kl[name] - without[name]).square().sum() for name in names).sqrt().item()
    assert seen["kl_grad_norm"] == pytest.approx(kl, rel=1e-3)
    closed = 0.0
    for layer in gaussian_layers(model):
        sigma = layer.g**2
        closed += ((layer.mu - layer.prior_mu) / layer.prior_sigma**2).square().sum().item()
        closed += (2 * layer.g * (sigma / layer.prior_sigma**2 - 1 / sigma)).square().sum().item()
    assert seen["kl_grad_norm"] == pytest.approx(50.0 / rows * closed**0.5, rel=1e-3)
    if accumulation == 1:
        nll = sum(without[name].square().sum() for name in names).sqrt().item()
        assert seen["nll_grad_norm"] == pytest.approx(nll, rel=1e-3)
    assert seen["nll"] + seen["kl_term"] * accumulation == pytest.approx(seen["loss"], rel=1e-3) or accumulation > 1
    assert seen["kl_term"] == pytest.approx(50.0 * seen["kl"] / rows / accumulation, rel=1e-3)


def test_no_gradient_is_left_behind_a_step_and_the_model_is_as_before(tiny_model, tmp_path):
    found, model, _ = gradients(tiny_model, tmp_path, batch=4, accumulation=2, kl_weight=1.0)
    assert found and all(parameter.grad is None for parameter in model.parameters())
    assert "zero_grad" not in vars(model)


def test_evaluation_has_no_kl(tiny_model):
    settings = {"adapter_name": "bh-peft", "prefix_length": 4, "bn_reduction_factor": 8}
    model = attach_adapter(load_base_model(str(tiny_model)), AdapterArguments(**settings), str(tiny_model)).eval()
    ids = torch.arange(3, 9)[None]
    first = model(input_ids=ids, labels=ids).loss
    assert kl_divergence(gaussian_layers(model)) is None
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(first.item(), abs=0)
