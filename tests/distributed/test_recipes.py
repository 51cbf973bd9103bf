"""Each source project's recipe, --smoke, on a small model of its architecture: one process, and two ranks of ZeRO-3."""

from __future__ import annotations

import csv
import json
import sys

import pytest
import torch
from conftest import ROOT, run_command, statement_rows
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from bhpeft.config import parse_arguments
from bhpeft.results import read_metrics, read_model_outputs, read_predictions

from .conftest import SHIPPED, launcher

# recipe -> (architecture, folder of data, metric it must report)
SOURCE_PROJECTS = {
    "bh_peft_roberta_sst2": ("roberta", "sst2", "f1_weighted"),
    "bh_peft_roberta_ag_news": ("roberta", "ag_news", "f1_macro"),
    "bh_peft_roberta_imdb": ("roberta", "imdb", "precision_weighted"),
    "bh_peft_roberta_csqa": ("roberta", "csqa", "accuracy"),
    "bh_peft_roberta_drug_reviews": ("roberta", "drug_reviews", "rmse_standardised"),
    "prompt_llama2_generics": ("llama", "generics", "first_word_baseline"),
    "qlora_pythia_amazon": ("gpt_neox", "amazon", "irregular"),
    "hybrid_gpt2_oasst1": ("gpt2", "oasst1", "bleu"),
    "qlora_llama2_sst2": ("llama", "sst2", "irregular"),
}


@pytest.fixture(scope="session")
def small_models(tiny_model, tiny_encoder, tmp_path_factory):
    """Architecture -> folder of a small model."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    ids = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    shape |= {"max_position_embeddings": 640, **ids}
    models = {
        "gpt2": GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=640, **ids)),
        "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**shape)),
        "llama": LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, pad_token_id=2, **shape)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {"roberta": tiny_encoder, **{name: folder / name for name in models}}


@pytest.fixture(scope="session")
def layouts(tmp_path_factory):
    """Folder of folders: statements of the toy world in the layout of each dataset."""
    root = tmp_path_factory.mktemp("layouts")
    rows = [(q, answer.startswith("True"), answer) for q, answer in statement_rows()]
    parts = {"train": [row for i, row in enumerate(rows) if i % 3], "test": rows[::3]}
    for name in ("sst2", "ag_news", "csqa", "drug_reviews", "generics", "amazon", "oasst1"):
        (root / name).mkdir()
    for part, some in parts.items():
        dev = "dev" if part == "test" else part
        lines = ["sentence\tlabel", *(f"{q}\t{int(yes)}" for q, yes, _ in some)]
        (root / f"sst2/{dev}.tsv").write_text("\n".join(lines) + "\n")
        for name, classes in (("ag_news", 4), ("amazon", 2)):
            with open(root / f"{name}/{part}.csv", "w", newline="") as file:
                made = [(i % classes + 1, q, answer) for i, (q, _, answer) in enumerate(some)]
                csv.writer(file, quoting=csv.QUOTE_ALL).writerows(made)
        for i, (q, yes, answer) in enumerate(some):
            folder = root / "imdb" / part / ("pos" if yes else "neg")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}_{8 if yes else 2}.txt").write_text(f"{q} {answer}<br />")
        choices = [{"label": letter, "text": f"choice {letter}"} for letter in "ABCDE"]
        questions = [
            {"id": f"{part}{i}", "answerKey": "ABCDE"[i % 5], "question": {"stem": q, "choices": choices}}
            for i, (q, _, _) in enumerate(some)
        ]
        text = "\n".join(json.dumps(question) for question in questions)
        (root / f"csqa/{dev}_rand_split.jsonl").write_text(text + "\n")
        with open(root / f"drug_reviews/drugsCom{part.title()}_raw.tsv", "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["", "drugName", "condition", "review", "rating", "date", "usefulCount"])
            writer.writerows((i, "x", "y", q, i % 10 + 1, "", 0) for i, (q, _, _) in enumerate(some))
    for name in ("negative", "positive"):
        lines = ["generic,exemplar", *(f"Kind{i}s fly.,Kind{i}s at home fly." for i in range(240))]
        (root / f"generics/{name}.csv").write_text("\n".join(lines) + "\n")
    with open(root / "oasst1/messages.jsonl", "w") as file:
        for i, (q, _, answer) in enumerate(rows):
            message = {"lang": "en", "deleted": False, "synthetic": False, "message_tree_id": f"p{i}"}
            prompt = {"message_id": f"p{i}", "parent_id": None, "text": q, "role": "prompter"}
            reply = {"message_id": f"a{i}", "parent_id": f"p{i}", "text": f"Well: {answer}", "role": "assistant"}
            file.write(json.dumps(message | prompt) + "\n" + json.dumps(message | reply) + "\n")
    return root


def test_every_recipe_of_a_source_project_is_tried_here():
    found = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert set(SOURCE_PROJECTS) <= found
    small = {name for name in found if name.startswith("demo_")} | {
        "generics_stories260k",
        "bh_peft_minilm_sst2",
        "lora_minilm_sst2",
        "hybrid_stories260k_oasst1",
    }
    assert found - set(SOURCE_PROJECTS) <= small  # tried in test_demo.py and real_data/


@pytest.mark.parametrize("recipe", sorted(SOURCE_PROJECTS))
def test_a_recipe_begins_with_its_command_and_reads(recipe):
    file = ROOT / f"recipes/{recipe}.yaml"
    head = file.read_text().split("\n\n")[0]
    assert head.startswith("# accelerate launch --config_file ds_zero3_cpu.yaml") and f"{recipe}.yaml" in head
    parse_arguments(["--config", str(file), "--data_path", "somewhere"])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recipe", sorted(SOURCE_PROJECTS))
def test_a_recipe_runs_small(recipe, ranks, small_models, layouts, tmp_path):
    kind, data, metric = SOURCE_PROJECTS[recipe]
    launch = [sys.executable] if ranks == 1 else launcher(SHIPPED, 2)
    words = [*launch, ROOT / "parameter_efficient_fine_tuning.py", "--config", ROOT / f"recipes/{recipe}.yaml"]
    words += ["--smoke", "--base_model", small_models[kind], "--data_path", layouts / data, "--run_name", "smoke"]
    finished = run_command(words, cwd=tmp_path, timeout=300)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    results = tmp_path / "results"
    record = read_metrics(results / "metrics/smoke.json")
    assert record["hardware"]["ranks"] == ranks and metric in record["metrics"]
    assert record["metrics"]["rows"] == len(read_predictions(results / "predictions/smoke.csv"))
    assert len(read_model_outputs(results / "model_outputs/smoke.txt")) == record["metrics"]["rows"] <= 16
    assert (tmp_path / "adapters/smoke/adapter_model.safetensors").stat().st_size > 1000
    assert (tmp_path / "adapters/smoke/task.json").is_file()
