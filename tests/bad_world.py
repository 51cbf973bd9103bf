"""A folder of files as people get them wrong: data, recipes, adapters, results; see test_bad_input.py."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

HEAD = "text_input,text_label\n"
ROWS = "".join(f"Do {kind} {act}?,{'yes' if len(kind) % 2 else 'no'}\n"
               for kind in ("cats", "robins", "trout", "ants", "frogs", "oaks")
               for act in ("swim in lakes", "fly", "sleep", "eat grass"))  # fmt: skip
GOOD_ANSWERS = "<QUERY>\t\t\t q\n<MODEL OUTPUT>\t\t o\n<EXPECTED OUTPUT>\t e\n\n"
PREDICTED = "id,label,prediction,prob_a,prob_b\n"
SCORED = "index,query,model output,factual,justifies\n"

DATA: dict[str, str | bytes] = {
    "rows.csv": HEAD + ROWS,
    "empty.csv": "",
    "spaces.csv": "\n  \n",
    "header.csv": HEAD,
    "columns.csv": "sentence,label\na,yes\n",
    "twice.csv": "text_input,text_label,text_label\na,b,c\n",
    "ragged.csv": HEAD + ROWS + "Do cats swim, or fly?,no\n",
    "unclosed.csv": HEAD + 'a,yes\n"b,no\n',
    "latin1.csv": (HEAD + ROWS + "caf\xe9,yes\n").encode("latin-1"),
    "utf16.csv": (HEAD + ROWS).encode("utf-16"),
    "nul.csv": HEAD + "a\x00b,yes\nc,no\n",
    "semicolon.csv": (HEAD + ROWS).replace(",", ";"),
    "commas.tsv": HEAD + ROWS,
    "blank.csv": HEAD + "a,yes\n  ,no\n",
    "unlabelled.csv": HEAD + "a,yes\nb,\n",
    "one_class.csv": HEAD + ROWS.replace(",yes", ",no"),
    "one_row.csv": HEAD + "a,yes\n",
    "same_input.csv": HEAD + "a,yes\n" * 20,
    "typo.csv": HEAD + ROWS + "Do owls hoot?,yess\n",
    "glue_test.csv": HEAD + ROWS.replace(",yes", ",-1").replace(",no", ",-1"),
    "rating_nan.csv": HEAD + "".join(f"text {i},{i / 7}\n" for i in range(20)) + "text,nan\n",
    "rating_inf.csv": HEAD + "".join(f"text {i},{i / 7}\n" for i in range(20)) + "text,inf\n",
    "rating_word.csv": HEAD + "".join(f"text {i},{i / 7}\n" for i in range(20)) + "text,good\n",
    "other_labels.csv": HEAD + "x,maybe\n",
    "long.csv": HEAD + ROWS + "word " * 300 + ",yes\n",
    "rows.xlsx": b"PK\x03\x04",
    "rows": HEAD + ROWS,
    "data/rows.txt": HEAD + ROWS,
    "tabs.tsv": HEAD.replace(",", "\t") + '"a\tb"\tyes\n',
    "broken.jsonl": '{"text_input": "a", "text_label": "yes"}\n{"text_input": "b", \n',
    "list.jsonl": '["a", "yes"]\n',
    "key.jsonl": '{"text_input": "a", "text_label": "yes"}\n{"text": "b", "text_label": "no"}\n',
    "null.jsonl": '{"text_input": "a", "text_label": "yes"}\n{"text_input": null, "text_label": "no"}\n',
    "nested.jsonl": '{"text_input": {"en": "a"}, "text_label": "yes"}\n',
    "mixed.jsonl": '{"text_input": "a", "text_label": "yes"}\n{"text_input": "b", "text_label": 1}\n',
    "surrogate.jsonl": '{"text_input": "a\\ud83d", "text_label": "yes"}\n{"text_input": "b", "text_label": "no"}\n',
    "deep.jsonl": "[" * 100_000 + "\n",
    "array.jsonl": '[{"text_input": "a", "text_label": "yes"}]\n',
    "garbage.parquet": b"\x00\x01 no parquet",
    "sst2/train.tsv": "sentence\tlabel\na fine film\t1\n",
    "sst2_label/train.tsv": "sentence\tlabel\na fine film\t7\n",
    "sst2_label/dev.tsv": "sentence\tlabel\na fine film\t1\n",
    "generics/negative.csv": "generic,exemplar\n",
    "pickle.parquet": pickle.dumps({"a": 1}),
}
RECIPES: dict[str, str | bytes] = {
    "empty.yaml": "",
    "list.yaml": "- lora_rank\n- 8\n",
    "syntax.yaml": "lora_rank: [8\nlr: 1e-3\n",
    "tab.yaml": "lora_rank:\n\t8\n",
    "key.yaml": "lora_rnk: 8\n",
    "value.yaml": "lora_rank: big\n",
    "text.yaml": "just words\n",
    "nested.yaml": "adapter:\n  lora_rank: 8\n",
    "twice.yaml": "lora_rank: 8\nlora_rank: 16\n",
    "truth.yaml": "labels: [yes, no]\n",
    "lists.yaml": "target_modules: [[q_proj], [v_proj]]\n",
    "binary.yaml": b"\xff\xfe\x00\x01",
    "python.yaml": "run_name: !!python/object/apply:os.system ['touch pwned']\n",
    "number.yaml": "8: lora_rank\n",
    "date.yaml": "seed: 2024-01-01\n",
    "escape.yaml": "run_name: ../../outside\n",
}
ANSWERS: dict[str, str | bytes] = {
    "results/model_outputs/old.txt": GOOD_ANSWERS,
    "results/human_evaluation/old.csv": SCORED + "0,q,o,1,0\n",
    "results/predictions/old.csv": PREDICTED + "0,a,a,0.75,0.25\n1,b,a,0.5,0.5\n",
    "results/metrics/old.json": "{}",
    "results/model_descriptions": "mine\n",
    "bad/no_tag.txt": "hello\n",
    "bad/order.txt": "<QUERY>\t\t\t q\n<QUERY>\t\t\t r\n",
    "bad/short.txt": "<QUERY>\t\t\t q\n<MODEL OUTPUT>\t\t o\n",
    "bad/latin1.txt": GOOD_ANSWERS.encode() + b"\xe9",
    "bad/empty.txt": "",
    "bad/score.csv": SCORED + "0,q,o,1,0\n1,q,o,5,0\n",
    "bad/columns.csv": "index,query,answer,factual,justifies\n",
    "bad/unquoted.csv": "0,All a b.,False, c.,yes,no,\n",
    "bad/digits.csv": SCORED + f"{'9' * 5000},q,o,1,0\n",
    "bad/binary.csv": bytes(range(256)),
    "bad/sum.csv": PREDICTED + "0,a,a,0.75,0.75\n",
    "bad/word.csv": PREDICTED + "0,a,a,0.75,most\n",
    "bad/label.csv": PREDICTED + "0,c,a,0.75,0.25\n",
    "bad/nolabel.csv": PREDICTED + "0,,a,0.75,0.25\n",
    "bad/norows.csv": PREDICTED,
    "bad/plain.csv": "id,label\n0,a\n",
    "bad/ids.csv": PREDICTED + "7,a,a,0.75,0.25\n8,b,a,0.5,0.5\n",
    "bad/cut.json": '{"schema_version": 1, "run_name": ',
    "bad/schema.json": '{"schema_version": 9}',
    "bad/lacks.json": '{"schema_version": 1, "run_name": "x"}',
    "bad/list.json": "[1, 2]",
    "bad/deep.json": "[" * 100_000,
    "bad/types.json": json.dumps({"schema_version": 1, "created": "now", "run_name": "x", "metrics": 3, "config": [],
        "seed": None, "versions": 1, "hardware": 2, "timings": 3, "parameters": 4}),  # fmt: skip
}  # fmt: skip

CARD = {
    "task_type": "classification", "labels": ["no", "yes"], "head": False, "prompt_template": "{text_input}",
    "instruction": None, "max_length": 64, "predict_by": "score",
}  # fmt: skip
LORA = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": 4, "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"], "inference_mode": True, "bias": "none", "lora_dropout": 0.0,
}  # fmt: skip


def lora_weights(width: int = 64, rank: int = 4) -> dict[str, np.ndarray]:
    """Weights of a LoRA on the query projections and values of the tiny LLaMA."""
    found = {}
    for layer in range(2):
        for name, out in (("q_proj", width), ("v_proj", width // 2)):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            found[f"{stem}.lora_A.weight"] = np.zeros((rank, width), dtype=np.float32)
            found[f"{stem}.lora_B.weight"] = np.zeros((out, rank), dtype=np.float32)
    return found


def write_adapter(folder: Path, config: dict | None = None, card: dict | None = None, weights: dict | None = None):
    """An adapter's folder: a good LoRA on `base`, but for what is given."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **(config or {})}))
    (folder / "task.json").write_text(json.dumps({**CARD, **(card or {})}))
    save_file(lora_weights() if weights is None else weights, folder / "adapter_model.safetensors")


def make_world(folder: Path, tiny_model: Path, tiny_encoder: Path) -> None:
    """Write everything into a folder. `base` and `encoder` have no weights: a run that gets to them fails otherwise."""
    for name, content in (DATA | RECIPES | ANSWERS).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for source, name in ((tiny_model, "base"), (tiny_encoder, "encoder")):
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(tiny_model, folder / "whole/base")
    texts = {"text_input": ["a", "b"], "text_label": ["yes", None]}
    pd.DataFrame(texts).to_parquet(folder / "gap.parquet")
    pd.DataFrame({"text_input": [["a"], ["b"]], "text_label": ["yes", "no"]}).to_parquet(folder / "lists.parquet")
    for name in ("folder.csv", "folder.yaml", "nothing", "results/rounds", "results/plots", "fullfolder"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "fullfolder/notes").write_text("mine")
    shutil.copytree(folder / "whole/base", folder / "torn_base")
    weights = folder / "torn_base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    shutil.copytree(folder / "base", folder / "pickled_base")
    (folder / "pickled_base/pytorch_model.bin").write_bytes(pickle.dumps(_Bomb()))
    (folder / "base_broken").mkdir()
    (folder / "base_broken/config.json").write_text("{")
    (folder / "base_type").mkdir()
    (folder / "base_type/config.json").write_text('{"model_type": "nosuch"}')
    shutil.copytree(folder / "base", folder / "base_tokenizer_code")
    names = {"auto_map": {"AutoTokenizer": ["mine.Tokenizer", None]}, "tokenizer_class": "Tokenizer"}
    (folder / "base_tokenizer_code/tokenizer_config.json").write_text(json.dumps(names))
    (folder / "base_tokenizer_code/mine.py").write_text("open('pwned', 'w')\n")
    (folder / "base_code").mkdir()
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}
    (folder / "base_code/config.json").write_text(json.dumps(config))
    (folder / "base_code/mine.py").write_text("open('pwned', 'w')\n")
    _adapters(folder / "adapters")


