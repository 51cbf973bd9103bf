"""Exported and merged adapters answer as the originals do, where bhpeft cannot be imported."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from conftest import ROOT, run_command
from peft import IA3Config, LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_bh_peft import ENCODERS, EVERY, adapted, base_of, batch, config_of
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from bhpeft.adapters.attach import weight_shapes
from bhpeft.adapters.bh_peft import BAYESIAN
from bhpeft.adapters.export import export_lora, merge_adapter
from bhpeft.errors import InputError

STOCK_TARGETS = {
    "roberta": ["query", "value"],
    "bert": ["query", "value"],
    "distilbert": ["q_lin", "v_lin"],
    "gpt2": ["c_attn"],
    "gpt_neox": ["query_key_value"],
}

# What someone without the project runs: cases are {name: [base or merged folder, adapter or null, class]}.
STRANGER = """
import json, sys, warnings
sys.modules["bhpeft"] = None
warnings.simplefilter("error", UserWarning)  # as of weights that peft misses, or Conv1D that it was not told of
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
logits = {}
for name, (folder, adapter, auto_class) in json.load(open(sys.argv[1])).items():
    model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    elif any(info.values()):
        sys.exit(f"{name}: {info}")
    with torch.no_grad():
        logits[name] = model.eval()(**load_file(sys.argv[2])).logits.contiguous()
save_file(logits, sys.argv[3])
"""


def task_of(kind):
    return "SEQ_CLS" if kind in ENCODERS else "CAUSAL_LM"


def auto_class_of(kind):
    return "AutoModelForSequenceClassification" if kind in ENCODERS else "AutoModelForCausalLM"


def logits_of(model, inputs=None):
    with torch.no_grad():
        return model.eval()(**(inputs or batch())).logits


def logits_elsewhere(folder, cases):
    """Logits of all cases, computed in one process that cannot import bhpeft."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases, default=str))
    save_file(batch(), folder / "inputs.safetensors")
    files = [folder / name for name in ("cases.json", "inputs.safetensors", "logits.safetensors")]
    finished = run_command([sys.executable, "-c", STRANGER, *files], cwd=folder, PYTHONPATH="")
    assert finished.returncode == 0, finished.stderr[-3000:]
    return load_file(files[-1])


def saved_base(folder, kind, **settings):
    """A tiny base that was saved and knows its folder; an encoder without its head, as it comes from the hub."""
    base = base_of(kind, **settings)
    (base.base_model if kind in ENCODERS else base).save_pretrained(folder)
    base.name_or_path = base.config._name_or_path = str(folder)
    return base


def stock_adapted(base, **settings):
    """A stock LoRA adapter none of whose weights is where it started."""
    kind = base.config.model_type
    settings = {"target_modules": STOCK_TARGETS.get(kind, ["q_proj", "v_proj"]), "lora_alpha": 6, "r": 4, **settings}
    settings = {"task_type": task_of(kind), "fan_in_fan_out": kind == "gpt2", **settings}
    torch.manual_seed(3)
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**settings)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def saved_lora(folder, kind="llama", **settings):
    """(base, adapter folder) of a BH-PEFT adapter on a base beside it."""
    base = saved_base(folder / "base", kind)
    adapted(base, **{"sites": ["lora"], "task_type": task_of(kind), **settings}).save_pretrained(folder / "adapter")
    return base, folder / "adapter"


# -------------------------------------------------------------------------------------- stock peft, by itself


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """{(kind, bayesian): (largest difference of logits, exported folder, effect of the adapter)}."""
    folder = tmp_path_factory.mktemp("exported")
    expected, cases, effect = {}, {}, {}
    for kind in EVERY:
        base = saved_base(folder / kind, kind)
        for bayesian in BAYESIAN:
            name = f"{kind}-{bayesian}"
            model = adapted(base, sites=["lora"], bayesian=bayesian, task_type=task_of(kind), lora_alpha=6.0)
            model.save_pretrained(folder / f"{name}-bh")
            expected[name] = logits_of(model)
            effect[name] = (expected[name] - logits_of(base)).abs().max().item()
            export_lora(folder / f"{name}-bh", folder / name)
            cases[name] = [folder / kind, folder / name, auto_class_of(kind)]
    found = logits_elsewhere(folder / "run", cases)
    return {n: ((found[n] - expected[n]).abs().max().item(), folder / n, effect[n]) for n in cases}


