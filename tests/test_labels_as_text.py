"""Labels that a language model writes: templates, what is scored, how a text is read, irregular answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import statement_rows
from sklearn import metrics as reference
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from bhpeft.arguments import DataArguments
from bhpeft.base_model import load_base_model
from bhpeft.errors import InputError
from bhpeft.prediction import decode_answers, greedy_config, label_log_likelihoods
from bhpeft.results import read_metrics, read_model_outputs, read_predictions
from bhpeft.scores import IRREGULAR, label_figures, probability_figures, read_label, regression_figures
from bhpeft.tasks import Example, load_task
from bhpeft.tasks.encoding import Collator, Encoder
from bhpeft.tasks.load import infer_task_type
from bhpeft.tasks.templates import resolve_template
from bhpeft.text_scores import text_figures

LABELS = ("negative", "positive", "Sci/Tech")


# ------------------------------------------------------------------------------------- reading and scoring


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("positive", "positive"), (" Positive. ", "positive"), ('"negative"', "negative"), ("sci/tech", "Sci/Tech"),
        ("positive\n\n### Instruction:", "positive"), ("`negative`.", "negative"), ("**positive**", "positive"),
        ("positive sentiment", IRREGULAR), ("It is positive", IRREGULAR), ("", IRREGULAR), ("\n", IRREGULAR),
        ("positively", IRREGULAR), ("pos", IRREGULAR), ("positive negative", IRREGULAR),
    ],
)  # fmt: skip
def test_a_text_is_a_label_or_irregular(text, label):
    assert read_label(text, LABELS) == label


def test_labels_that_differ_in_case_or_marks_alone_are_told_apart():
    assert [read_label(text, ("US", "us")) for text in ("US", "us", "Us")] == ["US", "us", IRREGULAR]
    assert [read_label(text, ("U.S.", "Yes!", "5*")) for text in ("U.S.", "u.s", "Yes!", "5*")] == [
        "U.S.", "U.S.", "Yes!", "5*",
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_label_figures_equal_scikit_learn(seed):
    random = np.random.default_rng(seed)
    names = list("abcd")
    expected = random.choice(names[: 4 - seed % 2], 50).tolist()
    predicted = random.choice([*names, IRREGULAR] if seed > 1 else names, 50).tolist()
    found = label_figures(expected, predicted, names)
    assert found["accuracy"] == reference.accuracy_score(expected, predicted)
    seen = sorted(set(expected) | set(predicted) - {IRREGULAR})
    for average in ("weighted", "macro"):
        options = {"labels": seen, "average": average, "zero_division": 0}
        assert found[f"f1_{average}"] == pytest.approx(reference.f1_score(expected, predicted, **options))
        assert found[f"recall_{average}"] == pytest.approx(reference.recall_score(expected, predicted, **options))
        assert found[f"precision_{average}"] == pytest.approx(reference.precision_score(expected, predicted, **options))
    assert found["irregular"] == predicted.count(IRREGULAR)
    for i, row in enumerate(names):
        for j, column in enumerate(names):
            pairs = zip(expected, predicted, strict=True)
            assert found["confusion"][i][j] == sum(pair == (row, column) for pair in pairs)


def test_figures_of_probabilities_numbers_and_texts_equal_their_definitions():
    random = np.random.default_rng(0)
    p = random.dirichlet(np.ones(3), 40)
    expected = random.choice(list("abc"), 40).tolist()
    found = probability_figures(expected, p, "abc")
    right = [list("abc")[i] == label for i, label in zip(p.argmax(1), expected, strict=True)]
    assert found["nll"] == pytest.approx(reference.log_loss(expected, p, labels=list("abc")))
    assert found["scored_accuracy"] == np.mean(right)

    truth, guess = random.normal(5, 2, 30), random.normal(5, 2, 30)
    found = regression_figures(truth, guess, deviation=2.5)
    assert found["r2"] == pytest.approx(1 - ((truth - guess) ** 2).sum() / ((truth - truth.mean()) ** 2).sum())
    assert found["rmse"] == pytest.approx(math.sqrt(((truth - guess) ** 2).mean()))
    assert found["mae_standardised"] == pytest.approx(np.abs(truth / 2.5 - guess / 2.5).mean())
    assert found["mse_standardised"] == pytest.approx(((truth / 2.5 - guess / 2.5) ** 2).mean())

    import sacrebleu

    texts, wanted = ["the cat sat there", "a dog"], ["the cat sat here", "a dog barks loudly now"]
    found = text_figures(texts, wanted, np.array([-3.0, -5.0]), np.array([4, 6]))
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [wanted]).score) and found["bleu_signature"]
    assert found["perplexity"] == pytest.approx(math.exp(0.8))


def test_perplexity_is_over_the_answers_tokens_alone(tiny_model):
    """Against a plain loop over tokens, with rows of different lengths, so padded on both sides."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = load_base_model(str(tiny_model)).eval()
    pairs = [("Do cats fly?", "No, they do not."), ("Do owls and eels and bees sing at dawn?", "Yes.")]
    examples = [Example(str(i), q, a, q) for i, (q, a) in enumerate(pairs)]
    rows = Encoder(tokenizer, "User: {text_input}\nAssistant:", 64).test_rows(examples, [])
    batch = Collator(tokenizer.pad_token_id)(rows)
    scored = label_log_likelihoods(model, batch["input_ids"], batch["attention_mask"], batch["label_ids"])[:, 0]
    for row, score, (_, answer) in zip(rows, scored, pairs, strict=True):
        [answer_ids] = row["label_ids"]
        assert tokenizer.decode(answer_ids) == f" {answer}</s>"
        total, ids = 0.0, list(row["input_ids"])
        for token in answer_ids:
            with torch.no_grad():
                total += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids.append(token)
        assert score.item() == pytest.approx(total, rel=1e-4)


