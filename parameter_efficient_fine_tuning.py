"""Fine-tune a frozen language model with few parameters, sharded, answer held-out rows, write results/.

    accelerate launch --config_file ds_zero3_cpu.yaml parameter_efficient_fine_tuning.py --config recipes/NAME.yaml
    python parameter_efficient_fine_tuning.py --config recipes/NAME.yaml --lr 1e-3      # one process, no DeepSpeed

The way of the data: recipe and flags -> task -> frozen base -> adapter -> train -> predict -> results.
"""

from __future__ import annotations

import time

from transformers import set_seed

from bhpeft import environment
from bhpeft.adapters import adopt_settings, attach_adapter, base_model_of, check_adapter, virtual_tokens
from bhpeft.base_model import (
    check_4bit,
    check_positions,
    load_base_model,
    load_config,
    load_tokenizer,
    parameter_counts,
)
from bhpeft.config import Run, check_output_dir, name_run, parse_arguments
from bhpeft.errors import InputError, run_main
from bhpeft.prediction import decode_answers, greedy_config
from bhpeft.record import Answered, say, write_run
from bhpeft.results import ModelOutput, RunFiles
from bhpeft.tasks import load_task
from bhpeft.tasks.encoding import Collator, Encoder
from bhpeft.training import AdapterTrainer, BeforeTraining


def main(argv: list[str] | None = None) -> dict | None:
    """Run once; return the record written to `results/metrics/RUN.json` (on rank 0; None on the others)."""
    started = time.perf_counter()
    run = parse_arguments(argv)
    training = run.training

    # What is wrong with the input is found before a weight is loaded.
    if run.adapter.adapter_path:
        adopt_settings(run.adapter)
    name_run(run)
    files = RunFiles(run.output.results_dir, training.run_name)
    files.check_free(run.output.overwrite)
    check_output_dir(run)
    base_name = run.base.base_model or base_model_of(run.adapter.adapter_path)
    config = load_config(base_name, run.base.revision)
    check_adapter(run.adapter, config, base_name)
    environment.check_compiler(training)
    in_4bit = settle_4bit(run)
    task = load_task(run.data, training.data_seed, training.do_eval, training.do_train)
    tokenizer = load_tokenizer(base_name, run.base.revision)
    encoder = Encoder(tokenizer, run.data.prompt_template, run.data.max_length, run.data.long_prompts)
    notes = run.notes + task.notes
    train_rows = encoder.train_rows(task.train, notes) if training.do_train else None
    validation_rows = encoder.train_rows(task.validation, notes) if training.do_eval else None
    test_rows = encoder.test_rows(task.test, task.labels, notes)
    check_positions(config, run.data.max_length + run.data.max_new_tokens + virtual_tokens(run.adapter))
    files.prepare()
    say(*notes)

    # Frozen base, sharded while it loads; then the adapter, whole on every rank until DeepSpeed takes the model.
    set_seed(training.seed)
    base = load_base_model(base_name, run.precision, in_4bit, run.base.revision, run.base.attn_implementation)
    model = attach_adapter(base, run.adapter, base_name)
    parameters = parameter_counts(model)
    say("training {trainable:,} of {all:,} parameters ({trainable_percent:.4f} %)".format(**parameters))

    trainer = AdapterTrainer(
        model=model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        data_collator=Collator(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    trainer.kl_weight = run.adapter.kl_weight
    trainer.generation_config = greedy_config(tokenizer, run.data.max_new_tokens)
    loaded = time.perf_counter()

    def answer() -> Answered:
        answers = trainer.answer(test_rows)
        examples = [task.test[i] for i in answers.index]
        texts = decode_answers(tokenizer, answers.tokens)
        outputs = [ModelOutput(e.query, text, e.answer) for e, text in zip(examples, texts, strict=True)]
        return Answered([e.id for e in examples], outputs, answers.log_likelihoods)

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
