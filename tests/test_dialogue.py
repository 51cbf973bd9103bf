"""Conversations as context, packing, figures of replies, sampled answers: each against a second path."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import parameter_efficient_fine_tuning as program
from bhpeft.adapters import attach_adapter
from bhpeft.arguments import AdapterArguments, DataArguments
from bhpeft.base_model import load_base_model
from bhpeft.errors import InputError
from bhpeft.prediction import check_do_sample, label_log_likelihoods
from bhpeft.results import read_metrics, read_predictions
from bhpeft.tasks import Example, Task, load_task
from bhpeft.tasks.card import TaskCard
from bhpeft.tasks.conversation import DialogueEncoder, later_template
from bhpeft.tasks.dialogue import Reply, exchanges
from bhpeft.tasks.encoding import IGNORED, Collator, Encoder
from bhpeft.tasks.packing import MODEL_TYPES, PackingCollator, check_packing
from bhpeft.tasks.question import make_encoder
from bhpeft.text_scores import distinct, text_figures

TEMPLATE = "User: {text_input}\nAssistant:"
TALK = (("Do cats fly?", "False, no cats ever do that."), ("Do owls sleep?", "True, owls sleep."), ("Do eels?", "No."))
LAST = Reply("r", "Do bees swim in lakes?", "True, bees swim in lakes.", "t", (), TALK)


@pytest.fixture(scope="session")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def encoder_of(tokenizer, length=256, turns=None, **settings):
    return DialogueEncoder(tokenizer, TEMPLATE, length, later=TEMPLATE, context_turns=turns, **settings)


# -------------------------------------------------------------------------------------------------------- context


def test_a_conversation_is_its_exchanges_as_each_is_trained_alone(tokenizer):
    [row] = encoder_of(tokenizer).train_rows([LAST], [])
    alone = Encoder(tokenizer, TEMPLATE, 256)
    pairs = [*TALK, (LAST.query, LAST.answer)]
    parts = [r["input_ids"] for r in alone.train_rows([Example("", q, a, "") for q, a in pairs], [])]
    bos = tokenizer.bos_token_id
    assert all(part[0] == bos and part[-1] == tokenizer.eos_token_id for part in parts)
    assert row["input_ids"] == parts[0] + [token for part in parts[1:] for token in part[1:]]  # begun once
    # The loss is on the last reply and its end alone.
    reply = [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    assert tokenizer.decode(reply) == f" {LAST.answer}</s>" and reply == row["input_ids"][-len(reply) :]


def test_the_last_turns_that_fit_whatever_the_reply(tokenizer):
    encoder = encoder_of(tokenizer)
    sizes = [len(encoder_of(tokenizer, turns=n).encode(LAST)[0]) for n in range(4)]
    assert sizes == sorted(set(sizes))
    whole = encoder.encode(LAST)[0]
    assert len(whole) == sizes[3]
    for kept in range(4):
        for room in (sizes[kept], (sizes[kept + 1] if kept < 3 else 10**6) - 1):
            ids, count = encoder.context(TALK, LAST.query, room)
            assert count == kept and ids[1:] == whole[-sizes[kept] + 1 :] and ids[0] == whole[0]
    assert encoder.context(TALK, LAST.query, 1)[1] == 0  # the message itself is never cut
    # Half of the length is the context's, however long the reply is.
    half = encoder_of(tokenizer, length=2 * sizes[2])
    other = Reply("r", LAST.query, "No. " * 30, "t", (), TALK)
    assert half.encode(LAST)[0] == half.encode(other)[0] and len(half.encode(LAST)[0]) == sizes[2]


def test_exchanges_are_the_turns_at_the_end_that_take_turns():
    p, a = "prompter", "assistant"
    assert exchanges([(p, "1"), (a, "2"), (p, "3"), (a, "4")]) == (("1", "2"), ("3", "4"))
    assert exchanges([(p, "1"), (a, "2"), (a, "3"), (p, "4"), (a, "5")]) == (("4", "5"),)
    assert exchanges([(p, "1"), (a, ""), (p, "3"), (a, "4")]) == (("3", "4"),)
    assert exchanges([(p, "1")]) == exchanges([]) == exchanges([(a, "1"), (p, "2")]) == ()


def test_the_tokenizers_own_chat_template_over_several_turns(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% if m['role'] == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    from bhpeft.tasks.templates import resolve_template

    first = resolve_template("chat", None, tokenizer)
    encoder = DialogueEncoder(tokenizer, first, 256, later=later_template("chat", first, tokenizer))
    turns = [(role, text) for pair in TALK for role, text in zip(("user", "assistant"), pair, strict=True)]
    turns.append(("user", LAST.query))
    whole = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns], tokenize=False, add_generation_prompt=True
    )
    # Ours puts a space before an answer, as everywhere: prompts end without one.
    made = tokenizer.decode(encoder.encode(LAST)[0]).removeprefix(tokenizer.bos_token)
    assert made.replace("[assistant] ", "[assistant]") == whole


# -------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_packed_rows_give_the_loss_and_gradients_of_rows_alone(kind):
    shape = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2} if kind in ("llama", "mistral", "qwen2") else {}
    config = AutoConfig.for_model(kind, intermediate_size=64, **shape, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    model = attach_adapter(base, AdapterArguments(adapter_name="hybrid", prefix_length=3), "x").train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.3)
    random = np.random.default_rng(0)
    rows = [{"input_ids": random.integers(3, 90, n).tolist()} for n in (9, 4, 14)]
    rows = [{**row, "labels": [IGNORED] * 2 + row["input_ids"][2:]} for row in rows]
    rows[1]["labels"] = list(rows[1]["input_ids"])  # the first token of a row that is trained on whole is not foreseen
    found = []
    for collator in (Collator(0), PackingCollator(0)):
        model.zero_grad()
        loss = model(**collator(rows)).loss
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in trained]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found[0][1], found[1][1], strict=True))
    packed = PackingCollator(0)(rows)
    packed["position_ids"] = torch.arange(27)[None]  # without the borders it is another loss
    assert abs(model(**packed).loss.item() - found[0][0]) > 1e-3


def test_packing_and_sampling_are_refused_where_they_cannot_be():
    def check(adapter="hybrid", kind="llama", bayesian=False, head=False):
        data = SimpleNamespace(packing=True)
        run = SimpleNamespace(data=data, adapter=SimpleNamespace(adapter_name=adapter))
        check_packing(run, SimpleNamespace(model_type=kind), bayesian, head)

    check()
    for wrong in ({"adapter": "prompt-tuning"}, {"kind": "opt"}, {"bayesian": True}, {"head": True}):
        with pytest.raises(InputError, match="--packing"):
            check(**wrong)
    labelled = Task("t", [], [], [], "classification", ("a", "b"))
    with pytest.raises(InputError, match="--do_sample"):
        check_do_sample(DataArguments(do_sample=True), labelled)
    for wrong in ({"temperature": 0}, {"top_p": 1.5}, {"top_k": -1}, {"context_turns": -1}):
        with pytest.raises(InputError, match=f"--{next(iter(wrong))}"):
            DataArguments(**wrong)


# -------------------------------------------------------------------------------------------------------- figures


def test_perplexity_of_replies_equals_a_plain_computation_token_by_token(tiny_model, tokenizer):
    """With context, a reply at a time, without padding; the prompts' tokens never counted."""
    model = attach_adapter(
        load_base_model(str(tiny_model)), AdapterArguments(adapter_name="hybrid", prefix_length=4), str(tiny_model)
    ).eval()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ("gate" in name or not parameter.any()):
            torch.nn.init.normal_(parameter, std=0.3)
    encoder = encoder_of(tokenizer, length=120)
    replies = [LAST, Reply("s", "Do ants?", "Yes.", "u", (), TALK[:1]), Reply("v", "Do cows fly?", "No cow.", "u")]
    rows = encoder.test_rows(replies, [])
    batch = Collator(tokenizer.pad_token_id)(rows)
    log_p = label_log_likelihoods(model, batch["input_ids"], batch["attention_mask"], batch["label_ids"])[:, 0]
    tokens = [len(row["label_ids"][0]) for row in rows]
    found = text_figures([], [], log_p.numpy(), tokens, generated=False)

    total, count = 0.0, 0
    for row in rows:
        ids = list(row["input_ids"])
        for token in row["label_ids"][0]:
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            total -= float(logits[token] - logits.logsumexp(0))
            count += 1
            ids.append(token)
    assert count == sum(tokens) > 15
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(-log_p.sum().item() / count), rel=1e-6)


