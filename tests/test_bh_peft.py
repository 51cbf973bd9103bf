"""BH-PEFT on every architecture: the identity at the start, references by hand, KL and noise in closed form."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch
from conftest import run_command
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    GPT2Config,
    RobertaConfig,
)

from bhpeft.adapters import BhPeftConfig, drawn_noise, kl_divergence, posterior, posterior_noise, posterior_samples
from bhpeft.adapters.bh_peft import PRESETS, gaussian_layers
from bhpeft.adapters.gaussian import GaussianLinear, _kl_and_gradient
from bhpeft.adapters.posterior import CPU_TOKENS, passes
from bhpeft.adapters.prefix_attention import _merged
from bhpeft.base_model import parameter_counts
from bhpeft.errors import InputError

ENCODERS = ("roberta", "bert", "distilbert")
DECODERS = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2")
EVERY = ENCODERS + DECODERS
SITES = (["prefix"], ["lora"], ["adapter"], ["prefix", "lora", "adapter"])


def config_of(kind):
    if kind == "distilbert":
        shape = {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}
        return DistilBertConfig(vocab_size=99, max_position_embeddings=64, **shape)
    if kind == "gpt2":
        return GPT2Config(vocab_size=99, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=2)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    if kind in ("llama", "mistral", "qwen2"):
        shape["num_key_value_heads"] = 2
    if kind == "mistral":
        shape["sliding_window"] = 6
    ids = {"vocab_size": 99, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "max_position_embeddings": 64}
    return AutoConfig.for_model(kind, **shape, **ids)


def base_of(kind, implementation="sdpa", head=None):
    torch.manual_seed(0)
    head = head or (AutoModelForSequenceClassification if kind in ENCODERS else AutoModelForCausalLM)
    return head.from_config(config_of(kind), attn_implementation=implementation).eval()


def adapted(base, shake=True, **settings):
    """An adapter of small sites; `shake` moves every weight away from its start, gates and up matrices included."""
    torch.manual_seed(1)
    settings = {"bn_reduction_factor": 8, "prefix_length": 5, "lora_rank": 4, **settings}
    model = get_peft_model(copy.deepcopy(base), BhPeftConfig(**settings)).eval()
    if shake:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith(".g"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def batch(rows=3, length=10):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 99, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# ------------------------------------------------------------------------------ every architecture and site


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("sites", SITES, ids="+".join)
@pytest.mark.parametrize("kind", EVERY)
def test_the_start_is_the_identity_and_only_the_adapter_trains(kind, sites, implementation):
    base = base_of(kind, implementation)
    inputs = batch()
    inputs["attention_mask"][1, 7:] = 0
    with torch.no_grad():
        expected = base(**inputs).logits
        model = adapted(base, shake=False, sites=sites)
        assert (model(**inputs).logits - expected).abs().max() <= 1e-5
        moved = adapted(base, sites=sites)
        assert (moved(**inputs).logits - expected).abs().max() > 1e-4  # the site is really in the way
        with moved.disable_adapter():
            assert (moved(**inputs).logits - expected).abs().max() <= 1e-6
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("bh_" in name for name in trainable)


@pytest.mark.parametrize("kind", EVERY)
def test_padding_changes_nothing(kind):
    model = adapted(base_of(kind))
    if kind in DECODERS:  # (the head of an encoder reads the first token alone)
        short = batch(2, 6)
        pad = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)}
        right = {name: torch.cat([value, pad[name]], 1) for name, value in short.items()}
        with torch.no_grad():
            assert torch.allclose(model(**right).logits[:, :6], model(**short).logits, atol=1e-5)
        return
    long = batch(2, 10)
    long["attention_mask"][:, 6:] = 0
    short = {name: value[:, :6] for name, value in long.items()}
    with torch.no_grad():
        assert torch.allclose(model(**long).logits, model(**short).logits, atol=1e-5)


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("kind", DECODERS)
def test_no_look_ahead(kind, mask):
    model = adapted(base_of(kind))
    inputs = batch()
    other = {name: value.clone() for name, value in inputs.items()}
    other["input_ids"][:, 6:] = 50
    if not mask:
        del inputs["attention_mask"], other["attention_mask"]
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits[:, :6], model(**other).logits[:, :6], atol=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_greedy_generation_with_the_cache_equals_without(kind):
    model = adapted(base_of(kind))
    inputs = batch(3, 7)
    inputs["input_ids"][1, :3], inputs["attention_mask"][1, :3] = 1, 0  # padded on the left
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached = model.generate(**inputs, **settings, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **settings, use_cache=False))
    with model.disable_adapter():
        assert not torch.equal(cached, model.generate(**inputs, **settings))


@pytest.mark.parametrize("kind", EVERY)
def test_checkpointing_gives_the_same_gradients(kind):
    grads = []
    for checkpointing in (False, True):
        model = adapted(base_of(kind), bayesian="down").train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        labels = torch.tensor([0, 1, 0]) if kind in ENCODERS else batch()["input_ids"]
        for module in model.modules():  # the noise of dropout would be drawn again
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(5)
        loss = model(**batch(), labels=labels).loss + 0.01 * kl_divergence(gaussian_layers(model))
        loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert torch.allclose(grad, grads[1][name], atol=1e-5, rtol=1e-4), name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["roberta", "llama", "gpt2"])
def test_save_load_and_the_prior_travel_together(kind, preset, tmp_path):
    base = base_of(kind)
    task = "SEQ_CLS" if kind in ENCODERS else "CAUSAL_LM"
    model = adapted(base, **PRESETS[preset], task_type=task, prior_mu=0.25, prior_sigma=0.5)
    for layer in gaussian_layers(model):
        layer.prior_mu.add_(torch.randn_like(layer.prior_mu))  # as after a round
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True).eval()
    with torch.no_grad():
        assert torch.allclose(again(**batch()).logits, model(**batch()).logits, atol=1e-6)
    for one, two in zip(gaussian_layers(model), gaussian_layers(again), strict=True):
        assert torch.equal(one.prior_mu, two.prior_mu) and torch.equal(one.prior_sigma, two.prior_sigma)
    names = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again)]
    assert names[0] == names[1]
    frozen = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize("first", ["import bhpeft, peft", "import peft, bhpeft"])
def test_importing_the_package_is_enough_to_load_an_adapter(first, tmp_path):
    base = base_of("llama")
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    code = f"""{first}, sys, torch
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = peft.PeftModel.from_pretrained(base, sys.argv[2])
print("sum", model(torch.arange(3, 9)[None]).logits.sum().item())
"""
    finished = run_command([sys.executable, "-c", code, tmp_path / "base", tmp_path / "adapter"])
    assert finished.returncode == 0, finished.stderr[-3000:]
    with torch.no_grad():
        expected = model(torch.arange(3, 9)[None]).logits.sum().item()
    assert float(finished.stdout.split("sum ")[1]) == pytest.approx(expected, abs=1e-3)


def test_the_package_alone_loads_no_torch():
    code = "import sys, bhpeft.results; assert not {'torch', 'peft', 'transformers'} & set(sys.modules)"
    assert run_command([sys.executable, "-c", code]).returncode == 0


def test_multiple_choice_and_regression_heads():
    base = base_of("roberta", head=AutoModelForMultipleChoice)
    model = adapted(base, modules_to_save=["classifier"])
    inputs = {name: value.view(2, 3, 10) for name, value in batch(6, 10).items()}
    out = model(**inputs, labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3) and out.loss.isfinite()
    one = {"num_labels": 1, "problem_type": "regression"}
    regression = RobertaConfig.from_dict({**config_of("roberta").to_dict(), **one})
    model = adapted(AutoModelForSequenceClassification.from_config(regression), task_type="SEQ_CLS")
    assert model(**batch(), labels=torch.tensor([0.1, 2.0, -1.0])).loss.isfinite()
    assert any(p.requires_grad for n, p in model.named_parameters() if "classifier" in n)


def test_modes_reach_every_module():
    model = get_peft_model(base_of("bert"), BhPeftConfig(bn_reduction_factor=8))  # the base in evaluation mode still
    assert all(module.training for module in model.train().modules())
    assert not any(module.training for module in model.eval().modules())
    model.base_model.model.late = torch.nn.Dropout()
    assert not any(module.training for module in model.eval().modules())
    assert all(module.training for module in model.train().modules())


def test_an_architecture_without_places_is_refused():
    with pytest.raises(InputError, match="'albert': BH-PEFT knows no places.*architectures.py"):
        adapted(AutoModelForSequenceClassification.from_config(AutoConfig.for_model("albert", num_hidden_layers=1)))


# ------------------------------------------------------------------------------------ references by hand


def softmax_attention(query, key, value, allowed):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize("start", ["random", "identity"])
def test_the_prefix_equals_attention_over_concatenated_keys_and_values(start):
    """GPT-2's first attention layer, written out with and without the gate."""
    model = adapted(base_of("gpt2"), sites=["prefix"], bayesian="none", prefix_start=start)
    attention = model.get_base_model().transformer.h[0].attn
    seen = {}
    attention.c_attn.register_forward_hook(lambda m, a, out: seen.update(qkv=out))
    attention.c_proj.register_forward_pre_hook(lambda m, a: seen.update(out=a[0]))
    with torch.no_grad():
        model(**batch())
        source = model.get_base_model().transformer.bh_source.bh_parts["default"]
        up = attention.bh_prefix.bh_parts["default"]
        hidden = torch.tanh(source.embedding @ source.down.weight.T)
        pair = (hidden @ up.up.weight.T + up.up.bias).view(5, 2, 4, 16)
    heads = [part.view(3, 10, 4, 16).transpose(1, 2) for part in seen["qkv"].split(64, -1)]
    query, key, value = heads
    causal = torch.ones(10, 10, dtype=torch.bool).tril()
    plain = softmax_attention(query, key, value, causal)
    prefix_key, prefix_value = (pair[:, i].transpose(0, 1)[None].expand(3, -1, -1, -1) for i in (0, 1))
    both = softmax_attention(
        query, torch.cat([prefix_key, key], 2), torch.cat([prefix_value, value], 2),
        torch.cat([torch.ones(10, 5, dtype=torch.bool), causal], 1),
    )  # fmt: skip
    gate = 1.0 if start == "random" else up.gate[None, :, None, None]
    expected = (plain + gate * (both - plain)).transpose(1, 2).reshape(3, 10, 64)
    assert torch.allclose(seen["out"], expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_prefix_equals_stock_prefix_tuning_with_the_same_keys_and_values(kind):
    """Stock peft hands the prefix over as past keys and values, and counts it as positions: ours are moved for this."""
    base = base_of(kind)
    stock = get_peft_model(copy.deepcopy(base), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    kv_heads = 2 if kind == "llama" else 4
    past = stock.prompt_encoder["default"].embedding.weight.detach().view(5, 2, 2, kv_heads, 16)
    model = adapted(base, sites=["prefix"], bayesian="none", prefix_start="random")
    for i, site in enumerate(m for n, m in model.named_modules() if n.endswith("bh_prefix")):
        pair = past[:, i].permute(1, 2, 0, 3)  # (2, KV heads, P, width)
        site.forward = lambda rows, pair=pair: (*(part.expand(rows, -1, -1, -1) for part in pair), None)
    positions = torch.arange(5, 15)[None].expand(3, -1)
    with torch.no_grad():
        ours = model(**batch(), position_ids=positions).logits
        assert torch.allclose(ours, stock(**batch()).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_lora_and_the_parallel_adapter_equal_a_plain_reference(kind):
    base = base_of(kind)
    model = adapted(base, sites=["lora", "adapter"], bayesian="none", lora_alpha=6.0, adapter_scaling=4.0)
    block = model.get_base_model().model.layers[0] if kind == "llama" else model.get_base_model().transformer.h[0]
    projection = block.self_attn.q_proj if kind == "llama" else block.attn.c_attn
    x = torch.randn(2, 5, 64)
    part = projection.bh_parts["default"]
    with torch.no_grad():
        expected = projection.base_layer(x) + 6.0 / 4 * (x @ part.down.weight.T @ part.up.weight.T)
        assert torch.allclose(projection(x), expected, atol=1e-5)
        part = block.mlp.bh_parts["default"]
        delta = torch.relu(x @ part.down.weight.T) @ part.up.weight.T + part.up.bias
        assert torch.allclose(block.mlp(x), block.mlp.base_layer(x) + 4.0 * delta, atol=1e-4)


def test_the_parallel_adapter_of_a_block_in_two_modules_is_added_before_residual_and_norm():
    model = adapted(base_of("roberta"), sites=["adapter"], bayesian="none", adapter_scaling=4.0)
    layer = model.get_base_model().roberta.encoder.layer[0]
    x = torch.randn(2, 5, 64)
    part = layer.intermediate.dense.bh_parts["default"]
    with torch.no_grad():
        hidden = torch.nn.functional.gelu(layer.intermediate.dense.base_layer(x))
        delta = torch.relu(x @ part.down.weight.T) @ part.up.weight.T + part.up.bias
        expected = layer.output.LayerNorm(layer.output.dense.base_layer(hidden) + 4.0 * delta + x)
        assert torch.allclose(layer.feed_forward_chunk(x), expected, atol=1e-5)


def test_parameters_of_roberta_base_are_those_of_the_published_run():
    """Prefix 30 x 8, reduction 96, no LoRA, Gaussian down matrices: 431,616 besides the head, and our gates."""
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    with torch.device("meta"):
        base = AutoModelForSequenceClassification.from_config(config)
        model = get_peft_model(base, BhPeftConfig(sites=["prefix", "adapter"], bayesian="down"))
    sizes = {"gaussian": 0, "embedding": 0, "prefix_up": 0, "adapter_up": 0, "gate": 0}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        kind = (
            "gaussian" if name.endswith((".mu", ".g"))
            else "embedding" if name.endswith("embedding")
            else "gate" if name.endswith("gate")
            else "prefix_up" if "bh_prefix" in name
            else "adapter_up"
        )  # fmt: skip
        sizes[kind] += p.numel()
    published = {"gaussian": 159_744, "embedding": 23_040, "prefix_up": 165_888, "adapter_up": 82_944}
    assert sizes == {**published, "gate": 12 * 12}  # ours: one gate a head, so that it starts as the identity
    paper = BhPeftConfig(sites=["prefix", "adapter"], bayesian="down", prefix_start="random")
    with torch.device("meta"):
        model = get_peft_model(AutoModelForSequenceClassification.from_config(config), paper)
    assert parameter_counts(model)["trainable"] == 431_616


# ------------------------------------------------------------------------------------ Gaussian weights


def test_kl_and_its_gradient_equal_torch_distributions():
    torch.manual_seed(3)
    layer = GaussianLinear(7, 5, prior_mu=0.2, prior_sigma=0.3).train()
    layer.prior_sigma.mul_(torch.rand_like(layer.prior_sigma) + 0.5)
    layer(torch.randn(2, 4, 7))
    layer.kl.backward()
    mu, g = (p.detach().clone().requires_grad_() for p in (layer.mu, layer.g))
    normal = torch.distributions.Normal
    reference = torch.distributions.kl_divergence(normal(mu, g**2), normal(layer.prior_mu, layer.prior_sigma)).sum()
    reference.backward()
    assert torch.allclose(layer.kl, reference, rtol=1e-5)
    assert torch.allclose(layer.mu.grad, mu.grad, rtol=1e-4)
    assert torch.allclose(layer.g.grad, g.grad, rtol=1e-4)
    assert _kl_and_gradient(mu, g, mu, g**2)[0].item() == pytest.approx(0, abs=1e-4)


def test_noise_is_shared_by_the_tokens_of_an_example_and_not_by_examples():
    torch.manual_seed(0)
    layer = GaussianLinear(6, 4).train()
    x = torch.randn(1, 1, 6).expand(3, 2, 6)
    y = layer(x)
    assert torch.allclose(y[:, 0], y[:, 1]) and not torch.allclose(y[0], y[1])
    assert torch.equal(layer.eval()(x), layer(x))  # the mean in evaluation


@pytest.mark.parametrize("mode", ["training", "samples"])
def test_variance_of_many_draws_is_the_analytic_one(mode):
    """Var(y_o) = sum_i x_i^2 sigma_oi^2 for y = W x, W independent Gaussians."""
    torch.manual_seed(0)
    layer = GaussianLinear(6, 4)
    layer.g.data.uniform_(0.5, 1.0)
    x = torch.randn(6)
    draws = 40_000
    if mode == "training":
        outputs = torch.cat([layer.train()(x.expand(8, 1, 6))[:, 0].detach() for _ in range(draws // 8)])
    else:
        with posterior_noise(layer.eval(), draws):
            outputs = layer(x.expand(draws, 1, 6))[:, 0].detach()
    analytic = (layer.g.detach() ** 4) @ x**2
    assert torch.allclose(outputs.var(0), analytic, rtol=0.1)
    assert torch.allclose(outputs.mean(0), layer.mu.detach() @ x, atol=5 * (analytic.max() / draws) ** 0.5 + 0.05)


@pytest.mark.parametrize("bayesian", ["down", "all"])
@pytest.mark.parametrize("kind", ["roberta", "llama", "gpt2"])
def test_samples_in_one_pass_equal_samples_one_by_one(kind, bayesian):
    model = adapted(base_of(kind), bayesian=bayesian)
    for layer in gaussian_layers(model):
        layer.g.data.fill_(0.4)
    inputs = batch()
    together = posterior_samples(model, inputs, 4, seed=7)
    with posterior_noise(model, 4, seed=7) as noise:
        for s in range(4):
            for layer, eps in zip(gaussian_layers(model), noise, strict=True):
                layer.eps = eps[s : s + 1]
            with torch.no_grad():
                assert torch.allclose(model(**inputs).logits, together[s], atol=1e-4)
    assert together.std(0).max() > 1e-3
    with torch.no_grad():
        mean = model(**inputs).logits
        assert torch.equal(mean, model(**inputs).logits)  # without samples: the posterior mean


def test_samples_are_drawn_in_pairs_of_which_each_is_a_draw():
    layers = gaussian_layers(model := adapted(base_of("llama")))
    for samples in (1, 2, 5, 6):
        noise, pairs = drawn_noise(model, samples, seed=3), samples // 2
        assert [eps.shape for eps in noise] == [(samples, layer.out_features, layer.in_features) for layer in layers]
        assert all(torch.equal(eps[-pairs:], -eps[:pairs]) for eps in noise if pairs)
        assert len({float(eps[s, 0, 0]) for eps in noise for s in range(samples)}) == samples * len(noise)
    assert not torch.equal(drawn_noise(model, 2, seed=4)[0], drawn_noise(model, 2, seed=3)[0])


def test_pairs_bring_the_mean_nearer_than_draws_without():
    """Against the exact mean of sigmoid(a + b eps), by Gauss-Hermite quadrature, and draws without pairs."""
    layer = GaussianLinear(12, 1).eval()
    layer.g.data.fill_(0.6)
    x = torch.randn(12, generator=torch.Generator().manual_seed(0))
    a, b = float(layer.mu.detach() @ x), 0.36 * float(x.norm())
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    exact = float((weights / (1 + np.exp(-a - b * nodes))).sum() / weights.sum())

    def far(noise_of):
        errors = []
        for seed in range(300):
            with torch.no_grad(), posterior_noise(layer, 10, noise=noise_of(seed)):
                errors.append(float(layer(x.expand(10, 1, 12)).sigmoid().mean()) - exact)
        assert abs(np.mean(errors)) < 4 * np.std(errors) / 300**0.5  # neither is biased
        return np.std(errors)

    paired = far(lambda seed: drawn_noise(layer, 10, seed))
    assert paired < 0.5 * far(lambda seed: [torch.randn(10, 1, 12, generator=torch.Generator().manual_seed(seed))])


def test_noise_of_other_samples_is_refused():
    model = adapted(base_of("llama"))
    with (
        pytest.raises(ValueError, match="noise of 4 samples, yet 8"),
        posterior_noise(model, 8, noise=drawn_noise(model, 4)),
    ):
        pass


def test_sampling_says_why_it_cannot():
    with pytest.raises(ValueError, match="no Gaussian weights"):
        posterior_samples(adapted(base_of("llama"), bayesian="none"), batch(), 2)
    with pytest.raises(ValueError, match="model.eval"):
        posterior_samples(adapted(base_of("llama")).train(), batch(), 2)


def test_kl_is_none_without_gaussian_weights():
    model = adapted(base_of("llama"), bayesian="none").train()
    model(**batch())
    assert kl_divergence(gaussian_layers(model)) is None


@pytest.mark.parametrize("size", [1.0, 200.0])
def test_prefix_and_text_in_one_product_equal_the_joint_softmax_and_have_gradients_whatever_the_scores(size):
    """Where the prefix takes nearly all of the joint softmax, dividing by what is left of it would not."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 5, 8).requires_grad_() for _ in range(3))
    prefix_key = (size * query.detach().mean(2, keepdim=True).expand(-1, -1, 3, -1)).clone().requires_grad_()
    prefix_value = torch.randn(2, 4, 3, 8).requires_grad_()
    gate = torch.linspace(-0.5, 1.5, 4).requires_grad_()
    inputs = [query, key, value, prefix_key, prefix_value, gate]
    prefix = prefix_key, prefix_value, gate
    out, weights = _merged(torch.nn.Module(), query, key, value, None, prefix, is_causal=False)
    alone = (query @ key.mT / 8**0.5).softmax(-1)
    both = (query @ torch.cat([prefix_key, key], 2).mT / 8**0.5).softmax(-1) @ torch.cat([prefix_value, value], 2)
    expected = torch.lerp(alone @ value, both, gate[:, None, None]).transpose(1, 2)
    assert torch.allclose(out, expected, atol=1e-5) and torch.allclose(weights, alone, atol=1e-6)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), inputs)
    for a, b in zip(found, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):
        assert a.isfinite().all() and torch.allclose(a, b, rtol=1e-3, atol=1e-2 * size)


def seeded(function, *args):
    torch.manual_seed(3)
    return function(*args)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", [None, torch.bool, torch.float64])
def test_the_gradient_of_gated_attention_is_that_of_finite_differences(kind, dropout):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 2, 3, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    prefix_key, prefix_value = (torch.randn(2, 2, 2, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    gate = torch.tensor([0.3, -0.6], dtype=torch.float64).requires_grad_()
    seen = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    seen[1, :, :, 2] = False
    mask = (
        seen
        if kind == torch.bool
        else None
        if kind is None
        else torch.zeros(2, 1, 3, 3).double().masked_fill(~seen, -1e4)
    )
    module = torch.nn.Module().train()

    def attend(query, key, value, prefix_key, prefix_value, gate):
        prefix = prefix_key, prefix_value, gate
        return seeded(_merged, module, query, key, value, mask, prefix, None, dropout, False)[0]

    assert torch.autograd.gradcheck(attend, (query, key, value, prefix_key, prefix_value, gate))


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4)])
def test_the_gradient_of_a_gaussian_matrix_is_that_of_finite_differences(shape):
    torch.manual_seed(0)
    layer = GaussianLinear(4, 5, prior_mu=0.1, prior_sigma=0.3, initial_sigma=0.2).double().train()
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()

    def loss(x, mu, g):
        y = seeded(torch.func.functional_call, layer, {"mu": mu, "g": g}, (x,))
        return y, layer.kl

    inputs = x, layer.mu.detach().requires_grad_(), layer.g.detach().requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs)


def test_noise_is_one_weight_an_example_drawn_from_the_posterior():
    """Of one row repeated: each example has outputs of its own, all its tokens the same weights; mean and variance are
    those of x W^T with W ~ N(mu, sigma^2)."""
    torch.manual_seed(0)
    layer = GaussianLinear(6, 3, initial_sigma=0.3).train()
    x = torch.randn(6)
    tokens = x.expand(4000, 2, 6)
    y = torch.cat([layer(tokens) for _ in range(40)])
    assert torch.equal(y[:, 0], y[:, 1]) and len(y[:4000, 0, 0].unique()) > 16
    sd = (layer.g.square() * x).norm(dim=1)
    assert torch.allclose(y[:, 0].std(0), sd, rtol=0.25) and torch.allclose(y[:, 0].mean(0), x @ layer.mu.T, atol=0.05)


@pytest.mark.parametrize("shape", [(1, 9), (23, 40), (6, 3, 12), (40, 50)])
def test_passes_take_every_row_once_in_the_memory_of_the_batch(shape):
    torch.manual_seed(0)
    lengths = torch.randint(1, shape[-1] + 1, shape[:-1])
    mask = (torch.arange(shape[-1]) < lengths[..., None]).long()
    found = passes(mask, 10)
    assert sorted(torch.cat(found).tolist()) == list(range(shape[0]))
    for group in found:
        wide = mask[group].flatten(0, -2).any(0).sum()
        assert len(group) == 1 or 10 * mask[group, ..., 0].numel() * wide <= max(mask.numel(), CPU_TOKENS)
    longest = [int(lengths[group].max()) for group in found]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sampled_scores_of_rows_do_not_depend_on_how_passes_are_made(side, monkeypatch):
    """Against one sample at a time on the batch as it is padded; enough rows for several passes."""
    monkeypatch.setattr(posterior, "TOKENS", 60)
    model = adapted(base_of("roberta", "sdpa" if side == "right" else "eager"))
    for layer in gaussian_layers(model):
        layer.g.data.fill_(0.4)
    inputs = batch(9, 12)
    for row, length in enumerate((12, 3, 7, 7, 1, 11, 5, 2, 12)):
        padding = slice(length, None) if side == "right" else slice(0, 12 - length)
        inputs["attention_mask"][row, padding], inputs["input_ids"][row, padding] = 0, 1
    seen = []

    def score(part):
        seen.append(tuple(part["input_ids"].shape))
        hidden = model.get_base_model().base_model(**part).last_hidden_state
        mask = part["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    with torch.no_grad(), posterior_noise(model, 3, seed=7) as noise:
        together = posterior.sampled(score, inputs, 3)
        shapes = list(seen)
        for s in range(3):
            for layer, eps in zip(gaussian_layers(model), noise, strict=True):
                layer.eps = eps[s : s + 1]
            assert torch.allclose(score(inputs), together[s], atol=1e-4)
    assert len(shapes) > 2 and all(rows * width <= 9 * 12 for rows, width in shapes)