@pytest.mark.parametrize("bayesian", BAYESIAN)
@pytest.mark.parametrize("kind", EVERY)
def test_the_export_answers_as_the_posterior_mean_does_in_stock_peft(exported, kind, bayesian):
    difference, folder, effect = exported[f"{kind}-{bayesian}"]
    assert difference <= 1e-6 and effect > 0.01
    stock = stock_adapted(base_of(kind))
    stock.save_pretrained(folder.parent / f"{kind}-stock")
    assert weight_shapes(folder) == weight_shapes(folder.parent / f"{kind}-stock")  # heads included
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["fan_in_fan_out"], config["task_type"]) == (kind == "gpt2", task_of(kind))
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_twenty_targets_and_more_stay_what_they_are(tmp_path):
    """From 20 names on peft shortens them by itself: that must hit no other module."""
    config = config_of("llama").to_dict() | {"num_hidden_layers": 12, "layer_types": None}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if v is not None}))
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, sites=["lora"], task_type="CAUSAL_LM")
    model.save_pretrained(tmp_path / "adapter")
    modules = export_lora(tmp_path / "adapter", tmp_path / "out")
    assert len(modules) == 24 and modules[-1] == "model.layers.11.self_attn.v_proj"
    found = logits_elsewhere(tmp_path / "x", {"it": [tmp_path / "base", tmp_path / "out", "AutoModelForCausalLM"]})
    assert (found["it"] - logits_of(model)).abs().max() <= 1e-5


def test_the_settings_of_the_adapter_travel(tmp_path):
    _, adapter = saved_lora(tmp_path, lora_dropout=0.25, lora_alpha=2.5)
    export_lora(adapter, tmp_path / "out")
    config = LoraConfig.from_pretrained(tmp_path / "out")
    assert (config.lora_dropout, config.lora_alpha, config.r) == (0.25, 2.5, 4)
    assert config.base_model_name_or_path == str(tmp_path / "base")


# -------------------------------------------------------------------------------------------------- merging


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """{name: largest difference of logits} of merged models, stock and Bayesian LoRA on every architecture."""
    folder = tmp_path_factory.mktemp("merged")
    expected, cases = {}, {}
    for kind in EVERY:
        base = saved_base(folder / kind, kind)
        bayesian = adapted(base, sites=["lora"], bayesian="all", task_type=task_of(kind))
        for name, model in ((f"{kind}-stock", stock_adapted(base)), (f"{kind}-bayesian", bayesian)):
            model.save_pretrained(folder / f"{name}-adapter")
            expected[name] = logits_of(model)
            merge_adapter(folder / f"{name}-adapter", folder / name)
            cases[name] = [folder / name, None, auto_class_of(kind)]
    found = logits_elsewhere(folder / "run", cases)
    return {name: (found[name] - expected[name]).abs().max().item() for name in cases}


@pytest.mark.parametrize("adapter", ["stock", "bayesian"])
@pytest.mark.parametrize("kind", EVERY)
def test_the_merged_model_answers_as_base_and_adapter_do(merged, kind, adapter):
    assert merged[f"{kind}-{adapter}"] <= 1e-5


