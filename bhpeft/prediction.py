"""Answers of a model: generated text, and how probable each label was as the opening of the answer.

Both run on every rank at once: under ZeRO-3 a rank that skips a forward pass leaves the others waiting.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled

from bhpeft.tasks.encoding import IGNORED


def greedy_config(tokenizer: PreTrainedTokenizerBase, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding up to end-of-sequence, whatever sampling the base model's own settings ask for."""
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


@torch.no_grad()
def generate(
    model: PeftModel | PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    config: GenerationConfig,
) -> torch.Tensor:
    """Generate answers to left-padded prompts.

    Args:
        input_ids, attention_mask: (B, L), padded on the left.
        config: as of `greedy_config`.

    Returns:
        (B, max_new_tokens) token ids of the answers alone, filled up with the padding token.
    """
    synced = is_deepspeed_zero3_enabled()  # ranks whose answers are done go on with the others' forward passes
    arguments = {"attention_mask": attention_mask, "generation_config": config, "synced_gpus": synced}
    prompts = _virtual_prompts(model, len(input_ids))
    if prompts is None:
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
    logits = model(input_ids=text, attention_mask=mask.long()).logits
    logits = logits[:, -(length + tokens) :]  # prompt tuning's virtual tokens come before
    before = (places - 1)[..., None].expand(-1, -1, logits.shape[-1])
    log_p = logits.gather(1, before).float().log_softmax(-1)  # (B * C, T, vocabulary)
    log_p = log_p.gather(2, wanted.clamp(min=0)[..., None])[..., 0]
    return log_p.masked_fill(wanted == IGNORED, 0).sum(1).view(batch, labels)


def decode_answers(tokenizer: PreTrainedTokenizerBase, answers: Sequence[Sequence[int]]) -> list[str]:
    """Text of generated token ids, each cut at its first end-of-sequence token."""
    texts = []
    for ids in answers:
        ids = list(ids)
        if tokenizer.eos_token_id in ids:
            ids = ids[: ids.index(tokenizer.eos_token_id)]
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts
