"""What people type wrong, and what is wrong with the files they give: one line each, and nothing is touched.

Every case ends with exit code 2 and one line on stderr that names the thing and the mend, without a traceback, and
leaves every file where it was. The base models of most cases have no weights: a run that reached for them would end
with another message.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import time
from pathlib import Path

import pytest
from bad_world import make_world
from conftest import ROOT, TRAINER, run_command

from bhpeft.early import check_early, known_flags
from bhpeft.flags import FlagParser
from bhpeft.trainer_arguments import ARGUMENT_CLASSES

RUN = "--base_model base --dataset_name rows.csv --run_name new "
TEST = RUN + "--do_train false --adapter_path adapters/"
WHOLE = "--base_model whole/base --dataset_name rows.csv --run_name new "

# (script, flags, words that the message must have)
FLAGS = [
    ("--lora_rnk 4", "--lora_rnk", "Did you mean 'lora_rank'"),
    ("--lora_rank four", "--lora_rank", "'four'"),
    ("--lora_rank 8.5", "--lora_rank", "'8.5'"),
    ("--lora_rank 0", "--lora_rank 0", "above 0"),
    ("--lora_rank", "--lora_rank", "expected"),
    ("--lora_alpha inf", "--lora_alpha inf", "above 0"),
    ("--adapter_name lorra", "lorra", "Did you mean 'lora'"),
    ("--lr fast", "--lr", "'fast'"),
    ("--lr -1", "--learning_rate -1", "0 or more"),
    ("--epochs -1", "--num_train_epochs -1", "0 or more"),
    ("--epochs nan", "--num_train_epochs nan", "0 or more"),
    ("--max_steps 0", "--max_steps 0", "at least 1"),
    ("--max_steps -5", "--max_steps -5", "at least 1"),
    ("--weight_decay -0.1", "--weight_decay -0.1", "0 or more"),
    ("--max_grad_norm -1", "--max_grad_norm -1", "0 or more"),
    ("--warmup_steps -3", "warmup_steps"),
    ("--save_strategy steps --save_steps 0", "save_steps"),
    ("--logging_steps 0", "logging_steps"),
    ("--logging_steps -1", "logging_steps"),
    ("--lr_scheduler_type cosinee", "cosinee", "cosine"),
    ("--optim adamm", "--optim", "adamm"),
    ("--save_strategy sometimes", "sometimes", "epoch"),
    ("--load_best_model_at_end", "--load_best_model_at_end"),
    ("--bf16 --fp16", "--fp16 and --bf16", "choose one"),
    ("--do_train maybe", "--do_train", "maybe"),
    ("--seed -1", "--seed -1", "at least 0"),
    ("--seed 4294967296", "--seed 4294967296", "below 2**32"),
    ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps 0", "at least 1"),
    ("--batch_size -2", "--per_device_train_batch_size -2", "at least 1"),
    ("--deepspeed nowhere.json", "nowhere.json"),
    ("--fsdp full_shard", "--fsdp", "ZeRO-3"),
    ("--report_to wandb", "--report_to wandb", "not installed"),
    ("--push_to_hub", "--push_to_hub", "hf upload"),
    ("--hub_token hf_x", "--hub_token", "HF_TOKEN"),
    ("--token hf_x", "--token", "unknown flag"),
    ("--trust_remote_code", "--trust_remote_code", "unknown flag"),
    ("stray", "'stray'", "value without a flag"),
    ("--base_model nowhere", "--base_model nowhere", "no such folder"),
    ("--base_model ''", "--base_model", "missing"),
    ("--base_model rows.csv", "--base_model rows.csv", "is a file"),
    ("--base_model nothing", "nothing", "no config.json"),
    ("--base_model adapters/good", "It is an adapter", "--adapter_path"),
    ("--base_model base_broken", "base_broken", "JSON"),
    ("--base_model base_type", "base_type", "nosuch"),
    ("--base_model base_code", "base_code", "code of its own"),
    ("--base_model base_tokenizer_code", "base_tokenizer_code", "tokenizer"),
    ("--head tsk", "--head tsk", "auto, task, lm"),
    ("--base_model encoder --head lm", "--head lm", "cannot generate"),
    ("--task_type classifcation", "Did you mean 'classification'"),
    ("--task_type regression --head task", "regression", "'no'", "no number"),
    ("--labels yes yes", "--labels yes yes", "different names"),
    ("--labels yes", "--labels yes", "two or more"),
    ("--labels ja nein", "unknown label", "ja, nein"),
    ("--test_fraction 1.5", "--test_fraction 1.5", "at most 1"),
    ("--test_fraction nan", "--test_fraction nan", "at most 1"),
    ("--validation_fraction nan", "--validation_fraction nan", "below 1"),
    ("--data_fraction 0.0001", "rows.csv", "too few"),
    ("--max_length 100000", "--max_length", "128 positions"),
    ("--max_length 4", "--max_length"),
    ("--prompt_template 'no place'", "--prompt_template", "{text_input}"),
    ("--prompt_template chat", "chat", "template"),
    ("--answer_end 'and so on'", "--answer_end", "one token"),
    ("--predict_by guess", "--predict_by guess", "generate, score"),
    ("--posterior_samples 1", "--posterior_samples 1", "2 or more"),
    ("--posterior_samples 5", "--posterior_samples", "--bayesian"),
    ("--mc_dropout_samples 5", "--mc_dropout_samples", "dropout"),
    ("--target_modules nosuch", "--target_modules", "nosuch"),
    ("--modules_to_save nosuch", "--modules_to_save", "nosuch"),
    ("--attn_implementation magic", "--attn_implementation magic"),
    ("--adapter_name bh-peft --sites lora prefx", "--sites", "prefix, lora, adapter"),
    ("--base_model encoder --adapter_name prompt-tuning", "prompt-tuning", "--head lm"),
    ("--rounds 10 many", "--rounds many", "numbers of rows"),
    ("--rounds 10 --do_train false", "--rounds", "--do_train"),
    ("--rounds 1000 --carry weights", "--rounds", "rows"),
    ("--round_files nowhere.csv", "--round_files", "--dataset_name"),
    ("--replay some", "--replay some", "none, partial, full"),
    ("--resume_rounds", "--resume_rounds", "--rounds"),
    ("--run_name ../outside", "../outside", "letters, digits"),
    ("--run_name /tmp/outside", "/tmp/outside", "letters, digits"),
    ("--run_name 'my run'", "my run", "letters, digits"),
    ("--run_name ''", "--run_name", "letters, digits"),
    ("--run_name old", "results/model_outputs/old.txt exists", "--overwrite"),
    ("--run_name old --overwrite", "scores a person gave", "another --run_name"),
    ("--results_dir rows.csv", "rows.csv", "--results_dir"),
    ("--output_dir rows.csv", "rows.csv", "is a file"),
    ("--output_dir fullfolder", "fullfolder", "not empty", "--overwrite"),
    ("--resume_from_checkpoint nowhere", "nowhere", "checkpoint"),
    ("--do_train false", "--do_train false", "--adapter_path"),
    ("--do_train false --do_predict false --adapter_path adapters/good", "nothing to do"),
    ("--lr_scheduler_type cosine_with_min_lr", "--lr_scheduler_type cosine_with_min_lr", "min_lr"),
    ("--lr_scheduler_kwargs notjson", "--lr_scheduler_kwargs notjson", "JSON"),
    ("--adam_beta1 2", "--optim", "beta", "2"),
    ("--use_liger_kernel true", "--use_liger_kernel", "not installed"),
    ("--eval_on_start true", "--eval_on_start", "--do_eval"),
    ("--eval_do_concat_batches false", "--eval_do_concat_batches"),
    ("--accelerator_config nowhere.json", "nowhere.json", "No such file"),
    ("--config key.yaml --config nowhere.yaml", "--config", "twice"),
    ("--adapter_name prompt-tuning --label_smoothing_factor 0.1", "--label_smoothing_factor", "virtual tokens"),
    ("--adapter_name prompt-tuning --neftune_noise_alpha 5", "--neftune_noise_alpha", "what is trained"),
    ("--bayesian down --posterior_samples 10", "--posterior_samples", "lora has no Gaussian", "bh-peft"),
    ("--plan --max_length 5000", "--max_length", "128 positions"),
    ("--plan --attn_implementation magic", "--attn_implementation magic"),
    ("--plan --gpu_memory -1", "--gpu_memory -1", "above 0"),
    ("", "base", "no model.safetensors"),
    ("--base_model torn_base", "torn_base/model.safetensors", "cut short"),
    ("--base_model pickled_base", "pickled_base", "pickled"),
    ("--plan --plan_json nothing", "nothing", "cannot be written"),
]  # fmt: skip
RECIPES = [
    ("nowhere.yaml", "nowhere.yaml", "no such file"),
    ("folder.yaml", "folder.yaml", "is a folder"),
    ("empty.yaml", "empty.yaml", "mapping"),
    ("list.yaml", "list.yaml", "mapping"),
    ("text.yaml", "text.yaml", "mapping"),
    ("syntax.yaml", "syntax.yaml", "not valid YAML", "line 2"),
    ("tab.yaml", "tab.yaml", "not valid YAML", "line 2"),
    ("key.yaml", "key.yaml", "lora_rnk", "Did you mean 'lora_rank'"),
    ("number.yaml", "number.yaml", "unknown key 8"),
    ("value.yaml", "lora_rank", "'big'"),
    ("nested.yaml", "nested.yaml", "unknown key 'adapter'"),
    ("twice.yaml", "twice.yaml", "lora_rank", "twice"),
    ("truth.yaml", "truth.yaml", "labels", "quotes"),
    ("lists.yaml", "lists.yaml", "target_modules", "list"),
    ("date.yaml", "seed", "2024-01-01"),
    ("binary.yaml", "binary.yaml", "not valid YAML"),
    ("python.yaml", "python.yaml", "not valid YAML"),
    ("escape.yaml", "../../outside", "letters, digits"),
]
DATA = [
    ("sst3", "sst3", "Did you mean 'sst2'"),
    ("nowhere.csv", "nowhere.csv", "no such file"),
    ("nothing", "nothing", ".csv"),
    ("folder.csv", "folder.csv", "is a folder"),
    ("rows", "rows", ".csv"),
    ("data/rows.txt", "data/rows.txt", ".csv"),
    ("tabs.tsv", "tabs.tsv:2", "3 fields", "save it as .csv"),
    ("rows.xlsx", "rows.xlsx", ".csv"),
    ("nobody/nothing", "nobody/nothing", "hub"),
    ("empty.csv", "empty.csv", "is empty"),
    ("spaces.csv", "spaces.csv"),
    ("header.csv", "header.csv", "no rows"),
    ("columns.csv", "'text_input'", "found: sentence, label", "--text_column"),
    ("rows.csv --text_column sentence", "'sentence'", "found: text_input"),
    ("rows.csv --text_column text_label", "text_label", "--label_column"),
    ("twice.csv", "twice.csv", "two columns"),
    ("ragged.csv", "ragged.csv:26", "3 fields", "quote"),
    ("unclosed.csv", "unclosed.csv:3", "quoting"),
    ("latin1.csv", "latin1.csv:26", "0xe9", "UTF-8"),
    ("utf16.csv", "utf16.csv:1", "UTF-8"),
    ("semicolon.csv", "semicolon.csv", "text_input;text_label"),
    ("commas.tsv", "commas.tsv", "text_input,text_label"),
    ("blank.csv", "row 2", "empty 'text_input'"),
    ("unlabelled.csv", "row 2", "empty 'text_label'"),
    ("one_class.csv", "one_class.csv", "all 24 rows", "'no'"),
    ("one_class.csv --task_type classification", "one_class.csv", "the label 'no'"),
    ("one_row.csv", "one_row.csv", "rows"),
    ("same_input.csv", "same_input.csv"),
    ("typo.csv --labels no yes", "typo.csv", "row 24", "'yess'", "no, yes"),
    ("glue_test.csv --labels no yes", "-1", "labelled rows"),
    ("rating_nan.csv --task_type regression --head task", "row 20", "'nan'", "no number"),
    ("rating_inf.csv --task_type regression --head task", "row 20", "'inf'", "no number"),
    ("rating_word.csv --task_type regression --head task", "row 20", "'good'", "no number"),
    ("rows.csv --test_file other_labels.csv --labels no yes", "other_labels.csv", "'maybe'"),
    ("rows.csv --test_file rows.csv", "every training row also stands in the test"),
    ("rows.csv --test_file nowhere.csv", "nowhere.csv", "no such file"),
    ("rows.csv --validation_file rows.csv", "--validation_file", "--do_eval"),
    ("rows.csv --validation_file rows.csv --do_eval", "--validation_file rows.csv"),
    ("rows.csv --ood_dataset_name header.csv --predict_by score", "header.csv", "no rows"),
    ("long.csv", "--max_length", "truncate"),
    ("broken.jsonl", "broken.jsonl:2"),
    ("list.jsonl", "list.jsonl:1"),
    ("array.jsonl", "array.jsonl:1"),
    ("key.jsonl", "row 2", "'text_input'"),
    ("null.jsonl", "row 2", "'text_input'"),
    ("nested.jsonl", "row 1", "'text_input'", "mapping"),
    ("mixed.jsonl", "row 2", "number"),
    ("surrogate.jsonl", "surrogate.jsonl:1", "half a character"),
    ("deep.jsonl", "deep.jsonl:1"),
    ("garbage.parquet", "garbage.parquet"),
    ("pickle.parquet", "pickle.parquet"),
    ("gap.parquet", "row 2", "'text_label'"),
    ("lists.parquet", "row 1", "'text_input'", "list"),
    ("generics", "--data_path", "negative.csv"),
    ("generics --data_path nowhere", "nowhere"),
    ("generics --data_path generics", "generics"),
    ("sst2 --data_path rows.csv", "rows.csv", "folder"),
    ("sst2 --data_path sst2", "dev.tsv"),
    ("sst2 --data_path sst2_label", "train.tsv:2", "'7'"),
]
ADAPTERS = [
    ("nowhere", "nowhere", "no such folder"),
    ("good/task.json", "task.json", "no such folder"),
    ("no_config", "no_config", "adapter_config.json"),
    ("no_weights", "no_weights", "adapter_model.safetensors"),
    ("pickled", "pickled", "adapter_model.bin", "pickle"),
    ("disguised", "adapter_model.safetensors", "no whole safetensors file"),
    ("torn", "adapter_model.safetensors", "cut short"),
    ("hollow", "adapter_model.safetensors", "no whole safetensors file", "save it again"),
    ("cut_config", "adapter_config.json:1", "not JSON"),
    ("list_config", "adapter_config.json", "save the adapter again"),
    ("foreign", "'MAGIC'", "peft"),
    ("rank_text", "adapter_config.json", "'eight'"),
    ("asks_code", "tokenizer_kwargs", "remove it"),
    ("no_base --base_model ''", "no_base", "--base_model"),
    ("base_list --base_model ''", "base_list", "base_model_name_or_path"),
    ("other_base", "meta-llama/Llama-2-7b-hf", "--base_model"),
    ("escape --base_model ''", "../../../etc/passwd"),
    ("cut_card", "task.json"),
    ("list_card", "task.json"),
    ("card_key", "task.json", "labells"),
    ("card_labels", "task.json", "labels"),
    ("card_length", "task.json", "max_length"),
    ("card_task", "task.json", "poetry"),
    ("card_template", "task.json", "prompt_template"),
    ("good --task_type regression", "--task_type regression", "classification"),
    ("good --posterior_samples 5", "--posterior_samples", "Gaussian"),
    ("good --base_model encoder", "roberta", "cannot generate"),
    ("good", "base", "no model.safetensors"),
    ("narrow --base_model whole/base", "narrow", "does not fit"),
    ("head --base_model whole/base", "head", "labels"),
]
SCRIPTS = [
    ("demo/classify.py", "hello --adapter_path nowhere", "nowhere", "no such folder"),
    ("demo/classify.py", "hello", "--adapter_path", "required"),
    ("demo/classify.py", "hello --adapter_path adapters/good --colour red", "--colour"),
    ("demo/classify.py", "'' --adapter_path adapters/good", "TEXT", "empty"),
    ("demo/classify.py", "hello --file rows.csv --adapter_path adapters/good", "TEXT and --file"),
    ("demo/classify.py", "--file nowhere.csv --adapter_path adapters/good", "nowhere.csv", "no such file"),
    ("demo/classify.py", "--file columns.csv --adapter_path adapters/good", "found: sentence", "--text_column"),
    ("demo/classify.py", "--file rows.csv --out fullfolder --adapter_path adapters/good", "fullfolder", "--out"),
    ("demo/classify.py", "--file rows.csv --out rows.csv --adapter_path adapters/good", "rows.csv", "is read"),
    ("demo/classify.py", "--file rows.csv --out bad/word.csv --adapter_path adapters/good", "word.csv: exists"),
    ("demo/classify.py", "--file rows.csv --out rows.csv/x.csv --adapter_path adapters/good", "rows.csv", "no folder"),
    ("demo/classify.py", "hello --adapter_path adapters/good --seed 99999999999999999999", "--seed 9999", "2**32"),
    ("demo/chat.py", "--adapter_path adapters/generates --temperature 0", "temperature 0", "above 0"),
    ("demo/chat.py", "--adapter_path adapters/generates --max_new_tokens 0", "max_new_tokens 0", "at least 1"),
    ("demo/classify.py", "hello --adapter_path adapters/pickled", "adapter_model.bin", "pickle"),
    ("demo/classify.py", "hello --adapter_path adapters/no_card", "task.json"),
    ("demo/classify.py", "hello --adapter_path adapters/generates", "generation"),
    ("demo/classify.py", "hello --adapter_path adapters/good --batch_size 0", "--batch_size 0"),
    ("demo/classify.py", "hello --adapter_path adapters/good --dtype int8", "--dtype", "float32"),
    ("demo/classify.py", "hello --adapter_path adapters/good --posterior_samples 4", "Gaussian"),
    ("demo/chat.py", "", "--adapter_path", "--base_only"),
    ("demo/chat.py", "--adapter_path nowhere", "nowhere", "no such folder"),
    ("demo/chat.py", "--adapter_path adapters/good --port 99999", "--port 99999"),
    ("demo/chat.py", "--adapter_path adapters/pickled", "adapter_model.bin", "pickle"),
    ("util/accuracy_evaluation.py", "nowhere.txt", "nowhere.txt", "check the path"),
    ("util/accuracy_evaluation.py", "--fulll", "--fulll", "Did you mean"),
    ("util/accuracy_evaluation.py", "bad/empty.txt", "bad/empty.txt:1", "is empty"),
    ("util/accuracy_evaluation.py", "bad/no_tag.txt", "bad/no_tag.txt:1", "<QUERY>"),
    ("util/accuracy_evaluation.py", "bad/order.txt", "bad/order.txt:2", "<MODEL OUTPUT>"),
    ("util/accuracy_evaluation.py", "bad/short.txt", "bad/short.txt:3", "<EXPECTED OUTPUT>"),
    ("util/accuracy_evaluation.py", "bad/latin1.txt", "bad/latin1.txt:5", "UTF-8"),
    ("util/accuracy_evaluation.py", "results/model_outputs/old.txt bad/short.txt", "bad/short.txt:3"),
    ("util/explanation_evaluation.py", "bad/score.csv", "bad/score.csv:3", "factual is '5'"),
    ("util/explanation_evaluation.py", "bad/columns.csv", "'model output'", "found: index"),
    ("util/explanation_evaluation.py", "bad/unquoted.csv", "bad/unquoted.csv:1", "factual is 'yes'"),
    ("util/explanation_evaluation.py", "bad/digits.csv", "bad/digits.csv:2"),
    ("util/explanation_evaluation.py", "bad/binary.csv", "bad/binary.csv:", "UTF-8"),
    ("util/explanation_evaluation.py", "--annotate results/model_outputs/old.txt", "--annotator NAME"),
    ("util/explanation_evaluation.py", "--annotate results/model_outputs/old.txt --annotator ../me", "../me"),
    ("util/uncertainty_evaluation.py", "bad/sum.csv", "bad/sum.csv:2", "1.5"),
    ("util/uncertainty_evaluation.py", "bad/word.csv", "bad/word.csv:2", "'most'"),
    ("util/uncertainty_evaluation.py", "bad/label.csv", "bad/label.csv:2", "'c'"),
    ("util/uncertainty_evaluation.py", "bad/nolabel.csv", "no row has a label"),
    ("util/uncertainty_evaluation.py", "bad/norows.csv", "bad/norows.csv"),
    ("util/uncertainty_evaluation.py", "bad/plain.csv", "'prediction'", "found: id, label"),
    ("util/uncertainty_evaluation.py", "results/predictions/old.csv --bins 0", "--bins 0"),
    ("util/uncertainty_evaluation.py", "results/predictions/old.csv --reject 100", "--reject"),
    ("util/uncertainty_evaluation.py", "results/predictions/old.csv --uncertainty entropie", "entropie"),
    ("util/compare_runs.py", "bad/cut.json", "bad/cut.json:1", "not JSON"),
    ("util/compare_runs.py", "bad/schema.json", "schema_version is 9"),
    ("util/compare_runs.py", "bad/lacks.json", "lacks metrics"),
    ("util/compare_runs.py", "bad/list.json", "schema_version is None"),
    ("util/compare_runs.py", "bad/deep.json", "bad/deep.json"),
    ("util/compare_runs.py", "bad/types.json", "bad/types.json", "metrics"),
    ("util/compare_runs.py", "nothing", "no .json file"),
    ("util/compare_runs.py", "--format html", "--format", "markdown"),
    ("util/combine_predictions.py", "results/predictions/old.csv --out new.csv", "two"),
    ("util/combine_predictions.py", "results/predictions/old.csv bad/ids.csv --out new.csv", "no row '0'"),
    ("util/combine_predictions.py", "results/predictions/old.csv bad/ids.csv --out rows.csv", "rows.csv exists"),
    ("util/report.py", "--results_dir nothing", "nothing"),
    ("util/report.py", "nosuch --results_dir results", "nosuch", "there are: old"),
    ("util/interpret.py", "nowhere", "nowhere", "adapter_config.json"),
    ("util/interpret.py", "adapters/torn", "cut short"),
    ("util/interpret.py", "adapters/pickled", "adapter_model.bin", "pickle"),
    ("util/interpret.py", "adapters/good --top 0", "--top 0"),
    ("util/dataset_analysis.py", "rows.xlsx", "rows.xlsx", "convert"),
    ("util/dataset_analysis.py", "columns.csv", "'text_input'", "found: sentence"),
    ("util/dataset_analysis.py", "header.csv", "no rows"),
    ("util/export_adapter.py", "nowhere --to lora out", "nowhere", "no such folder"),
    ("util/export_adapter.py", "adapters/pickled --to merged out", "adapter_model.bin", "pickle"),
    ("util/export_adapter.py", "adapters/good --to gguf out", "--to", "merged"),
    ("util/export_adapter.py", "adapters/good --to merged fullfolder", "fullfolder"),
    ("util/bayesianise.py", "adapters/good out --rows rows.csv --samples 1", "--samples"),
]
BY_RECIPE = "--base_model base --dataset_name rows.csv"
CASES = [
    *((TRAINER, RUN + flags, *words) for flags, *words in FLAGS),
    *((TRAINER, f"{BY_RECIPE} --config {file}", *words) for file, *words in RECIPES),
    *((TRAINER, f"{RUN} --dataset_name {data}", *words) for data, *words in DATA),
    *((TRAINER, TEST + adapter, *words) for adapter, *words in ADAPTERS),
    *SCRIPTS,
]
LIMIT = 5.0  # seconds, as people wait for a message


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model, tiny_encoder) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, tiny_model, tiny_encoder)
    run(TRAINER, "--lora_rnk 4", folder)  # the server that runs are forked from is up
    return folder


def contents(folder: Path) -> dict[str, str]:
    """What every file and folder holds, by name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        found[str(path.relative_to(folder))] = hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "/"
    return found


