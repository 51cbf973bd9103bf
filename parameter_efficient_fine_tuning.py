"""Fine-tune a frozen language model with few parameters, sharded, answer held-out rows, write results/.

    accelerate launch --config_file ds_zero3_cpu.yaml parameter_efficient_fine_tuning.py --config recipes/NAME.yaml
    python parameter_efficient_fine_tuning.py --config recipes/NAME.yaml --lr 1e-3      # one process, no DeepSpeed

The way of the data: recipe and flags -> task -> frozen base -> adapter -> train -> predict -> results.
"""

from __future__ import annotations

import time

from transformers import set_seed

from bhpeft import environment
from bhpeft.adapters import adopt_settings, attach_adapter, base_model_of, check_adapter, is_bayesian, virtual_tokens
from bhpeft.base_model import (
    check_4bit,
    check_positions,
    load_base_model,
    load_config,
    load_tokenizer,
    load_with_head,
    parameter_counts,
    settle_head,
)
from bhpeft.config import Run, adopt_task, check_output_dir, name_run, parse_arguments
from bhpeft.errors import InputError, run_main
from bhpeft.prediction import greedy_config, read_answers
from bhpeft.record import say, write_run
from bhpeft.report.answered import Answered
from bhpeft.results import RunFiles
from bhpeft.tasks import load_task
from bhpeft.tasks.encoding import Collator
from bhpeft.tasks.question import card_of, make_encoder
from bhpeft.training import AdapterTrainer, BeforeTraining


def main(argv: list[str] | None = None) -> dict | None:
    """Run once; return the record written to `results/metrics/RUN.json` (on rank 0; None on the others)."""
    started = time.perf_counter()
    run = parse_arguments(argv)
    training = run.training

    # What is wrong with the input is found before a weight is loaded.
    trained_labels = ()
    if run.adapter.adapter_path:
        adopt_settings(run.adapter)
        trained_labels = adopt_task(run)
    if run.data.posterior_samples and not is_bayesian(run.adapter):
        raise InputError(
            "--posterior_samples: the adapter has no Gaussian weights; train one with --bayesian down or all"
        )
    name_run(run)
    files = RunFiles(run.output.results_dir, training.run_name)
    files.check_free(run.output.overwrite)
    check_output_dir(run)
    base_name = run.base.base_model or base_model_of(run.adapter.adapter_path)
    config = load_config(base_name, run.base.revision)
    environment.check_compiler(training)
    in_4bit = settle_4bit(run)
    task = load_task(run.data, training.data_seed, training.do_eval, training.do_train, trained_labels)
    with_head = settle_head(run.base.head, config, task.task_type)
    head = task.task_type if with_head else "lm"
    check_adapter(run.adapter, config, base_name, head)
    tokenizer = load_tokenizer(base_name, run.base.revision, generates=not with_head)
    encoder = make_encoder(tokenizer, run.data, task, with_head, run.adapter.adapter_path)
    notes = run.notes + task.notes
    train_rows = encoder.train_rows(task.train, notes) if training.do_train else None
    validation_rows = encoder.train_rows(task.validation, notes) if training.do_eval else None
    test_rows = encoder.test_rows(task.test, notes)
    new_tokens = 0 if with_head else run.data.max_new_tokens + virtual_tokens(run.adapter)
    check_positions(config, run.data.max_length + new_tokens)
    files.prepare()
    say(*notes)

    # Frozen base, sharded while it loads; then the adapter, whole on every rank until DeepSpeed takes the model.
    set_seed(training.seed)
    how = (run.precision, in_4bit, run.base.revision, run.base.attn_implementation, run.base.base_dropout)
    if with_head:
        base, trained_too = load_with_head(base_name, task.task_type, task.labels, tokenizer.pad_token_id, *how)
    else:
        base, trained_too = load_base_model(base_name, *how), []
    trained_too += run.adapter.modules_to_save or []
    model = attach_adapter(base, run.adapter, base_name, head, trained_too)
    parameters = parameter_counts(model)
    say("training {trainable:,} of {all:,} parameters ({trainable_percent:.4f} %)".format(**parameters))

    trainer = AdapterTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        with_head=with_head,
    )
    trainer.kl_weight = run.adapter.kl_weight
    trainer.posterior_samples = run.data.posterior_samples
    trainer.card = card_of(run.data, task, encoder, in_4bit)
    if not with_head and run.data.predict_by == "generate":
        trainer.generation_config = greedy_config(tokenizer, run.data.max_new_tokens, encoder.end_id)
    loaded = time.perf_counter()

    def answer(rows=test_rows, examples=task.test) -> Answered:
        return read_answers(trainer.answer(rows), rows, examples, task, encoder)

    def answer_with_base() -> None:
        with trainer.model.disable_adapter():
            answered["base"] = answer()

    answered: dict[str, Answered] = {}
    if run.output.compare_base and training.do_train:
        trainer.add_callback(BeforeTraining(answer_with_base))
    elif run.output.compare_base:
        answer_with_base()
    if training.do_train:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
        trainer.save_model()
    trained = time.perf_counter()
    validation = trainer.evaluate() if training.do_eval else {}
    if training.do_eval and task.task_type != "generation":
        answered["validation"] = answer(encoder.test_rows(task.validation, []), task.validation)
    if training.do_predict:
        answered["adapter"] = answer()
    timings = {"load": loaded - started, "train": trained - loaded, "predict": time.perf_counter() - trained}
    return write_run(run, files, task, answered, parameters, timings, validation, trainer.state.log_history)


def settle_4bit(run: Run) -> bool:
    """Whether the base is loaded in 4 bit: it is what was asked for, or the run stops, or it says so."""
    if not run.load_in_4bit:
        return False
    try:
        check_4bit()
    except InputError as error:
        if not run.base.allow_full_precision:
            raise
        run.notes.append(f"NOT in 4 bit, as --allow_full_precision permits: {error}")
        return False
    return True


if __name__ == "__main__":
    run_main(main)
    environment.leave_together()
