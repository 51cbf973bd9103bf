"""Launched by test_zero3.py: the KL and its gradient under ZeRO-3, each parameter sharded, against torch.distributions.

For a model with and without gradient checkpointing, over two accumulated micro-steps. Writes the largest relative
deviations, a JSON file a rank.
"""

import json
import os
import sys
from pathlib import Path

import deepspeed
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from bhpeft.adapters import BhPeftConfig, gaussian_layers, kl_divergence

settings = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_param": {"device": "cpu"}},
}
deepspeed.init_distributed("gloo")
found = {}
for checkpointing in (False, True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    adapter = BhPeftConfig(bn_reduction_factor=4, prefix_length=4, bayesian="all", prior_mu=0.1, prior_sigma=0.3)
    model = get_peft_model(LlamaForCausalLM(config), adapter).train()
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    layers = gaussian_layers(model)
    weights = [(layer.mu.detach().clone(), layer.g.detach().clone()) for layer in layers]
    trainable = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trainable, lr=0.1), config=settings)
    kls = []
    for step in range(2):
        ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(step + 10 * int(os.environ["RANK"])))
        nll = engine(input_ids=ids, labels=ids).loss
        kl = kl_divergence(gaussian_layers(model))
        kls.append(kl.item())
        engine.backward(0.0 * nll + kl)
    worst = expected = 0.0
    for layer, (mu, g) in zip(layers, weights, strict=True):
        mu.requires_grad_(), g.requires_grad_()
        normal = torch.distributions.Normal
        prior = normal(torch.full_like(mu, 0.1), torch.full_like(mu, 0.3))
        reference = torch.distributions.kl_divergence(normal(mu, g**2), prior).sum()
        reference.backward()
        expected += reference.item()
        for parameter, copy in ((layer.mu, mu), (layer.g, g)):
            got = deepspeed.utils.safe_get_full_grad(parameter)
            worst = max(worst, ((got - copy.grad).abs().max() / copy.grad.abs().max()).item())
    found["checkpointing" if checkpointing else "plain"] = {
        "layers": len(layers),
        "sharded": all(p.numel() == 0 for layer in layers for p in (layer.mu, layer.g)),
        "kl": max(abs(kl / expected - 1) for kl in kls),
        "gradient": worst,
        "world": torch.distributed.get_world_size(),
    }
Path(os.environ["INSPECT_OUT"], f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
