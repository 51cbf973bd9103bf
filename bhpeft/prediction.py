"""Answers of a model: generated text, and how probable each label was as the opening of the answer.

Both run on every rank at once: under ZeRO-3 a rank that skips a forward pass leaves the others waiting.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from bhpeft.adapters.sites import prefix_kept
from bhpeft.errors import InputError
from bhpeft.report.answered import Answered
from bhpeft.results import ModelOutput
from bhpeft.tasks import Example, Task
from bhpeft.tasks.encoding import IGNORED, Encoder
from bhpeft.tasks.head_encoding import HeadEncoder


@dataclass
class Answers:
    """What the model answered to test rows, in their order, complete on every rank.

    Attributes:
        index: (N,) which example each row is.
        tokens: (N, max_new_tokens) generated token ids, or None where nothing is generated.
        scores: (N, C) log-likelihoods of the row's `label_ids`, or the logits of the model's own head.
        samples: (N, S, C) the same under S weights drawn from the posterior, or None.
        drawn: (N, max_new_tokens) as `tokens`, sampled, or None.
        distances: (N,) from the training rows (`feature_distance.py`), or None.
    """

    index: np.ndarray
    tokens: np.ndarray | None
    scores: np.ndarray
    samples: np.ndarray | None = None
    drawn: np.ndarray | None = None
    distances: np.ndarray | None = None


def greedy_config(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, end_id: int | None = None
) -> GenerationConfig:
    """Greedy decoding up to the answer's end, whatever sampling the base model's own settings ask for.

    Args:
        end_id: the token that ends an answer beside the end-of-sequence token.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, tokenizer.eos_token_id if end_id is None else end_id}),
        bos_token_id=tokenizer.bos_token_id,
    )


def check_do_sample(arguments, task: Task) -> None:
    """Raise `InputError` where `--do_sample` is asked for and answers are no free text.

    Args:
        arguments: a `DataArguments`.
    """
    if arguments.do_sample and (task.task_type != "generation" or task.labels or arguments.predict_by != "generate"):
        raise InputError("--do_sample: is for answers of free text; here they are labels or scores, so leave it out")


def sampling_config(
    config: GenerationConfig, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> GenerationConfig:
    """The same as a configuration of `greedy_config`, but for tokens being sampled.

    Args:
        temperature: what the logits are divided by.
        top_k: only the k likeliest tokens; 0 for all.
        top_p: only the likeliest tokens that together have this probability.
    """
    sampled = copy.deepcopy(config)
    # transformers refuses a temperature that is an int, and a slider in a browser gives 2 for 2.0.
    sampled.update(do_sample=True, temperature=float(temperature), top_k=int(top_k), top_p=float(top_p))
    return sampled


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers by a seed for the length of the block; the states are as before afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def generate(
    model: PeftModel | PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    config: GenerationConfig,
    **further,
) -> torch.Tensor:
    """Generate answers to left-padded prompts.

    Args:
        input_ids, attention_mask: (B, L), padded on the left.
        config: as of `greedy_config` or `sampling_config`.
        further: arguments of transformers' `generate`, such as a streamer.

    Returns:
        (B, max_new_tokens) token ids of the answers alone, filled up with the padding token.
    """
    synced = is_deepspeed_zero3_enabled()  # ranks whose answers are done go on with the others' forward passes
    arguments = {"attention_mask": attention_mask, "generation_config": config, "synced_gpus": synced, **further}
    prompts = _virtual_prompts(model, len(input_ids))
    if prompts is None:
        # The weights stay as they are meanwhile, so a prefix is computed once instead of with each token.
        with contextlib.nullcontext() if synced or model.training else prefix_kept(model):
            answer = model.generate(input_ids=input_ids, **arguments)[:, input_ids.shape[1] :]
    else:
        # peft would put the virtual tokens before the padding, so that a row's answer depended on its
        # neighbours' lengths. They go between padding and text, as in training.
        base = model.get_base_model()
        embedded = base.get_input_embeddings()(input_ids)
        inputs, mask = _insert_after_padding(embedded, attention_mask, prompts.to(embedded.dtype))
        answer = base.generate(inputs_embeds=inputs, **{**arguments, "attention_mask": mask})
    missing = config.max_new_tokens - answer.shape[1]
    return torch.nn.functional.pad(answer, (0, missing), value=config.pad_token_id)


def _virtual_prompts(model: PeftModel | PreTrainedModel, batch_size: int) -> torch.Tensor | None:
    """(B, virtual tokens, width) of a prompt-tuned model whose adapter is on, else None."""
    if not isinstance(model, PeftModel) or not model.active_peft_config.is_prompt_learning:
        return None
    if model._adapters_disabled:
        return None
    return model.get_prompt(batch_size=batch_size)


def _insert_after_padding(
    embedded: torch.Tensor, mask: torch.Tensor, prompts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """[pad, text] -> [pad, virtual tokens, text] for left-padded rows of any lengths.

    Args:
        embedded: (B, L, D).
        mask: (B, L), 0 at padding.
        prompts: (B, V, D).

    Returns:
        (B, V + L, D) embeddings and their (B, V + L) mask.
    """
    batch, length, _ = embedded.shape
    virtual = prompts.shape[1]
    padding = length - mask.sum(1, keepdim=True)  # (B, 1)
    # Row order of [prompts, embedded], read so that each row's padding comes first.
    place = torch.arange(virtual + length, device=mask.device).expand(batch, -1)
    order = torch.where(place < padding + virtual, place - padding, place)
    order = torch.where(place < padding, place + virtual, order)
    joined = torch.cat([prompts, embedded], 1)
    mask = torch.cat([mask.new_ones(batch, virtual), mask], 1).gather(1, order)
    return joined.gather(1, order[..., None].expand_as(joined)), mask


@torch.no_grad()
def label_log_likelihoods(
    model: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, label_ids: torch.Tensor
) -> torch.Tensor:
    """Log-likelihood of each label as the continuation of each prompt.

    Args:
        input_ids, attention_mask: (B, L) prompts, padded on the left.
        label_ids: (B, C, T) token ids of C labels, padded with -100.

    Returns:
        (B, C): sum over the label's tokens of log p(token | prompt, tokens before), in float32.
    """
    batch, labels, tokens = label_ids.shape
    length = input_ids.shape[1]
    counts = attention_mask.sum(1)  # (B,) prompt lengths
    # Padding goes to the right, as in training, and the label follows its prompt.
    order = (torch.arange(length, device=input_ids.device) + (length - counts)[:, None]) % length
    text = torch.nn.functional.pad(input_ids.gather(1, order), (0, tokens))
    text = text.repeat_interleave(labels, 0)  # (B * C, L + T)
    counts = counts.repeat_interleave(labels)
    wanted = label_ids.reshape(batch * labels, tokens)
    places = counts[:, None] + torch.arange(tokens, device=text.device)  # where each label token stands
    text = text.scatter(1, places, wanted.clamp(min=0))
    mask = torch.arange(length + tokens, device=text.device) < (counts + (wanted != IGNORED).sum(1))[:, None]
    width = int(mask.sum(1).max())  # the longest prompt need not be the one with the longest label
    before = (places - 1).clamp(max=width - 1)  # (B * C, T), the positions whose logits are wanted
    kept, before = before.unique(return_inverse=True)
    inputs = {"input_ids": text[:, :width], "attention_mask": mask[:, :width].long(), "use_cache": False}
    # Counted from the end, for prompt tuning's virtual tokens come before.
    logits = model(**inputs, logits_to_keep=kept - width).logits  # (B * C, kept, vocabulary)
    before = before[..., None].expand(-1, -1, logits.shape[-1])
    log_p = logits.gather(1, before).float().log_softmax(-1)  # (B * C, T, vocabulary)
    log_p = log_p.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    return log_p.masked_fill(wanted == IGNORED, 0).sum(1).view(batch, labels)


def decode_answers(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]], end_id: int | None = None
) -> list[str]:
    """Text of generated token ids, each cut at its first end-of-sequence token, or that of `end_id`."""
    ends = {tokenizer.eos_token_id, end_id}
    texts = []
    for ids in answers:
        ids = list(itertools.takewhile(lambda token: token not in ends, ids))
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts


def scored_texts(answered: Answered, task: Task) -> list[str]:
    """The answers that follow from scores alone, as text: what predictions hold, of samples by their mean.

    The likeliest label at the answers' temperature, or the number with four decimals; empty where free text was scored.
    """
    if task.task_type == "regression":
        return [f"{value:.4f}" for value in answered.numbers()[0]]
    if task.labels:
        return [task.labels[i] for i in answered.probabilities()[0].argmax(axis=1)]
    return [""] * len(answered.ids)


def read_answers(
    answers: Answers, rows: Sequence[dict], examples: Sequence[Example], task: Task, encoder: Encoder | HeadEncoder
) -> Answered:
    """Answers as reports take them: texts beside the expected ones, and scores in the labels' own units.

    Args:
        rows: as of `encoder.test_rows(examples)`; dropped examples have none.
    """
    examples = [examples[i] for i in answers.index]
    scores, tokens, mean, deviation = np.asarray(answers.scores, dtype=np.float64), None, 0.0, 1.0
    samples = None if answers.samples is None else np.asarray(answers.samples, dtype=np.float64)
    if task.task_type == "regression":
        mean, deviation = encoder.standardiser.mean, encoder.standardiser.deviation
        scores = encoder.standardiser.restore(scores)
        samples = None if samples is None else encoder.standardiser.restore(samples)
    if task.task_type == "generation" and not task.labels:
        tokens = np.array([len(row["label_ids"][0]) for row in rows])
    ids = [example.id for example in examples]
    drawn = None if answers.drawn is None else decode_answers(encoder.tokenizer, answers.drawn, encoder.end_id)
    generated = answers.tokens is not None
    known = {"drawn": drawn, "distances": answers.distances, "groups": [example.group for example in examples]}
    answered = Answered(ids, [], scores, generated, tokens, mean, deviation, samples, **known)
    if generated:
        texts = decode_answers(encoder.tokenizer, answers.tokens, encoder.end_id)
    else:
        texts = scored_texts(answered, task)
    answered.outputs = [ModelOutput(e.query, text, e.answer) for e, text in zip(examples, texts, strict=True)]
    return answered