def _adapters(at: Path) -> None:
    write_adapter(at / "good")
    write_adapter(at / "no_config")
    (at / "no_config/adapter_config.json").unlink()
    write_adapter(at / "no_weights")
    (at / "no_weights/adapter_model.safetensors").unlink()
    write_adapter(at / "pickled")
    (at / "pickled/adapter_model.safetensors").unlink()
    (at / "pickled/adapter_model.bin").write_bytes(pickle.dumps(_Bomb()))
    write_adapter(at / "torn")
    file = at / "torn/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    write_adapter(at / "hollow")
    (at / "hollow/adapter_model.safetensors").write_bytes(b"")
    write_adapter(at / "disguised")  # a pickle under the name of the other format
    (at / "disguised/adapter_model.safetensors").write_bytes(pickle.dumps(_Bomb()))
    write_adapter(at / "cut_config")
    (at / "cut_config/adapter_config.json").write_text('{"peft_type": "LO')
    write_adapter(at / "list_config")
    (at / "list_config/adapter_config.json").write_text("[]")
    write_adapter(at / "cut_card")
    (at / "cut_card/task.json").write_text('{"task_type": ')
    write_adapter(at / "list_card")
    (at / "list_card/task.json").write_text("[]")
    write_adapter(at / "no_card")
    (at / "no_card/task.json").unlink()
    write_adapter(at / "foreign", {"peft_type": "MAGIC"})
    write_adapter(at / "rank_text", {"r": "eight"})
    write_adapter(at / "asks_code", {"tokenizer_kwargs": {"trust_remote_code": True}})
    write_adapter(at / "no_base", {"base_model_name_or_path": None})
    write_adapter(at / "other_base", {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"})
    write_adapter(at / "escape", {"base_model_name_or_path": "../../../etc/passwd"})
    write_adapter(at / "base_list", {"base_model_name_or_path": ["base"]})
    write_adapter(at / "narrow", {"base_model_name_or_path": "whole/base"}, weights=lora_weights(width=32))
    write_adapter(at / "generates", card={"task_type": "generation", "labels": []})
    write_adapter(at / "card_key", card={"labells": ["a"]})
    write_adapter(at / "card_labels", card={"labels": "yes"})
    write_adapter(at / "card_length", card={"max_length": "long"})
    write_adapter(at / "card_task", card={"task_type": "poetry"})
    write_adapter(at / "card_template", card={"prompt_template": "no place"})
    three = {"base_model.model.score.weight": np.zeros((3, 64), dtype=np.float32)}
    head = {"task_type": "SEQ_CLS", "modules_to_save": ["score"], "base_model_name_or_path": "whole/base"}
    write_adapter(at / "head", head, {"head": True}, lora_weights() | three)


class _Bomb:
    """What unpickling would give away: a file called pwned."""

    def __reduce__(self):
        return open, ("pwned", "w")
