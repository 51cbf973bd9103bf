"""Generation and label scores: padding changes nothing, and the scores are the chain rule's."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bhpeft.adapters import attach_adapter
from bhpeft.arguments import AdapterArguments
from bhpeft.base_model import load_base_model
from bhpeft.prediction import (
    Answers,
    decode_answers,
    generate,
    greedy_config,
    label_log_likelihoods,
    read_answers,
)
from bhpeft.report import report_for
from bhpeft.tasks import Example, Task
from bhpeft.tasks.encoding import Collator, Encoder


@pytest.fixture(params=["none", "lora", "prompt-tuning"])
def model(request, tiny_model):
    base = load_base_model(str(tiny_model)).eval()
    if request.param == "none":
        return base
    torch.manual_seed(1)
    adapted = attach_adapter(base, AdapterArguments(adapter_name=request.param), str(tiny_model)).eval()
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3 if "lora" in name else 0.05)
    return adapted


@pytest.fixture
def batch_of(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)

    def make(*queries, labels=("True", "False, no cats")):
        encoder = Encoder(tokenizer, "{text_input}", 64, labels=labels)
        rows = encoder.test_rows([Example(str(i), q, "True", q) for i, q in enumerate(queries)], [])
        return tokenizer, rows, Collator(tokenizer.pad_token_id)(rows)

    return make


QUERIES = ("Do cats sleep?", "Do cats and dogs and owls and eels swim in lakes at dawn?", "Do?")


def test_a_batch_answers_as_each_row_alone(model, batch_of):
    tokenizer, rows, batch = batch_of(*QUERIES)
    config = greedy_config(tokenizer, 10)
    together = generate(model, batch["input_ids"], batch["attention_mask"], config)
    assert together.shape == (3, 10)
    for i, row in enumerate(rows):
        ids = torch.tensor([row["input_ids"]])
        alone = generate(model, ids, torch.ones_like(ids), config)
        assert torch.equal(alone[0], together[i])


def test_greedy_generation_is_the_argmax_of_plain_forward_passes(model, batch_of):
    tokenizer, rows, _ = batch_of(QUERIES[0])
    config = greedy_config(tokenizer, 6)
    ids = torch.tensor([rows[0]["input_ids"]])
    answer = generate(model, ids, torch.ones_like(ids), config)[0].tolist()
    for token in answer:
        expected = model(input_ids=ids).logits[0, -1].argmax().item()
        assert token == expected
        if token == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


OWN = (
    {"repetition_penalty": 1.8},
    {"no_repeat_ngram_size": 1},
    {"num_beams": 4},
    {"suppress_tokens": [*range(3, 300)]},
)


@pytest.mark.parametrize("own", OWN, ids=[next(iter(own)) for own in OWN])
def test_greedy_is_greedy_whatever_the_base_says_of_generation(own, tiny_model, batch_of, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "base")
    GenerationConfig(**own, eos_token_id=[1, 7], bos_token_id=0, pad_token_id=2).save_pretrained(folder)
    tokenizer, _, batch = batch_of(*QUERIES)
    config = greedy_config(tokenizer, 10)
    config.min_new_tokens = 10
    prompts = batch["input_ids"], batch["attention_mask"]
    base = load_base_model(str(folder)).eval()
    plain = generate(load_base_model(str(tiny_model)).eval(), *prompts, config)
    assert generate(base, *prompts, config).tolist() == plain.tolist()
    assert base.generation_config.eos_token_id == [1, 7]  # where a chat's turn may end
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert generate(stock, *prompts, config).tolist() != plain.tolist()  # so it would have mattered


def test_label_scores_follow_the_chain_rule(model, batch_of):
    _, rows, batch = batch_of(*QUERIES)
    scores = label_log_likelihoods(model, batch["input_ids"], batch["attention_mask"], batch["label_ids"])
    for i, row in enumerate(rows):
        for c, label in enumerate(row["label_ids"]):
            total, ids = 0.0, list(row["input_ids"])
            for token in label:
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
                total += logits.log_softmax(-1)[token].item()
                ids.append(token)
            assert scores[i, c].item() == pytest.approx(total, abs=1e-3)


def test_virtual_tokens_change_the_answers_distribution(tiny_model, batch_of):
    """The prompt is really used when scoring and generating, not only trained."""
    _, _, batch = batch_of(*QUERIES)
    inputs = batch["input_ids"], batch["attention_mask"], batch["label_ids"]
    base = load_base_model(str(tiny_model)).eval()
    plain = label_log_likelihoods(base, *inputs)
    adapted = attach_adapter(base, AdapterArguments(adapter_name="prompt-tuning"), str(tiny_model)).eval()
    assert (label_log_likelihoods(adapted, *inputs) - plain).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.allclose(label_log_likelihoods(adapted, *inputs), plain, atol=1e-5)


def test_answers_are_cut_at_end_of_sequence(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(" True, cats sleep.", add_special_tokens=False)["input_ids"]
    texts = decode_answers(tokenizer, [ids + [tokenizer.eos_token_id] + ids, ids + [tokenizer.pad_token_id] * 3])
    assert texts == ["True, cats sleep."] * 2


def test_texts_of_scored_answers_are_what_the_samples_say():
    """The point scores say otherwise; what predictions hold is the mean over samples."""
    examples = [Example("0", "q", "b", "g"), Example("1", "r", "a", "g")]
    task = Task("t", examples, [], examples, "classification", ("a", "b"))
    samples = np.array([[[3.0, 0.0], [0.0, 1.0], [0.0, 1.2]], [[2.0, 0.0]] * 3])  # mean of softmaxes: 0.484, 0.516
    answers = Answers(np.arange(2), None, np.array([[1.0, 0.0], [0.0, 1.0]]), samples)
    answered = read_answers(answers, [{}, {}], examples, task, None)
    table = report_for(task).predictions(answered, task)
    assert [row.output for row in answered.outputs] == table["prediction"].tolist() == ["b", "a"]

    examples = [Example("0", "q", "1.0", "g")]
    task = Task("t", examples, [], examples, "regression")
    encoder = SimpleNamespace(standardiser=SimpleNamespace(mean=10.0, deviation=2.0, restore=lambda x: 10 + 2 * x))
    answers = Answers(np.arange(1), None, np.array([[0.0]]), np.array([[[1.0], [2.0]]]))
    answered = read_answers(answers, [{}], examples, task, encoder)
    table = report_for(task).predictions(answered, task)
    assert answered.outputs[0].output == "13.0000" and table["prediction"].tolist() == [13.0]