def test_bleu_chrf_and_distinct_n_and_their_intervals():
    random = np.random.default_rng(1)
    words = "the cat sat on a mat and owls fly over lakes".split()
    references = [" ".join(random.choice(words, 8)) for _ in range(24)]
    texts = [" ".join(random.choice(reference.split(), 6, replace=False)) for reference in references]
    log_p, tokens = -random.uniform(5, 40, 24), random.integers(4, 12, 24)
    found = text_figures(texts, references, log_p, tokens)
    assert found["bleu"] == BLEU().corpus_score(texts, [references]).score
    assert found["chrf"] == CHRF().corpus_score(texts, [references]).score
    assert "smooth:exp" in found["bleu_signature"] and "nc:6" in found["chrf_signature"]
    # A resample's score is that of the corpus it draws: the whole interval by sacrebleu itself, row by row.
    drawn = np.random.default_rng(0).integers(24, size=(1000, 24))
    some = np.sort([CHRF().corpus_score([texts[i] for i in d], [[references[i] for i in d]]).score for d in drawn[:60]])
    low, high = found["chrf_interval_95"]
    assert low <= found["chrf"] <= high and some[2] < low + 3 and some[-3] > high - 3
    ratio = np.sort([-(log_p[d].sum() / tokens[d].sum()) for d in drawn])
    assert found["perplexity_interval_95"] == pytest.approx(np.exp(np.quantile(ratio, [0.025, 0.975])), rel=0.03)
    # Rows of one conversation are drawn together: four times the same row tells no more than once.
    four = [x for x in range(24) for _ in range(4)]
    both = [texts[i] for i in four], [references[i] for i in four]
    many = text_figures(*both, log_p[four], tokens[four], groups=[str(i) for i in four])
    for name in ("perplexity", "chrf", "mean_words"):  # BLEU's smoothing depends on how many rows there are
        assert many[name] == pytest.approx(found[name])
        assert many[f"{name}_interval_95"] == pytest.approx(found[f"{name}_interval_95"])
    assert distinct(["a b a b", "b c"], 1) == 3 / 6 and distinct(["a b a b", "b c"], 2) == 3 / 4
    assert math.isnan(distinct(["", "a"], 2))