def test_the_tokenizer_comes_along_and_the_base_may_have_moved(tiny_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = stock_adapted(base)
    model.peft_config["default"].base_model_name_or_path = "/gone/away"
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match="--base_model /gone/away: no such folder, nor on the hub"):
        merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists() and [path.name for path in tmp_path.iterdir()] == ["adapter"]
    notes = merge_adapter(tmp_path / "adapter", tmp_path / "out", base_model=str(tiny_model))
    assert "unquantised weights of" in notes[0] and "QLoRA" in notes[0] and "trained on /gone/away" in notes[1]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("Do cats sleep?", return_tensors="pt")["input_ids"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.tie_word_embeddings
    assert torch.allclose(again(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_a_trained_half_of_tied_embeddings_is_kept(tiny_model, tmp_path, layer):
    model = stock_adapted(AutoModelForCausalLM.from_pretrained(tiny_model), modules_to_save=[layer])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits_of(again) - logits_of(model)).abs().max() <= 1e-4  # the logits are some hundreds


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_when_asked_for(tmp_path, dtype):
    base = saved_base(tmp_path / "base", "llama")
    model = stock_adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "out", dtype=dtype)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {getattr(torch, dtype)}
    name = "model.layers.0.self_attn.q_proj"
    exact = model.merge_and_unload().get_submodule(name).weight
    step = torch.finfo(getattr(torch, dtype)).eps
    assert ((weights[f"{name}.weight"].float() - exact).abs() <= step * (exact.abs() + 0.1)).all()
    with pytest.raises(InputError, match="--dtype int8: must be one of float32"):
        merge_adapter(tmp_path / "adapter", tmp_path / "no", dtype="int8")


def test_a_head_of_another_size_replaces_the_bases(tmp_path):
    """The base is a classifier of two labels already; the adapter was trained on three."""
    base_of("roberta").save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    )
    model = stock_adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "out")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.num_labels == 3 and (logits_of(again) - logits_of(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_decoder_that_classifies(kind, tmp_path, tiny_model):
    base = base_of(kind, head=AutoModelForSequenceClassification)
    base.config.pad_token_id = None
    base.base_model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = adapted(base, sites=["lora"], task_type="SEQ_CLS")
    model.save_pretrained(tmp_path / "adapter")
    assert not merge_adapter(tmp_path / "adapter", tmp_path / "out")[1:]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.pad_token_id == 2  # the tokenizer's; without it a batch would be refused
    model.config.pad_token_id = 2
    assert (logits_of(again) - logits_of(model)).abs().max() <= 3e-5  # merged weights round otherwise


def test_a_head_that_only_peft_noted_the_class_of(tmp_path):
    base = base_of("roberta", head=AutoModelForMultipleChoice)
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = adapted(base, sites=["lora"], modules_to_save=["classifier"])
    model.save_pretrained(tmp_path / "adapter")
    notes = merge_adapter(tmp_path / "adapter", tmp_path / "out")
    assert "holds no tokenizer" in notes[1]
    inputs = {name: value.view(2, 3, 10) for name, value in batch(6, 10).items()}
    again = AutoModelForMultipleChoice.from_pretrained(tmp_path / "out")
    assert (logits_of(again, inputs) - logits_of(model, inputs)).abs().max() <= 3e-5


def test_modules_that_the_base_lacks_travel_with_the_head(tmp_path):
    """A checkpoint of a masked language model has no pooler: it was trained and saved beside the head."""
    AutoModelForMaskedLM.from_config(config_of("bert")).save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=5)
    model = adapted(base, sites=["lora"], task_type="SEQ_CLS", modules_to_save=["classifier", "bert.pooler.dense"])
    model.save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "lora")
    for adapter in ("adapter", "lora"):
        merge_adapter(tmp_path / adapter, tmp_path / f"{adapter}-merged")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{adapter}-merged")
        assert again.config.num_labels == 5 and (logits_of(again) - logits_of(model)).abs().max() <= 1e-5


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("site", ["prefix", "adapter"])
def test_sites_beside_lora_are_refused_by_name(site, tmp_path):
    _, adapter = saved_lora(tmp_path, sites=["lora", site])
    reason = {"prefix": "keys and values to the attention", "adapter": "ReLU path"}[site]
    with pytest.raises(InputError, match=f"sites lora, {site} .*exported as LoRA.*{reason}.*no place for it"):
        export_lora(adapter, tmp_path / "out")
    with pytest.raises(InputError, match=f"sites lora, {site} .*merged.*{reason}.*no weight to merge it into"):
        merge_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_peft_types_are_refused(tmp_path):
    base = saved_base(tmp_path / "base", "llama")
    prompt = get_peft_model(copy.deepcopy(base), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    prompt.save_pretrained(tmp_path / "prompt")
    get_peft_model(copy.deepcopy(base), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    stock_adapted(base).save_pretrained(tmp_path / "stock")
    with pytest.raises(InputError, match="'PROMPT_TUNING' cannot be merged: it adds virtual tokens"):
        merge_adapter(tmp_path / "prompt", tmp_path / "out")
    with pytest.raises(InputError, match="'IA3' cannot be merged here; only LoRA"):
        merge_adapter(tmp_path / "ia3", tmp_path / "out")
    for name in ("prompt", "stock"):
        with pytest.raises(InputError, match="stock peft's own and needs no export"):
            export_lora(tmp_path / name, tmp_path / "out")
    _rewrite(tmp_path / "stock", peft_type="FOO")
    for convert in (export_lora, merge_adapter):
        with pytest.raises(InputError, match="'FOO' is no adapter"):
            convert(tmp_path / "stock", tmp_path / "out")
        with pytest.raises(InputError, match="no such folder"):
            convert(tmp_path / "nosuch", tmp_path / "out")


def _rewrite(adapter, **settings):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def test_a_folder_in_the_way_is_refused_and_stale_weights_go(tmp_path):
    _, adapter = saved_lora(tmp_path)
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    for name in ("notes.txt", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (out / name).write_text("old")
    for convert in (export_lora, merge_adapter):
        with pytest.raises(InputError, match="not empty; choose another one or pass --overwrite"):
            convert(adapter, out)
        with pytest.raises(InputError, match="is a file; choose a folder"):
            convert(adapter, out / "notes.txt")
        with pytest.raises(InputError, match="the folder that is read from"):
            convert(adapter, adapter, overwrite=True)
    with pytest.raises(InputError, match="the folder that is read from"):
        merge_adapter(adapter, tmp_path / "base", overwrite=True)
    export_lora(adapter, out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"notes.txt", "adapter_config.json", "adapter_model.safetensors"}
    merge_adapter(adapter, out, overwrite=True)  # an adapter left in a model's folder would be loaded with it
    assert not list(out.glob("adapter_*")) and (out / "model.safetensors").is_file() and (out / "notes.txt").is_file()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path):
    base, adapter = saved_lora(tmp_path)
    out = tmp_path / "out"
    for kind, words in (("qwen2", "no match for|shape"), ("gpt2", "cannot be merged into")):
        if kind == "qwen2":  # the same names, fewer layers
            config = config_of("llama")
            config.num_hidden_layers = 1
            AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / kind)
        else:
            saved_base(tmp_path / kind, kind)
        with pytest.raises(InputError, match=words):
            merge_adapter(adapter, out, base_model=str(tmp_path / kind))
    quantised = json.loads((tmp_path / "base" / "config.json").read_text())
    quantised["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "4bit").mkdir()
    (tmp_path / "4bit" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(InputError, match="4bit: stored quantised; give the model it was made of"):
        merge_adapter(adapter, out, base_model=str(tmp_path / "4bit"))
    with pytest.raises(InputError, match="holds no config.json. It is an adapter"):
        merge_adapter(adapter, out, base_model=str(adapter))
    _rewrite(adapter, task_type="SEQ_2_SEQ_LM")
    with pytest.raises(InputError, match="task_type 'SEQ_2_SEQ_LM' does not say which kind of model"):
        merge_adapter(adapter, out)
    _rewrite(adapter, task_type="SEQ_CLS")  # of a causal model's adapter: there is no head
    with pytest.raises(InputError, match="neither it nor the adapter holds score.weight"):
        merge_adapter(adapter, out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_broken_weights_are_refused(tmp_path):
    _, adapter = saved_lora(tmp_path)
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    half = {name: tensor for name, tensor in whole.items() if ".up." not in name or ".1." in name}
    unknown = whole | {next(iter(whole)).replace(".down.", ".sideways."): torch.zeros(1)}
    for weights, words in ((half, "lack LoRA matrices"), (unknown, r"sideways.*no LoRA weight")):
        save_file(weights, file)
        with pytest.raises(InputError, match=words):
            export_lora(adapter, tmp_path / "out")
    broken = {name: torch.full_like(t, float("nan")) if name.endswith("up.weight") else t for name, t in whole.items()}
    save_file(broken, file)
    with pytest.raises(InputError, match="cannot be merged into .*NaN"):
        merge_adapter(adapter, tmp_path / "out")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot be read.*cut short"):
        export_lora(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- the command


def script(*words, **environment):
    return run_command([sys.executable, ROOT / "util" / "export_adapter.py", *words], **environment)


def test_the_script_exports_and_merges(tmp_path):
    base, adapter = saved_lora(tmp_path)
    done = script(adapter, "--to", "lora", "out/lora", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "stock LoRA on 4 modules, at the posterior mean; the deviations stay with the original",
        "saved: out/lora",
    ]
    done = script("out/lora", "--to", "merged", "out/merged", "--dtype", "bfloat16", cwd=tmp_path, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    merged, tokenizer, end = done.stdout.splitlines()
    assert "in bfloat16" in merged and "no tokenizer" in tokenizer and end == "saved: out/merged"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nosuch", "--to", "lora", "out"], "nosuch: no such folder"),
        (["x", "--to", "lora", "out", "--dtype", "float16"], "--base_model and --dtype: only with --to merged"),
    ],
)
def test_the_script_refuses_in_one_line(words, message, tmp_path):
    done = script(*words, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and message in done.stderr
    assert "Traceback" in script(*words, "--debug", cwd=tmp_path).stderr


def test_the_script_loads_torch_only_to_work():
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'util')!r}); import export_adapter; print(*sys.modules)"
    done = run_command([sys.executable, "-c", code])
    assert done.returncode == 0 and not {"torch", "transformers", "peft", "numpy"} & set(done.stdout.split())