def run(script: str, flags: str, world: Path, **how):
    return run_command([sys.executable, ROOT / script, *shlex.split(flags)], cwd=world, timeout=60, **how)


@pytest.mark.parametrize(("case"), CASES, ids=lambda case: f"{Path(case[0]).stem} {case[1].replace(RUN, '')}"[:90])
def test_a_mistake_is_one_line_that_says_what_and_what_to_do(case, world):
    script, flags, *words = case
    before, started = contents(world), time.perf_counter()
    finished = run(script, flags, world)
    took = time.perf_counter() - started
    if took >= LIMIT:  # once more, for something else may have had the machine
        started = time.perf_counter()
        run(script, flags, world)
        took = time.perf_counter() - started
    assert finished.returncode == 2, finished.stdout + finished.stderr
    lines = [line for line in finished.stderr.splitlines() if line]  # a progress bar leaves its line end
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 1000, finished.stderr
    missing = [word for word in words if word not in lines[0]]
    assert not missing, f"{missing} not in {lines[0]}"
    assert contents(world) == before
    assert took < LIMIT


def test_debug_shows_where_it_was_found(world):
    for script, flags in ((TRAINER, RUN + "--lora_rank 0 --debug"), ("util/compare_runs.py", "bad/cut.json --debug")):
        finished = run(script, flags, world)
        assert finished.returncode == 1 and "Traceback" in finished.stderr and "InputError: " in finished.stderr