# ---------------------------------------------------------------------------------------------------------- whole


def conversations(file):
    """Trees of four messages about the toy world, in the hub's columns."""
    from conftest import statement_rows

    rows = statement_rows()
    with open(file, "w", encoding="utf-8") as out:
        for i in range(0, len(rows), 2):
            parent = None
            for j, (question, answer) in enumerate(rows[i : i + 2]):
                for role, said in (("prompter", question), ("assistant", f"Well: {answer}")):
                    message = {"message_id": f"{role}{i}{j}", "parent_id": parent, "message_tree_id": f"t{i}"}
                    out.write(json.dumps({**message, "text": said, "role": role, "lang": "en"}) + "\n")
                    parent = f"{role}{i}{j}"


def run(tmp_path, tiny_model, name, *flags):
    words = ["--base_model", tiny_model, "--dataset_name", "oasst1", "--data_path", tmp_path / "talk.jsonl"]
    words += ["--prompt_template", "{text_input}\n", "--max_length", 120, "--max_new_tokens", 8]
    words += ["--adapter_name", "hybrid", "--max_steps", 3, "--lr", 1e-2, "--save_strategy", "no"]
    words += ["--test_fraction", 0.2, "--run_name", name, "--results_dir", tmp_path / "results"]
    program.main([str(word) for word in (*words, "--output_dir", tmp_path / name, *flags)])
    return read_metrics(tmp_path / f"results/metrics/{name}.json"), read_predictions(
        tmp_path / f"results/predictions/{name}.csv"
    )


def test_a_file_to_test_on_takes_no_conversation_from_training_and_leaves_no_message_in_it(tokenizer, tmp_path):
    conversations(tmp_path / "talk.jsonl")
    known = load_task(DataArguments(dataset_name="oasst1", data_path=str(tmp_path / "talk.jsonl")), 0)
    later = next(example for example in known.train if example.history)
    (tmp_path / "asked.csv").write_text(f'text_input,text_label\n{later.query},"Well: yes"\n')
    data = DataArguments(
        dataset_name="oasst1", data_path=str(tmp_path / "talk.jsonl"), test_file=str(tmp_path / "asked.csv"),
        prompt_template="{text_input}\n",
    )  # fmt: skip
    task = load_task(data, 0)
    queries = {example.query for example in task.train} | {q for e in task.train for q, _ in e.history}
    assert task.train and later.query not in queries and later.group not in {example.group for example in task.train}
    encoder = make_encoder(tokenizer, data, task, with_head=False)
    follows = next(example for example in task.train if example.history)
    [row] = encoder.train_rows([follows], [])
    assert follows.history[-1][1] in tokenizer.decode(row["input_ids"])  # what was said before is still its context
    assert len(encoder.test_rows(task.test, [])) == 1


def test_a_run_tells_base_and_adapter_greedy_and_sampled(tiny_model, tmp_path, capsys):
    conversations(tmp_path / "talk.jsonl")
    sampled = ["--do_sample", "true", "--temperature", 1.5, "--compare_base"]
    record, table = run(tmp_path, tiny_model, "one", *sampled)
    said = capsys.readouterr().out
    figures = record["metrics"]
    assert figures["rows"] == 14 and {"bleu", "chrf", "distinct_2", "mean_words"} <= set(figures)
    assert {"sampled_bleu", "sampled_chrf_interval_95", "sampled_distinct_1"} <= set(figures["base"])
    assert figures["base"]["perplexity"] != figures["perplexity"] and figures["bleu_signature"] in said
    assert list(table["prediction"]) != list(table["sampled"])
    # The same again: sampling is seeded. Without it, and packed, the same is learned and greedily answered.
    again, drawn = run(tmp_path, tiny_model, "two", *sampled)
    assert list(drawn["sampled"]) == list(table["sampled"])
    plain, greedy = run(tmp_path, tiny_model, "three", "--packing", "true")
    assert "sampled" not in greedy and list(greedy["prediction"]) == list(table["prediction"])
    assert plain["metrics"]["perplexity"] == pytest.approx(figures["perplexity"], rel=1e-4)
    card = TaskCard.read(tmp_path / "one")
    assert card.later_template == "{text_input}\n" and card.context_turns is None
    # Without the conversation before it, a reply is foreseen otherwise.
    alone, _ = run(tmp_path, tiny_model, "four", "--context_turns", 0)
    assert alone["metrics"]["perplexity"] != pytest.approx(plain["metrics"]["perplexity"], rel=1e-3)
