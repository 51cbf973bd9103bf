"""Trainable counts of published runs, targets by architecture, adapter folders that do not fit."""

from __future__ import annotations

import json

import pytest
import torch
from peft import OFTConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, GPTNeoXConfig, LlamaConfig

from bhpeft.adapters import adopt_settings, attach_adapter, check_adapter, target_modules_for
from bhpeft.arguments import AdapterArguments
from bhpeft.base_model import check_4bit, load_base_model, parameter_counts
from bhpeft.errors import InputError
from bhpeft.prediction import generate


def on_meta(config):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model.requires_grad_(False)


def test_pythia_1b_trains_what_the_published_run_trained():
    """2,097,152 of 1,013,878,784 parameters, 0.2068 %: LoRA r=16 on query_key_value of pythia-1b-deduped."""
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=2048, num_hidden_layers=16, num_attention_heads=8, intermediate_size=8192
    )
    arguments = AdapterArguments(lora_rank=16, lora_alpha=32, target_modules=["query_key_value"])
    with torch.device("meta"):
        counts = parameter_counts(attach_adapter(on_meta(config), arguments, "pythia-1b"))
    assert (counts["trainable"], counts["all"]) == (2_097_152, 1_013_878_784)
    assert f"{counts['trainable_percent']:.4f}" == "0.2068"


def test_llama_2_13b_trains_what_its_shapes_say():
    """LoRA r=64 on q_proj and v_proj: 40 layers x 2 x 64 x (5120 + 5120)."""
    config = LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
    with torch.device("meta"):
        model = attach_adapter(on_meta(config), AdapterArguments(lora_rank=64), "llama-2-13b")
    counts = parameter_counts(model)
    assert counts["trainable"] == 40 * 2 * 64 * (5120 + 5120)
    assert counts["all"] - counts["trainable"] == 13_015_864_320  # the published size of LLaMA-2-13B


@pytest.mark.parametrize(
    ("kind", "targets"),
    [("llama", ["q_proj", "v_proj"]), ("gpt_neox", ["query_key_value"]), ("gpt2", ["c_attn"])],
)
def test_targets_by_architecture(kind, targets):
    assert target_modules_for(AutoConfig.for_model(kind)) == targets


def test_unknown_architecture_is_refused_and_target_modules_is_the_mend():
    config = AutoConfig.for_model("openai-gpt")
    config.model_type = "brand-new"
    with pytest.raises(InputError, match="'brand-new': no known LoRA targets.*--target_modules"):
        check_adapter(AdapterArguments(), config, "x")
    check_adapter(AdapterArguments(target_modules=["attn"]), config, "x")


def test_all_linear_is_every_linear_layer_but_the_head():
    config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    with torch.device("meta"):
        model = attach_adapter(on_meta(config), AdapterArguments(target_modules=["all-linear"]), "x")
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert found == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_prompt_tuning_starts_from_the_embeddings_of_its_text(tiny_model):
    from transformers import AutoTokenizer

    text = "Do cats sleep? True"
    base = load_base_model(str(tiny_model))
    ids = AutoTokenizer.from_pretrained(tiny_model)(text)["input_ids"]
    arguments = AdapterArguments(adapter_name="prompt-tuning", num_virtual_tokens=len(ids), prompt_init_text=text)
    model = attach_adapter(base, arguments, str(tiny_model))
    expected = base.get_input_embeddings().weight[ids]
    assert torch.equal(model.get_prompt(batch_size=1)[0], expected)
    assert parameter_counts(model)["trainable"] == len(ids) * 64


def test_only_the_adapter_trains_and_the_start_is_the_identity(tiny_model):
    ids = torch.arange(3, 13)[None]
    base = load_base_model(str(tiny_model))
    before = base(ids).logits
    model = attach_adapter(base, AdapterArguments(), str(tiny_model))
    assert torch.equal(model(ids).logits, before)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all("lora_" in name for name in trainable)


@pytest.fixture
def adapter_folder(tiny_model, tmp_path):
    model = attach_adapter(load_base_model(str(tiny_model)), AdapterArguments(), str(tiny_model))
    torch.nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model(torch.arange(3, 9)[None]).logits


def test_our_adapter_loads_in_stock_peft(tiny_model, adapter_folder):
    folder, logits = adapter_folder
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), folder)
    assert torch.allclose(stock(torch.arange(3, 9)[None]).logits, logits, atol=1e-6)
    ours = attach_adapter(load_base_model(str(tiny_model)), AdapterArguments(adapter_path=str(folder)), str(tiny_model))
    assert torch.allclose(ours(torch.arange(3, 9)[None]).logits, logits, atol=1e-6)
    assert parameter_counts(ours)["trainable"] > 0  # it can go on training


def test_adapter_of_another_base_is_refused(tiny_model, adapter_folder):
    folder, _ = adapter_folder
    config = AutoConfig.from_pretrained(tiny_model)
    arguments = AdapterArguments(adapter_path=str(folder))
    check_adapter(arguments, config, f"/somewhere/else/{tiny_model.name}")  # moved, same base
    with pytest.raises(InputError, match="trained on base model .*tiny-llama.*, not 'gpt2'"):
        check_adapter(arguments, config, "gpt2")