@pytest.mark.parametrize(("script", "flags"), [
    (TRAINER, RUN + "--lora_rnk 4"),
    (TRAINER, RUN + "--lora_rank 0"),
    (TRAINER, RUN + "--config key.yaml"),
    (TRAINER, RUN + "--dataset_name typo.csv --labels no yes"),
    (TRAINER, TEST + "torn"),
    ("demo/classify.py", "hello --adapter_path adapters/no_card"),
    ("demo/chat.py", "--adapter_path adapters/pickled"),
    ("util/export_adapter.py", "adapters/torn --to lora out"),
])  # fmt: skip
def test_most_mistakes_are_told_before_torch_is_imported(script, flags, world):
    """In a fresh process, in which any import of torch fails."""
    (world / "without").mkdir(exist_ok=True)
    (world / "without/torch.py").write_text("raise SystemExit('torch was imported')")
    started = time.perf_counter()
    finished = run(script, flags, world, real=True, PYTHONPATH=f"{world / 'without'}:{ROOT}")
    assert finished.returncode == 2 and finished.stderr.startswith("error: "), finished.stderr
    assert time.perf_counter() - started < LIMIT


def test_the_early_look_knows_every_flag(world):
    known = known_flags()
    flags = {name[2:] for name in FlagParser(ARGUMENT_CLASSES)._option_string_actions if name.startswith("--")}
    assert flags <= known
    more = {name for name in known - flags if not name.startswith(("no_", "no-"))}
    assert {name.replace("-", "_") for name in more} <= flags | {"config"}


def test_the_early_look_lets_a_good_run_pass(world, capsys):
    check_early(shlex.split(RUN.replace("rows.csv", str(world / "rows.csv")) + "--lr 1e-3 --no_do_eval --do-train"))
    assert capsys.readouterr() == ("", "")