# ----------------------------------------------------------------------------------------------- templates


def test_templates_by_name_by_text_and_of_the_tokenizer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = resolve_template("instruction", "Say yes.", tokenizer)
    assert text == "### Instruction:\nSay yes.\n\n### Input:\n{text_input}\n\n### Response:\n"
    assert "<<SYS>>\nSay yes.\n<</SYS>>" in resolve_template("llama2", "Say yes.", tokenizer)
    assert resolve_template("Q {text_input} ({instruction})", "x", tokenizer) == "Q {text_input} (x)"
    with pytest.raises(InputError, match="--instruction"):
        resolve_template("instruction", None, tokenizer)
    with pytest.raises(InputError, match="no chat template"):
        resolve_template("chat", "x", tokenizer)
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    )
    text = resolve_template("chat", "Say yes.", tokenizer)
    assert text == "<system>Say yes.<user>{text_input}<assistant>"  # the tokenizer itself puts its first token before
    ids = Encoder(tokenizer, text, 64).encode(Example("0", "hi", "yes", "hi"))[0]
    assert ids.count(tokenizer.bos_token_id) == 1
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(InputError, match="refuses these turns"):
        resolve_template("chat", "x", tokenizer)


def test_a_long_input_is_cut_within_its_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoder = Encoder(tokenizer, "Q: {text_input} A:", 32, "truncate", ("yes", "no"), True)
    example = Example("0", "cats " * 60, "yes", "x")
    [row] = encoder.train_rows([example], [])
    text = tokenizer.decode(row["input_ids"])
    assert len(row["input_ids"]) <= 32 and text.startswith("<s>Q: cats cats") and text.endswith(" A: yes</s>")
    with pytest.raises(InputError, match="no room for its input"):
        Encoder(tokenizer, "word " * 40 + "{text_input}", 32, "truncate").train_rows([example], [])


