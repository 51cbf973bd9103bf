"""The chat: the same tokens as plain generation for every adapter, history, stopping, uncertainty, and the terminal."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from bhpeft.adapters import attach_adapter, prefix_attention
from bhpeft.adapters.bh_peft import gaussian_layers
from bhpeft.adapters.posterior import posterior_noise
from bhpeft.adapters.sites import PrefixUp, prefix_kept
from bhpeft.arguments import AdapterArguments
from bhpeft.base_model import load_base_model
from bhpeft.chat import ChatModel, Decoder
from bhpeft.chat_settings import Settings
from bhpeft.chat_setup import ChatArguments, open_chat
from bhpeft.errors import InputError
from bhpeft.prediction import generate, greedy_config
from bhpeft.tasks.card import TaskCard
from bhpeft.tasks.conversation import DialogueEncoder
from bhpeft.token_uncertainty import token_uncertainty

SMALL = {"prefix_length": 4, "bn_reduction_factor": 8, "lora_rank": 4, "num_virtual_tokens": 4}
ADAPTERS = ("lora", "prompt-tuning", "hybrid", "bh-peft")
GREEDY = Settings(max_new_tokens=12, do_sample=False)
TALK = [("Do cats fly?", "False, no cats ever do that."), ("Do owls sleep?", "True, owls sleep.")]


def adapted(base, name, **settings):
    """An adapter that changes what its base says."""
    torch.manual_seed(3)
    arguments = AdapterArguments(adapter_name=name, **SMALL, **settings)
    model = attach_adapter(load_base_model(str(base)), arguments, str(base))
    for key, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.constant_(parameter, 0.3) if key.endswith(".g") else torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def endless(tiny_model, tmp_path_factory):
    """The tiny model with room for thousands of tokens, which never ends greedily: its end's logit is always 0."""
    folder = tmp_path_factory.mktemp("endless") / "endless-llama"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = 0
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 20_000}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def saved(endless, tmp_path_factory):
    """Folder of a saved BH-PEFT adapter on the endless base, trained on conversations as its card says."""
    folder = tmp_path_factory.mktemp("saved") / "bh"
    adapted(endless, "bh-peft").save_pretrained(folder)
    card = TaskCard("generation", [], False, "{text_input}\n", None, 64, "generate", later_template="{text_input}\n")
    card.write(folder)
    return folder


def chat_of(base, name=None, positions=128, turns=None, **settings):
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = DialogueEncoder(tokenizer, "{text_input}\n", 2**62, later="{text_input}\n", context_turns=turns)
    model = adapted(base, name, **settings) if name else load_base_model(str(base)).eval()
    return ChatModel(model, encoder, str(base), name, None, positions)


# --------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_streamed_tokens_are_those_of_plain_generation_with_and_without_the_adapter(name, tiny_model):
    chat = chat_of(tiny_model, name)
    found = {}
    for on in (True, False):
        answer = chat.ask(TALK, "Do bees fly?", GREEDY, on)
        text = "".join(answer)
        ids = torch.tensor([answer.prompt_ids])
        with chat.switched(on):
            plain = generate(chat.model, ids, torch.ones_like(ids), greedy_config(chat.tokenizer, 12))[0].tolist()
        end = plain.index(1) if 1 in plain else len(plain)
        assert answer.ids == plain[:end] and not answer.stopped
        assert text.strip() == answer.text == chat.tokenizer.decode(answer.ids).strip()
        found[on] = answer.ids
    base = load_base_model(str(tiny_model)).eval()
    without = generate(base, ids, torch.ones_like(ids), greedy_config(chat.tokenizer, 12))[0].tolist()
    assert found[False] == without[: len(found[False])]
    if name not in (None, "prompt-tuning"):  # to which this model has one short answer either way
        assert found[True] != found[False]


