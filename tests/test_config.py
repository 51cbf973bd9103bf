"""Recipes and flags: what beats what, short names, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace

import pytest

from bhpeft import environment
from bhpeft.checkpoints import seal
from bhpeft.config import adopt_adapter, adopt_task, check_output_dir, name_run, parse_arguments
from bhpeft.errors import InputError, nearest
from bhpeft.tasks.card import TaskCard

BASE = ["--base_model", "m", "--dataset_name", "generics"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "LOCAL_RANK", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # restored after the test; parsing sets it


def recipe(tmp_path, text):
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return str(file)


def test_a_flag_beats_the_recipe_and_the_recipe_beats_the_default(tmp_path):
    file = recipe(tmp_path, "base_model: m\ndataset_name: generics\nlora_rank: 4\nlearning_rate: 3e-3\nbatch_size: 5\n")
    run = parse_arguments(["--config", file, "--lora_rank", "32"])
    assert (run.adapter.lora_rank, run.training.learning_rate) == (32, 3e-3)
    assert run.training.per_device_train_batch_size == 5
    assert run.adapter.lora_alpha == 16.0


def test_short_names_of_the_source_projects():
    run = parse_arguments([*BASE, "--lr", "0.5", "--batch_size", "3", "--epochs", "7"])
    training = run.training
    assert (training.learning_rate, training.per_device_train_batch_size, training.num_train_epochs) == (0.5, 3, 7)


def test_lists_booleans_and_nothing_in_a_recipe(tmp_path):
    text = "base_model: m\ndataset_name: generics\ntarget_modules: [q_proj, v_proj]\nload_in_4bit: true\n"
    run = parse_arguments(["--config", recipe(tmp_path, text + "do_predict: false\nmax_train_samples:\n")])
    assert run.adapter.target_modules == ["q_proj", "v_proj"]
    assert run.load_in_4bit and not run.training.do_predict and run.data.max_train_samples is None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora_rnk", "4"], ["--lora_rnk", "Did you mean 'lora_rank'?"]),
        (["--lora_rank", "four"], ["--lora_rank", "four"]),
        (["--lora_rank", "0"], ["--lora_rank 0", "above 0"]),
        (["--lora_dropout", "1.5"], ["--lora_dropout"]),
        (["--adapter_name", "lorra"], ["lorra", "Did you mean 'lora'?"]),
        (["--fp16", "--bf16"], ["--fp16 and --bf16"]),
        (["--test_fraction", "0"], ["--test_fraction 0"]),
        (["--data_fraction", "1.5"], ["--data_fraction"]),
        (["--max_length", "0"], ["--max_length 0"]),
        (["--lora_alpha", "nan"], ["--lora_alpha nan"]),
        (["--prior_sigma", "nan"], ["--prior_sigma nan"]),
        (["--kl_weight", "nan"], ["--kl_weight nan"]),
        (["--bayesian", "some"], ["down, all or none"]),
        (["--prefix_length", "0"], ["--prefix_length 0"]),
        (["--lr", "nan"], ["--learning_rate nan"]),
        (["--lr=-1"], ["--learning_rate -1"]),
        (["--batch_size", "0"], ["--per_device_train_batch_size 0"]),
        (["--gradient_accumulation_steps", "0"], ["--gradient_accumulation_steps 0"]),
        (["--seed=-1"], ["--seed -1"]),
        (["--dataloader_drop_last", "true"], ["--dataloader_drop_last"]),
        (["--remove_unused_columns", "true"], ["--remove_unused_columns"]),
        (["--report_to", "wandb"], ["--report_to wandb", "not installed"]),
        (["--resume_from_checkpoint", "nosuch"], ["nosuch", "no whole checkpoint"]),
        (["--prompt_template", "x"], ["{text_input}"]),
        (["--long_prompts", "cut"], ["--long_prompts cut", "truncate"]),
        (["--do_train", "false"], ["--adapter_path"]),
        (["--do_train", "maybe"], ["maybe"]),
        (["stray"], ["'stray'"]),
        (["--config"], ["--config"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["--lr_scheduler_type", "zigzag"], ["zigzag"]),
        (["--warmup_steps", "-3"], ["warmup_steps"]),
        (["--save_only_model", "true"], ["--save_only_model", "--resume needs"]),
        (["--metric_for_best_model", "accuracy"], ["--metric_for_best_model accuracy", "give eval_loss"]),
        (["--gradient_checkpointing_kwargs", '{"use_reentrant": true}'], ["use_reentrant", "no gradient"]),
        (["--gradient_checkpointing_kwargs", "foo"], ["--gradient_checkpointing_kwargs foo", "JSON"]),
        (["--prior-widening", "2"], ["--prior_widening", "rounds"]),
    ],
)
def test_mistakes_in_flags(flags, words):
    with pytest.raises(InputError) as error:
        parse_arguments([*BASE, *flags])
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora_rnk: 4", ["unknown key 'lora_rnk'", "Did you mean 'lora_rank'?"]),
        ("- a\n- b", ["mapping"]),
        ("a: [", ["not valid YAML"]),
        ("labels: [yes, no]", ["truth values", "quotes"]),
        ("config: x.yaml", ["unknown key 'config'"]),
        ("base_model: m", ["--dataset_name: missing"]),
        ("dataset_name: generics", ["--base_model: missing"]),
    ],
)
def test_mistakes_in_recipes(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        parse_arguments(["--config", recipe(tmp_path, text)])
    assert all(word in str(error.value) for word in words), str(error.value)


def test_names_follow_from_the_run():
    run = parse_arguments(["--base_model", "EleutherAI/pythia 1b", "--dataset_name", "data/rows.csv"])
    name_run(run)
    assert run.training.run_name == "lora_pythia-1b_rows"
    assert run.training.output_dir == "adapters/lora_pythia-1b_rows"


def test_an_adapter_is_not_written_over(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    flags = [*BASE, "--output_dir", str(tmp_path)]
    with pytest.raises(InputError, match="--overwrite"):
        check_output_dir(parse_arguments(flags))
    check_output_dir(parse_arguments([*flags, "--overwrite"]))
    check_output_dir(parse_arguments([*BASE, "--output_dir", str(tmp_path / "new")]))
    for run in ("mine", "other"):  # resuming writes on into its own folder, and into no other
        (tmp_path / run / "written").mkdir(parents=True)
        (tmp_path / run / "written/trainer_state.json").write_text("{}")
        seal(tmp_path / run / "written", tmp_path / run / "checkpoint-3", None)
    resume = [*BASE, "--resume_from_checkpoint", str(tmp_path / "mine/checkpoint-3"), "--output_dir"]
    check_output_dir(parse_arguments([*resume, str(tmp_path / "mine")]))
    with pytest.raises(InputError, match="--overwrite"):
        check_output_dir(parse_arguments([*resume, str(tmp_path / "other")]))
    with pytest.raises(InputError, match="is a file"):
        check_output_dir(parse_arguments([*BASE, "--output_dir", str(tmp_path / "adapter_config.json")]))


@pytest.mark.parametrize(
    ("asked", "available", "slow", "precision", "told"),
    [
        ("no", {"bf16"}, {}, "no", False),
        ("fp16", {"fp16", "bf16"}, {}, "fp16", False),
        ("fp16", {"bf16"}, {}, "bf16", True),
        ("bf16", {"fp16"}, {}, "fp16", True),
        ("bf16", {"bf16"}, {"bf16"}, "bf16", True),
        ("fp16", {"bf16"}, {"bf16"}, "no", True),
    ],
)
def test_precision_is_the_one_asked_for_or_said(asked, available, slow, precision, told):
    chosen, notes = environment.choose_precision(asked, available, frozenset(slow))
    assert chosen == precision and len(notes) == told and all(asked in note for note in notes)


def test_precision_reaches_the_trainer():
    run = parse_arguments([*BASE, "--bf16"])
    assert run.precision == "bf16" and run.training.bf16 and run.training.mixed_precision == "bf16"
    run = parse_arguments([*BASE, "--fp16"])  # without DeepSpeed a CPU trains in bf16, if it multiplies in it
    assert run.precision == "fp16" or run.precision == ("bf16" if environment.bf16_in_hardware() else "no")
    assert run.training.mixed_precision == run.precision
    assert bool(run.notes) == (run.precision != "fp16")


def test_nearest_says_nothing_where_nothing_is_near():
    assert nearest("zzzzzz", ["lora_rank"]) == ""


def test_a_flag_beats_what_an_adapter_was_trained_for(tmp_path):
    card = TaskCard("classification", ["n", "p"], False, "X {text_input}", None, 512, "score")
    card.write(tmp_path)
    adapter = [*BASE, "--adapter_path", str(tmp_path)]
    run = parse_arguments(adapter)
    assert adopt_task(run) == ("n", "p")
    assert (run.data.predict_by, run.data.max_length, run.data.prompt_template) == ("score", 512, "X {text_input}")
    run = parse_arguments([*adapter, "--predict-by", "generate", "--max_length", "64", "--labels", "a", "b"])
    assert adopt_task(run) == ()
    assert (run.data.predict_by, run.data.max_length, run.data.prompt_template) == ("generate", 64, "X {text_input}")
    with pytest.raises(InputError, match="was trained for classification"):
        adopt_task(parse_arguments([*adapter, "--task_type", "regression"]))


def test_a_flag_without_effect_is_said():
    run = parse_arguments([*BASE, "--temperature", "0.7", "--ood_data_path", "x"])
    said = [note for note in run.notes if "no effect" in note]
    assert said == [
        "--temperature: has no effect without --do_sample",
        "--ood_data_path: has no effect without --ood_dataset_name",
    ]
    with_both = parse_arguments([*BASE, "--temperature", "0.7", "--do_sample"])
    assert not any("no effect" in note for note in with_both.notes)


def test_settings_of_another_adapter_are_said_and_not_recorded(tmp_path):
    flags = ["--sites", "prefix", "--bayesian", "all", "--kl_weight", "5", "--lora_rank", "4"]
    run = parse_arguments([*BASE, "--adapter_name", "lora", *flags])
    told = [note for note in run.notes if "no effect" in note]
    assert told == [f"--{name}: has no effect with --adapter_name lora" for name in ("bayesian", "kl_weight", "sites")]
    settings = run.as_dict()
    assert (settings["sites"], settings["bayesian"], settings["kl_weight"], settings["lora_rank"]) == (None, None, 1, 4)
    run = parse_arguments([*BASE, "--adapter_name", "bayesian-lora", "--target_modules", "q_proj", "k_proj"])
    assert run.adapter.target_modules is None and any(n.startswith("--target_modules: has no") for n in run.notes)
    quiet = parse_arguments([*BASE, "--adapter_name", "bh-peft", *flags])
    assert not any("no effect" in note for note in quiet.notes) and quiet.adapter.sites == ["prefix"]


def test_flags_that_an_existing_adapter_overrules_are_said(tmp_path):
    saved = {"peft_type": "LORA", "base_model_name_or_path": "m", "r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    (tmp_path / "adapter_model.safetensors").write_text("")
    flags = ["--adapter_path", str(tmp_path), "--lora_rank", "4", "--lora_alpha", "16", "--prefix_length", "17"]
    run = parse_arguments([*BASE, *flags])
    adopt_adapter(run)
    assert [note for note in run.notes if "no effect" in note] == [
        "--lora_rank 4: has no effect; the adapter at --adapter_path has 8",
        "--prefix_length: has no effect with --adapter_name lora",
    ]
    assert run.adapter.prefix_length == 30


@pytest.mark.parametrize(("gpus", "used"), [(0, 0), (1, 1), (4, 1)])
def test_a_process_takes_one_gpu_and_counts_the_others(gpus, used):
    training = parse_arguments([*BASE, "--batch_size", "3"]).training
    training._n_gpu = gpus  # as transformers counts them where there is no launcher
    assert (training.n_gpu, training.idle_gpus, training.train_batch_size) == (used, gpus - used, 3)


def test_a_lock_left_by_a_killed_compile_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name, age in (("fresh", 60), ("old", 7200)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age,) * 2)
    zero = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    training = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=zero), do_train=True)
    with pytest.raises(InputError, match="old/lock: left by a compile"):
        environment.check_compiler(training)
    (tmp_path / "old/lock").unlink()
    environment.check_compiler(training)


def test_training_in_bf16_on_a_cpu_takes_plain_attention_unless_it_is_told_or_texts_are_long(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)

    def chosen(*flags: str) -> str | None:
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # the one before left it
        return parse_arguments([*BASE, *flags]).base.attn_implementation

    assert chosen("--bf16", "--max_length", "256") == "eager"
    assert chosen("--bf16", "--max_length", "257") is None
    assert chosen("--max_length", "64") is None
    assert chosen("--bf16", "--attn_implementation", "sdpa") == "sdpa"
    assert chosen("--bf16", "--plan", "--gpu_memory", "24") is None