def test_of_a_long_question_the_question_is_cut_and_no_choice(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    choices = ("cats", "dogs", "eels")
    encoder = Encoder(tokenizer, "Q: {text_input} A:", 48, "truncate", ("A", "B", "C"), True)
    [row] = encoder.train_rows([Example("0", "Do cats sleep? " * 30, "C", "x", choices)], [])
    text = tokenizer.decode(row["input_ids"])
    assert len(row["input_ids"]) <= 48 and text.startswith("<s>Q: Do cats sleep?")
    assert text.endswith("\nA. cats\nB. dogs\nC. eels A: C</s>")


def test_another_token_may_end_an_answer(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoder = Encoder(tokenizer, "{text_input}", 32, "error", ("yes", "no"), True, answer_end="!")
    example = Example("0", "Do cats fly?", "yes", "x")
    [row] = encoder.train_rows([example], [])
    assert tokenizer.decode(row["input_ids"]) == "<s>Do cats fly? yes!"
    [row] = encoder.test_rows([example], [])
    assert [tokenizer.decode(ids) for ids in row["label_ids"]] == [" yes!", " no!"]
    end = encoder.end_id
    assert greedy_config(tokenizer, 5, end).eos_token_id == sorted([end, tokenizer.eos_token_id])
    ids = tokenizer(" yes", add_special_tokens=False)["input_ids"]
    assert decode_answers(tokenizer, [[*ids, end, *ids]], end) == ["yes"]
    with pytest.raises(InputError, match="not one token"):
        Encoder(tokenizer, "{text_input}", 32, answer_end="the end of it all")


def test_labels_are_never_cut_and_long_answers_are_scored_as_far_as_they_fit(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    label = "not at all so, no"
    encoder = Encoder(tokenizer, "{text_input}", 24, "truncate", ("yes", label), True)
    queries = ["cats " * n for n in range(4, 30)]
    rows = encoder.train_rows([Example(str(i), q, label, q) for i, q in enumerate(queries)], [])
    assert all(tokenizer.decode([t for t in row["labels"] if t != -100]) == f" {label}</s>" for row in rows)
    assert all(len(row["input_ids"]) <= 24 for row in rows)

    # A long prompt beside a long answer of another row: no batch is longer than the model has positions.
    notes = []
    examples = [Example("0", "cats " * 20, "Yes.", "a"), Example("1", "dogs", "No. " * 400, "b")]
    rows = Encoder(tokenizer, "{text_input}", 64).test_rows(examples, notes)
    assert "1 of 2 expected answers scored up to --max_length 64" in notes[0]
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, vocab_size=len(tokenizer))
    model = GPT2LMHeadModel(config).eval()
    batch = Collator(tokenizer.pad_token_id)(rows)
    together = label_log_likelihoods(model, batch["input_ids"], batch["attention_mask"], batch["label_ids"])
    for i, row in enumerate(rows):
        alone = Collator(tokenizer.pad_token_id)([row])
        one = label_log_likelihoods(model, alone["input_ids"], alone["attention_mask"], alone["label_ids"])
        assert one[0].item() == pytest.approx(together[i].item(), rel=1e-4)


# -------------------------------------------------------------------------------------- tasks as inferred


def rows_of(*answers):
    return [Example(str(i), f"q{i}", a, f"q{i}") for i, a in enumerate(answers)]


def test_what_answers_look_like():
    assert infer_task_type(rows_of(*"abab")) == ("classification", ("a", "b"))
    assert infer_task_type(rows_of("10", "2", "10", "2")) == ("classification", ("2", "10"))
    assert infer_task_type(rows_of("1.5", "2", "3")) == ("regression", ())
    assert infer_task_type(rows_of("a", "a", "b")) == ("generation", ())  # one b: no set of labels
    assert infer_task_type(rows_of("a long answer of words", "another one of several words") * 2)[0] == "generation"


CLASSES = {"task_type": "classification", "labels": ["x", "y"]}


@pytest.mark.parametrize(
    ("lines", "flags", "words"),
    [
        (
            ["a,x", "b,y", "c,x", "d,y", "e,z"],
            {"task_type": "classification", "labels": ["x", "y"]},
            "unknown label 'z'",
        ),
        (
            ["a,x", "b,x", "c,-1", "d,-1"],
            {"task_type": "classification", "labels": ["x", "y"]},
            "-1 marks rows without",
        ),
        (["a,1.5", "b,2", "c,high", "d,4"], {"task_type": "regression"}, "'high' is no number"),
        (["a,nan", "b,2", "c,3", "d,4"], {"task_type": "regression"}, "is no number"),
        (["a,inf", "b,2", "c,3", "d,4"], {"task_type": "regression"}, "is no number"),
        (["a,x", "b,y", "c,x", "d,z"], {"labels": ["x", "y"]}, "unknown label 'z'"),
        (["a,A", "b,B", "c,A", "d,B"], {"task_type": "multiple_choice", "labels": ["A", "B"]}, "has no choices"),
        (["a,x", "b,x", "c,x", "d,x"], CLASSES, "all 3 training rows"),
    ],
)
def test_answers_that_the_task_does_not_allow_are_named(tmp_path, lines, flags, words):
    (tmp_path / "rows.csv").write_text("text_input,text_label\n" + "\n".join(lines) + "\n")
    with pytest.raises(InputError) as error:
        load_task(DataArguments(dataset_name=str(tmp_path / "rows.csv"), test_fraction=0.25, **flags), seed=0)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_known_datasets_keep_their_task(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "".join(f"s {i}\t{i % 2}\n" for i in range(8)))
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\ns 3\t1\nnew\t0\n")
    arguments = DataArguments(dataset_name="sst2", data_path=str(tmp_path))
    task = load_task(arguments, seed=0)
    assert task.task_type == "classification" and task.labels == ("negative", "positive")
    assert [e.query for e in task.test] == ["s 3", "new"] and "s 3" not in [e.query for e in task.train]
    assert any("1 training rows also stand in the test rows" in note for note in task.notes)
    assert "training rows by label: negative 4, positive 3" in task.notes
    # Validation comes from the training rows; the test stays whole.
    arguments.validation_fraction = 0.25
    with_validation = load_task(arguments, seed=0, with_validation=True)
    assert with_validation.test == task.test and len(with_validation.validation) == 2
    with pytest.raises(InputError, match="sst2 is classification"):
        load_task(DataArguments(dataset_name="sst2", data_path=str(tmp_path), task_type="regression"), seed=0)


# ------------------------------------------------------------------------------------- the whole trainer


def test_labels_are_generated_or_scored_by_a_causal_model(train, tiny_model, labelled, tmp_path):
    labelled.write_text(labelled.read_text().replace(",yes", ",True").replace(",no", ",False"))  # words it has read
    data = ["--base_model", tiny_model, "--dataset_name", labelled]
    learns = ["--lr", 1e-2, "--epochs", 30, "--lora_rank", 16, "--lora_alpha", 32, "--save_strategy", "no"]
    learns += ["--prompt_template", "Q: {text_input}", "--test_fraction", 0.2]
    learns += ["--target_modules", "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    train(*learns, "--compare_base", "--run_name", "text", "--max_new_tokens", 4, data=data)
    record = read_metrics(tmp_path / "results/metrics/text.json")["metrics"]
    assert record["base"]["irregular"] > 0.5 * record["rows"]  # the base has never seen the form
    assert sum(record["base"]["irregular_texts"].values()) <= record["base"]["irregular"]
    assert record["accuracy"] >= 0.7
    table = read_predictions(tmp_path / "results/predictions/text.csv")
    outputs = read_model_outputs(tmp_path / "results/model_outputs/text.txt")
    for row, (_, predicted) in zip(outputs, table.iterrows(), strict=True):
        assert read_label(row.output, ("False", "True")) == predicted["prediction"]
    regular = table[table["prediction"] != IRREGULAR]
    likeliest = np.where(regular["prob_True"] > regular["prob_False"], "True", "False")
    assert record["regular_as_scored"] == pytest.approx((likeliest == regular["prediction"]).mean())
    assert record["regular_as_scored"] == 1.0

    # Scored alone: the same probabilities, nothing irregular; the folder knows the question that was asked.
    other = ["--base_model", tiny_model, "--dataset_name", labelled, "--predict_by", "score"]
    again = ["--adapter_path", tmp_path / "adapter", "--do_train", "false"]
    train(*again, "--run_name", "scored", data=other)
    scored = read_predictions(tmp_path / "results/predictions/scored.csv")
    assert len(scored) == len(statement_rows())
    both = table.merge(scored, on="id")
    assert both["prob_True_x"].to_numpy() == pytest.approx(both["prob_True_y"].to_numpy(), abs=1e-5)
    assert set(scored["prediction"]) <= {"True", "False"}
    assert "irregular" not in read_metrics(tmp_path / "results/metrics/scored.json")["metrics"]