def test_sampling_is_seeded_and_settings_are_read_strictly(tiny_model):
    chat = chat_of(tiny_model)
    drawn = Settings(max_new_tokens=20, temperature=2.0, top_k=0, top_p=1.0, seed=5)
    texts = ["".join(chat.ask((), "Do bees fly?", s)) for s in (drawn, drawn, drawn.changed("seed", "6"))]
    assert texts[0] == texts[1] != texts[2]
    assert chat.default_settings().max_new_tokens == 32  # a quarter of 128 positions
    changed = GREEDY.changed("do_sample", "TRUE").changed("seed", "none").changed("top_p", "0.5")
    assert (changed.do_sample, changed.seed, changed.top_p) == (True, None, 0.5)
    for name, value, words in (
        ("temperature", "0", "above 0"), ("top_k", "x", "a number"), ("top_p", "2", "at most 1"),
        ("do_sample", "maybe", "true or false"), ("temprature", "1", "Did you mean 'temperature'"),
        ("seed", "-1", "at least 0"), ("max_new_tokens", "0", "at least 1"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=words):
            GREEDY.changed(name, value)


def test_a_long_history_loses_its_front_and_a_long_message_is_refused(tiny_model):
    chat = chat_of(tiny_model)
    history = TALK * 8
    answer = chat.ask(history, "Do bees fly?", GREEDY)
    assert "".join(answer) and 0 < answer.dropped < 16 and len(answer.prompt_ids) <= 128 - 12
    kept = chat.ask(history[answer.dropped :], "Do bees fly?", GREEDY)
    assert list(kept) and kept.dropped == 0 and kept.prompt_ids == answer.prompt_ids
    with pytest.raises(InputError, match="the message has .* tokens, and the base model's positions leave 116"):
        chat.ask((), "Do bees fly? " * 60, GREEDY)
    chat = chat_of(tiny_model, turns=1)
    assert chat.ask(history, "Do bees fly?", GREEDY).dropped == 0  # what is not asked for is not missed


def test_an_answer_is_stopped_and_the_next_one_is_whole(endless):
    chat = chat_of(endless, positions=20_000)
    answer = chat.ask((), "Do bees fly?", Settings(max_new_tokens=10_000, do_sample=False))
    for count, _ in enumerate(answer):
        if count == 3:
            answer.stop()
    assert answer.stopped and 4 <= len(answer.ids) < 2000 and answer.text
    answer._thread.join(5)
    assert not answer._thread.is_alive()
    again = chat.ask((), "Do bees fly?", GREEDY)
    assert "".join(again) and again.ids[: len(answer.ids)] == answer.ids[:12]
    # Whoever no longer listens stops it as well; an error in the model comes out where the answer is read.
    left = chat.ask((), "Do bees fly?", Settings(max_new_tokens=10_000, do_sample=False))
    pieces = iter(left)
    next(pieces)
    pieces.close()
    left._thread.join(5)
    assert not left._thread.is_alive()
    chat.model.forward = None
    with pytest.raises(TypeError):
        list(chat.ask((), "Do bees fly?", GREEDY))


def test_pieces_make_the_text_whatever_tokens_split(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    text = "Do owls 日本 fly? 🦉é\n\n  no…"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    decoder = Decoder(tokenizer, {1})
    pieces = [decoder.add(token) for token in ids]
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert "" in pieces and not any("\ufffd" in piece for piece in pieces)


# ------------------------------------------------------------------------------------------- the prefix, kept


@pytest.mark.parametrize("start", ["identity", "random"])
def test_a_kept_prefix_gives_the_same_tokens_and_is_made_once(start, tiny_model, monkeypatch):
    model = adapted(tiny_model, "bh-peft", prefix_start=start)
    made = []
    forward = PrefixUp.forward
    monkeypatch.setattr(PrefixUp, "forward", lambda self, *args: made.append(1) or forward(self, *args))
    ids = torch.randint(3, 350, (3, 9), generator=torch.Generator().manual_seed(0))
    config = greedy_config(AutoTokenizer.from_pretrained(tiny_model), 10)

    def plainly(count=3):
        """By forward passes without a cache, in which nothing is kept; padded behind the end."""
        text = ids[:count]
        for _ in range(10):
            text = torch.cat([text, model(input_ids=text).logits[:, -1].argmax(-1, keepdim=True)], 1)
        made = text[:, 9:]
        return made.masked_fill((made == 1).cumsum(1) - (made == 1).long() > 0, 2)

    with torch.no_grad():
        expected = plainly()
        made.clear()
        assert torch.equal(generate(model, ids, torch.ones_like(ids), config), expected)
        assert len(made) == 2  # once a layer
        # Other weights, another size of batch, samples of the weights: made anew.
        for name, parameter in model.named_parameters():
            if "bh_source" in name or "bh_prefix" in name:
                parameter.mul_(-1.5) if not name.endswith(".g") else None
        other = plainly()
        assert not torch.equal(other, expected)
        assert torch.equal(generate(model, ids, torch.ones_like(ids), config), other)
        assert torch.equal(generate(model, ids[:1], torch.ones_like(ids[:1]), config), plainly(1))
        with posterior_noise(model, 3, seed=4):
            drawn = plainly()
            assert torch.equal(generate(model, ids, torch.ones_like(ids), config), drawn)
        assert torch.equal(generate(model, ids, torch.ones_like(ids), config), other)
        with prefix_kept(model):
            first = model(input_ids=ids).logits
            with model.disable_adapter():
                off = model(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, first) and not torch.allclose(off, first, atol=1e-3)


def test_the_prefix_matters(tiny_model):
    """The fault of the source project was a prefix that is built and never used."""
    model, ids = adapted(tiny_model, "hybrid"), torch.arange(3, 15)[None]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        for module in model.modules():
            if isinstance(module, PrefixUp):
                module.gate.zero_()
        without = model(input_ids=ids).logits
    assert (whole - without).abs().max() > 0.1
    alone = adapted(tiny_model, "hybrid", sites=["lora"])
    assert prefix_attention.SUPPORTED and alone.config._attn_implementation == "sdpa"


# ----------------------------------------------------------------------------------------------------- uncertainty


def test_token_uncertainty_is_that_of_each_token_by_itself(tiny_model):
    model = adapted(tiny_model, "bh-peft")
    prompt, answer = [0, 40, 41, 42], [50, 51, 60, 3, 80]
    found = token_uncertainty(model, prompt, answer, samples=4, seed=7)
    for t in range(len(answer)):
        ids = torch.tensor([prompt + answer[:t]])
        with torch.no_grad(), posterior_noise(model, 4, 7):
            each = torch.distributions.Categorical(logits=model(input_ids=ids.repeat(4, 1)).logits[:, -1].double())
        mean = torch.distributions.Categorical(probs=each.probs.mean(0))
        assert found.entropy[t] == pytest.approx(mean.entropy().item(), abs=1e-4)
        apart = torch.distributions.kl_divergence(each, mean).mean().item()  # mean KL to the mean: another form
        assert found.mutual_information[t] == pytest.approx(apart, abs=1e-4)
    assert max(found.mutual_information) > 1e-3 and found.vocabulary == 352
    assert all(layer.eps is None for layer in gaussian_layers(model))
    with pytest.raises(ValueError, match="no Gaussian weights"):
        token_uncertainty(adapted(tiny_model, "hybrid"), prompt, answer)


# ---------------------------------------------------------------------------------------------------------- opening


def test_what_cannot_be_talked_to_is_one_line(tiny_model, tiny_encoder, saved, tmp_path):
    wrong = [
        ({}, "--adapter_path: missing"),
        ({"adapter_path": "nowhere"}, "nowhere: no such folder"),
        ({"adapter_path": str(tiny_model)}, "adapter_config.json"),
        ({"adapter_path": str(saved), "base_model": str(tiny_model)}, "trained on base model .*endless"),
        ({"base_model": str(tiny_encoder), "base_only": True}, "cannot generate"),
        ({"adapter_path": str(saved), "prompt_template": "hello"}, "must have {text_input}"),
    ]
    for flags, words in wrong:
        with pytest.raises(InputError, match=words):
            open_chat(ChatArguments(**flags))
    classifier = tmp_path / "head"
    classifier.mkdir()
    for file in saved.iterdir():
        (classifier / file.name).write_bytes(file.read_bytes())
    TaskCard("classification", ["a", "b"], True, "{text_input}", None, 64, "generate").write(classifier)
    with pytest.raises(InputError, match="a head of its own, and writes no text; ask it with demo/classify.py"):
        open_chat(ChatArguments(adapter_path=str(classifier)))


def test_an_adapters_folder_says_how_it_is_spoken_to(saved, endless, tmp_path):
    chat = open_chat(ChatArguments(adapter_path=str(saved)))
    assert (chat.adapter_name, chat.base_name, chat.bayesian) == ("bh-peft", str(endless), True)
    assert chat.encoder.template == chat.encoder.later == "{text_input}\n" and chat.encoder.context_turns is None
    base = open_chat(ChatArguments(adapter_path=str(saved), base_only=True, precision="bf16"))
    assert base.adapter_name is None and base.encoder.template == "{text_input}\n" and not base.bayesian
    assert next(base.model.parameters()).dtype == torch.bfloat16 and "".join(base.ask((), "Do bees fly?", GREEDY))
    # An adapter that was trained on messages alone gets each alone, unless it is asked otherwise.
    card = TaskCard.read(saved)
    card.later_template = None
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    card.write(tmp_path)
    assert open_chat(ChatArguments(adapter_path=str(tmp_path))).encoder.context_turns == 0
    assert open_chat(ChatArguments(adapter_path=str(tmp_path), context_turns=3)).encoder.context_turns == 3


def test_a_4bit_base_is_talked_to(endless, tmp_path):
    pytest.importorskip("bitsandbytes")
    adapted(endless, "hybrid").save_pretrained(tmp_path)
    chat = open_chat(ChatArguments(adapter_path=str(tmp_path), load_in_4bit=True))
    answer = chat.ask((), "Do bees fly?", GREEDY)
    assert "".join(answer) and len(answer.ids) == 12


# --------------------------------------------------------------------------------------------------------- terminal


@pytest.fixture
def terminal(tmp_path):
    pexpect = pytest.importorskip("pexpect", reason="pexpect, which drives a pseudo-terminal, is not installed")
    opened = []

    def open_terminal(*flags):
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}
        words = [str(ROOT / "demo/chat.py"), *map(str, flags)]
        how = {"env": environment, "cwd": str(tmp_path), "encoding": "utf-8", "timeout": 90}
        child = pexpect.spawn(sys.executable, words, preexec_fn=heed_interrupts, **how)
        child.setecho(False)
        opened.append(child)
        return child

    yield open_terminal
    for child in opened:
        child.close(force=True)


def heed_interrupts():
    """A suite that runs in the background of a script hands down that Ctrl-C is ignored; at a terminal it is not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_talking_in_a_terminal(terminal, saved, tmp_path):
    import pexpect  # or the fixture has skipped

    child = terminal("--adapter_path", saved, "--side_by_side", "--greedy", "--max_new_tokens", 12)
    child.expect("bh-peft on .*endless-llama. /help lists commands.")
    child.expect("you> ")
    child.sendline("Do bees fly?")
    child.expect(r"frozen base> (\S.*\S)\s+bh-peft> (\S.*\S)\s+you> ")
    base, adapter = (text.split("\r")[0] for text in child.match.groups())
    assert base != adapter
    for command, words in (
        ("/settings max_new_tokens 10000", "max_new_tokens  10000"),
        ("/settings top_p 7", "error: --top_p 7.0: must be above 0 and at most 1"),
        ("/sav", "error: /sav: no such command. Did you mean '/save'"),
        ("/help", "/reset .*forget"),
        ("/save talk.txt", "Saved as talk.txt"),
        ("/save talk.txt", "error: /save talk.txt: exists; /save talk.txt overwrite replaces it"),
        ("/save talk.txt overwrite", "Saved as talk.txt"),
    ):
        child.sendline(command)
        child.expect(words)
        child.expect("you> ")
    text = (tmp_path / "talk.txt").read_text()
    assert "==== frozen base\nyou> Do bees fly?\nfrozen base> " in text
    assert "==== bh-peft" in text and adapter[:5] in text
    # Ctrl-C stops the answer, and there is still somebody to talk to.
    child.sendline("Do cats fly?")
    child.expect(r"frozen base> \S+ \S+")
    time.sleep(0.3)
    started = time.monotonic()
    child.sendintr()
    child.expect(r"\[stopped\]\s+you> ")
    assert time.monotonic() - started < 20
    for command, words in (("/reset", "conversation is forgotten"), ("/save new.txt", "error: /save: nothing")):
        child.sendline(command)
        child.expect(words)
        child.expect("you> ")
    child.sendline("/settings max_new_tokens 5")
    child.expect("you> ")
    child.sendline("Do bees fly?")
    child.expect(r"bh-peft> \S+")
    child.expect("you> ")
    # At the prompt Ctrl-C ends the program. One that comes after Python wrote the prompt and before it waits for a key
    # is lost (`select` in CPython's readline.c blocks all the same): pressed again, as a person would.
    for _ in range(5):
        child.sendintr()
        if child.expect(["\r\n", pexpect.TIMEOUT], timeout=15) == 0:
            break
    else:
        pytest.fail("Ctrl-C at the prompt does not end the program")
    child.wait()
    assert child.exitstatus == 0


def test_a_missing_adapter_is_one_clear_line(terminal):
    child = terminal("--adapter_path", "nowhere")
    child.expect("error: --adapter_path nowhere: no such folder")
    child.wait()
    assert child.exitstatus == 2 and "Traceback" not in child.before