def test_broken_adapter_folders_are_named(tmp_path):
    config = AutoConfig.for_model("llama")
    for make, words in (
        (lambda d: None, "no such folder"),
        (lambda d: d.mkdir(), "no adapter_config.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "no adapter_model.safetensors"),
        (lambda d: (d / "adapter_model.safetensors").write_text(""), "not JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[1]"), "is no configuration"),
        (lambda d: (d / "adapter_config.json").write_text(json.dumps({"peft_type": "FOO"})), "'FOO' is no adapter"),
        (lambda d: (d / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"})), "not name its base"),
        (
            lambda d: (d / "adapter_config.json").write_text(
                json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"})
            ),
            "cannot be read.*cut short",
        ),
    ):
        make(tmp_path / "a")
        with pytest.raises(InputError, match=words):
            check_adapter(AdapterArguments(adapter_path=str(tmp_path / "a")), config, "x")


def test_records_say_what_the_adapter_really_is(tiny_model, adapter_folder):
    arguments = AdapterArguments(adapter_path=str(adapter_folder[0]), adapter_name="bh-peft", lora_rank=99)
    adopt_settings(arguments)
    assert (arguments.adapter_name, arguments.lora_rank, arguments.lora_alpha) == ("lora", 8, 16.0)


def test_target_modules_that_match_nothing_are_refused(tiny_model):
    with pytest.raises(InputError, match="nosuch"):
        attach_adapter(load_base_model(str(tiny_model)), AdapterArguments(target_modules=["nosuch"]), str(tiny_model))


def test_adapter_of_other_shapes_is_refused(tiny_model, adapter_folder, tmp_path):
    folder, _ = adapter_folder
    saved = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**saved, "r": 3}))
    with pytest.raises(InputError, match="does not fit.*size mismatch"):
        attach_adapter(load_base_model(str(tiny_model)), AdapterArguments(adapter_path=str(folder)), str(tiny_model))


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_of_a_base_of_another_depth_is_refused(layers, tiny_model, adapter_folder):
    """Of the same name and width; peft would load what has a place, and leave the rest out, or fresh."""
    config = AutoConfig.from_pretrained(tiny_model)
    assert config.num_hidden_layers == 2
    config.update({"num_hidden_layers": layers, "layer_types": None})
    other = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match=r"does not fit .*layers\.\d.*is only in one of the two"):
        attach_adapter(other, AdapterArguments(adapter_path=str(adapter_folder[0])), str(tiny_model))


def test_an_adapter_of_another_kind_with_buffers_that_are_not_saved_is_loaded(tiny_model, tmp_path):
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    stock = get_peft_model(base, OFTConfig(oft_block_size=16, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "oft_R" in name:
                parameter.normal_(std=0.1)
    stock.save_pretrained(tmp_path / "oft", save_embedding_layers=False)
    arguments = AdapterArguments(adapter_path=str(tmp_path / "oft"))
    ours = attach_adapter(load_base_model(str(tiny_model)), arguments, str(tiny_model)).eval()
    ids = torch.arange(3, 9)[None]
    assert torch.allclose(ours(ids).logits, stock(ids).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["embed_tokens", "input_layernorm", "self_attn", "lm_head"])
def test_modules_trained_within_a_half_precision_base_give_it_its_own_dtype(name, tiny_model):
    base = load_base_model(str(tiny_model), precision="bf16")
    arguments = AdapterArguments(target_modules=["gate_proj"])
    model = attach_adapter(base, arguments, str(tiny_model), train_too=[name]).eval()
    ids = torch.arange(3, 9)[None]
    config = GenerationConfig(max_new_tokens=3, eos_token_id=None, pad_token_id=2)
    assert generate(model, ids, torch.ones_like(ids), config).shape == (1, 3)
    expected = torch.float32 if name == "lm_head" else torch.bfloat16
    assert model(input_ids=ids).logits.dtype == expected


def test_4bit_really_quantises_and_counts_true_sizes(tiny_model):
    check_4bit()
    whole = load_base_model(str(tiny_model))
    packed = load_base_model(str(tiny_model), precision="bf16", in_4bit=True)
    assert parameter_counts(packed)["all"] == parameter_counts(whole)["all"]
    weight = packed.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.bfloat16 and weight.numel() * 4 == 64 * 64  # four 4-bit weights a stored number
    ids = torch.arange(3, 13)[None]
    a, b = whole(ids).logits, packed(ids).logits.float()
    assert not torch.allclose(a, b, atol=1e-4) and torch.nn.functional.cosine_similarity(a, b, dim=-1).min() > 0.9


def test_4bit_weights_keep_their_layout_in_evaluation(tiny_model):
    """bitsandbytes repacks weights in place on some CPUs, which ZeRO-3 cannot follow (see load_base_model)."""
    model = load_base_model(str(tiny_model), precision="bf16", in_4bit=True).eval()
    weight = model.model.layers[0].self_attn.q_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        first = model(torch.arange(3, 13)[None]).logits
    assert torch.equal(weight.view(torch.uint8), before.view(torch.uint8))
    model.train()
    assert torch.equal(model(torch.arange(3, 13)[None]).logits, first)
