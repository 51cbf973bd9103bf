"""What an adapter has learned: adapters built so that the answer is known, and one that peft has written."""

import csv
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from safetensors.numpy import save_file

from bhpeft import interpret
from bhpeft.errors import InputError
from bhpeft.tensor_files import TensorFile, TensorFolder

RNG = np.random.default_rng(0)


def adapter(folder, weights, **config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({k: np.ascontiguousarray(v, dtype=np.float32) for k, v in weights.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    return interpret.Adapter(folder)


def run(*words):
    command = [sys.executable, ROOT / "util" / "interpret.py", *words]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8", timeout=60)


def test_the_nearest_tokens_of_a_prompt_over_blocks(monkeypatch):
    monkeypatch.setattr(interpret, "BLOCK", 7)
    embeddings = RNG.normal(size=(50, 8)).astype(np.float32)
    embeddings[3] = 0  # a token that was never trained
    prompt = np.stack([5 * embeddings[41], -embeddings[2], embeddings[10] + 0.1 * embeddings[11]])
    places, cosines = interpret.nearest(prompt, embeddings, 4)
    unit = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-12)
    whole = prompt / np.linalg.norm(prompt, axis=1, keepdims=True) @ unit.T
    assert places[0][0] == 41 and places[2][0] == 10 and cosines[0][0] == pytest.approx(1)
    assert np.array_equal(places, np.argsort(-whole, axis=1)[:, :4])
    assert cosines == pytest.approx(np.sort(whole, axis=1)[:, ::-1][:, :4], abs=1e-6)


def test_norms_of_lora_updates_are_those_of_the_whole_matrices(tmp_path):
    names = ["base_model.model.model.layers.10.self_attn.q_proj", "base_model.model.model.layers.2.self_attn.v_proj"]
    pairs = {name: (RNG.normal(size=(4, 12)), RNG.normal(size=(9, 4))) for name in names}
    weights = {f"{n}.lora_{k}.weight": m for n, pair in pairs.items() for k, m in zip("AB", pair, strict=True)}
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 6}
    plain = adapter(tmp_path / "plain", weights, **settings).updates()
    assert [(u.layer, u.module, u.rank) for u in plain] == [(2, "self_attn.v_proj", 4), (10, "self_attn.q_proj", 4)]
    for update, name in zip(plain, names[::-1], strict=True):
        a, b = pairs[name]
        assert update.norm == pytest.approx(np.linalg.norm(6 / 4 * b @ a), rel=1e-5)
    rank_stabilised = adapter(tmp_path / "rs", weights, use_rslora=True, **settings).updates()
    assert rank_stabilised[0].norm == pytest.approx(2 * plain[0].norm)
    other = adapter(tmp_path / "pattern", weights, alpha_pattern={"q_proj": 12}, **settings).updates()
    assert [u.norm / v.norm for u, v in zip(other, plain, strict=True)] == pytest.approx([1, 2])


def gaussian(module, matrix, mu, sigma, prior=(0.0, 0.1)):
    parts = {"mu": mu, "g": np.sqrt(sigma), "prior_mu": np.full_like(mu, prior[0]),
             "prior_sigma": np.full_like(mu, prior[1])}  # fmt: skip
    return {f"{module}.bh_parts.default.{matrix}.{name}": value for name, value in parts.items()}


def test_where_the_posterior_is_narrow(tmp_path):
    layer = "base_model.model.bert.encoder.layer.{}"
    query, block = layer.format(1) + ".attention.self.query", layer.format(0) + ".intermediate.dense"
    mu = RNG.normal(size=(2, 6))
    weights = {
        **gaussian(query, "down", mu, np.full((2, 6), 0.2)),
        f"{query}.bh_parts.default.up.weight": RNG.normal(size=(5, 2)),
        **gaussian(block, "down", np.zeros((3, 6)), np.full((3, 6), 0.1)),
        f"{block}.bh_parts.default.up.weight": np.zeros((6, 3)),
        f"{block}.bh_parts.default.up.bias": np.zeros(6),
        **gaussian("base_model._source", "down", np.ones((2, 6)), np.full((2, 6), 0.5)),
        **gaussian("base_model.model.bert.bh_source", "down", np.ones((2, 6)), np.full((2, 6), 0.5)),
    }
    found = adapter(tmp_path, weights, peft_type="BH_PEFT", lora_alpha=8, lora_rank=2)
    prefix, parallel, lora = found.posteriors()
    assert [(p.layer, p.site) for p in (prefix, parallel, lora)] == [(None, "prefix"), (0, "adapter"), (1, "lora")]
    assert (prefix.snr, prefix.sure, prefix.weights) == (pytest.approx(2), 1, 12)
    assert (parallel.snr, parallel.sure, parallel.kl) == (0, 0, pytest.approx(0, abs=1e-4))  # it is the prior
    assert lora.snr == pytest.approx(np.median(np.abs(mu)) / 0.2, rel=1e-5)
    assert lora.sure == pytest.approx((np.abs(mu) > 1.96 * 0.2).mean())
    entries = math.log(0.1 / 0.2) + (0.2**2 + mu**2) / (2 * 0.1**2) - 0.5
    assert lora.kl == pytest.approx(entries.sum(), rel=1e-5)
    (update,) = found.updates()  # the parallel adapter is no LoRA
    b = weights[f"{query}.bh_parts.default.up.weight"]
    assert update.norm == pytest.approx(np.linalg.norm(4 * b @ mu), rel=1e-5)
    rows = list(interpret.by_layer(found.posteriors()))
    assert [row[:2] for row in rows] == [(None, "prefix"), (0, "adapter"), (1, "lora")]


def test_bfloat16_and_parts_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as save_torch

    tensors = {"model.embed_tokens.weight": torch.randn(6, 4).bfloat16(), "lm_head.weight": torch.randn(6, 4).half()}
    save_torch(tensors, tmp_path / "model.safetensors")
    for name, tensor in tensors.items():
        assert np.array_equal(TensorFolder(tmp_path)[name], tensor.float().numpy())
    parts = {name: f"model-0000{i}-of-00002.safetensors" for i, name in enumerate(tensors, 1)}
    (tmp_path / "parts").mkdir()
    for name, part in parts.items():
        save_torch({name: tensors[name]}, tmp_path / "parts" / part)
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": parts}))
    folder = TensorFolder(tmp_path / "parts")
    assert set(folder.names) == set(tensors)
    expected = tensors["model.embed_tokens.weight"].float().numpy()
    assert np.array_equal(interpret.input_embeddings(folder, 4), expected)
    with pytest.raises(InputError, match="no input embeddings of width 5"):
        interpret.input_embeddings(folder, 5)


def test_broken_files_are_one_line(tmp_path):
    with pytest.raises(InputError, match="holds no adapter_config.json"):
        interpret.Adapter(tmp_path)
    adapter(tmp_path, {"x": np.ones((100, 10))}, peft_type="IA3")
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    for cut in (0, 4, 30, len(data) - 1):
        (tmp_path / "adapter_model.safetensors").write_bytes(data[:cut])
        with pytest.raises(InputError, match="no whole safetensors file"):
            TensorFile(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    done = run(tmp_path)
    assert done.returncode == 2 and "has no prompt, LoRA or Gaussian weights" in done.stderr


def test_the_script_names_tokens_of_a_prompt_on_a_real_base(tiny_model, tmp_path):
    """Virtual tokens set to three times the embeddings of known tokens: those tokens, at a cosine of 1."""
    from transformers import AutoTokenizer

    embeddings = interpret.input_embeddings(TensorFolder(tiny_model), 64)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = [130, 17, 88]
    weights = {"prompt_embeddings": 3 * embeddings[ids]}
    adapter(tmp_path / "mine", weights, peft_type="PROMPT_TUNING", base_model_name_or_path=str(tiny_model))
    done = run(tmp_path / "mine", "--results_dir", tmp_path / "results", "--top", 2)
    assert done.returncode == 0, done.stderr
    for line, i in zip(done.stdout.splitlines(), ids, strict=False):
        assert f"near: {tokenizer.decode([i])!r} 1.000" in line
    out = tmp_path / "results" / "plots" / "mine"
    assert (out / "interpret.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((out / "interpret.csv").open(newline="", encoding="utf-8")))
    assert len(rows) == 6 and float(rows[0]["value"]) == pytest.approx(1, abs=1e-5)


def test_an_adapter_that_peft_has_written(tiny_model, tmp_path):
    torch = pytest.importorskip("torch")
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=10, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    layers = {f"{n}": m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    expected = [m.get_delta_weight("default").norm().item() for m in layers.values()]
    assert [u.norm for u in interpret.Adapter(tmp_path).updates()] == pytest.approx(expected, rel=1e-4)
