"""Examples -> token ids: the prompt is never trained on, the answer ends with end-of-sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from bhpeft.errors import InputError
from bhpeft.tasks.example import Example

IGNORED = -100  # label of a position that takes no part in the loss (torch.nn.CrossEntropyLoss)


@dataclass
class Encoder:
    """Turns examples into rows of token ids.

    Attributes:
        template: text around the input; `{text_input}` stands for it. Spaces at its end are dropped and
            one opens the answer instead, for tokenizers keep a space with the word after it; behind a
            line end the answer follows at once.
        max_length: most tokens of prompt and answer together.
        long_prompts: "error", "truncate" (keep the last half) or "drop" prompts that leave no room.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    max_length: int
    long_prompts: str = "error"

    def prompt(self, example: Example) -> str:
        return self.template.replace("{text_input}", example.query).rstrip(" ")

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids of (prompt, answer), the answer ending with end-of-sequence."""
        prompt_ids = self.tokenizer(self.prompt(example))["input_ids"]
        if prompt_ids and prompt_ids[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id:
            prompt_ids = prompt_ids[:-1]  # some tokenizers end every text; the answer comes first
        return prompt_ids, self.continuation(example, prompt_ids, example.answer) + [self.tokenizer.eos_token_id]

    def continuation(self, example: Example, prompt_ids: list[int], answer: str) -> list[int]:
        """Token ids of an answer that follows the prompt, as the tokenizer splits the whole text."""
        prompt = self.prompt(example)
        answer = answer if prompt.endswith("\n") else f" {answer}"
        whole = self.tokenizer(prompt + answer)["input_ids"]
        if whole and whole[-1] == self.tokenizer.eos_token_id != self.tokenizer.bos_token_id:
            whole = whole[:-1]
        if whole[: len(prompt_ids)] == prompt_ids:
            return whole[len(prompt_ids) :]
        return self.tokenizer(answer, add_special_tokens=False)["input_ids"]  # a merge spans the border

    def train_rows(self, examples: Sequence[Example], notes: list[str]) -> list[dict]:
        """Rows for the loss: `input_ids` and `labels`, of equal length, prompt positions `IGNORED`.

        Raises:
            InputError: prompts leave no room for an answer and `long_prompts` is "error".
        """
        rows, cut = [], 0
        for prompt_ids, answer_ids, _ in self._fitting(examples, notes, "training"):
            ids = (prompt_ids + answer_ids)[: self.max_length]
            cut += len(prompt_ids) + len(answer_ids) > self.max_length
            rows.append({"input_ids": ids, "labels": [IGNORED] * len(prompt_ids) + ids[len(prompt_ids) :]})
        if cut:
            notes.append(f"{cut} of {len(rows)} training answers cut at --max_length {self.max_length} tokens")
        return rows

    def test_rows(self, examples: Sequence[Example], labels: Sequence[str], notes: list[str]) -> list[dict]:
        """Rows to generate from: `input_ids` of the prompt, `label_ids` of each label, `index` of the example.

        Raises:
            InputError: as `train_rows`.
        """
        position = {id(example): i for i, example in enumerate(examples)}
        return [
            {
                "input_ids": prompt_ids,
                "label_ids": [self.continuation(example, prompt_ids, label) for label in labels],
                "index": position[id(example)],
            }
            for prompt_ids, _, example in self._fitting(examples, notes, "test")
        ]

    def _fitting(self, examples: Sequence[Example], notes: list[str], part: str):
        """The encoded examples whose prompt leaves room for an answer, mended as `long_prompts` says."""
        encoded = [(*self.encode(example), example) for example in examples]
        long = [row for row in encoded if len(row[0]) >= self.max_length]
        if not long:
            return encoded
        longest = max(len(prompt_ids) for prompt_ids, _, _ in long)
        what = f"{len(long)} of {len(encoded)} {part} prompts are longer than --max_length {self.max_length} allows"
        if self.long_prompts == "error":
            first = long[0][2]
            raise InputError(
                f"{what} (longest: {longest} tokens; first: row {first.id}, {first.query[:40]!r}); "
                "raise --max_length as far as the base model has positions, or give --long_prompts truncate or drop"
            )
        if self.long_prompts == "drop":
            notes.append(f"{what}: dropped")
            encoded = [row for row in encoded if len(row[0]) < self.max_length]
            if not encoded:
                raise InputError(f"{what}: none is left after --long_prompts drop; raise --max_length")
            return encoded
        keep = max(1, self.max_length // 2)
        notes.append(f"{what}: cut to their last {keep} tokens")
        return [(ids[-keep:] if len(ids) >= self.max_length else ids, answer, e) for ids, answer, e in encoded]


@dataclass
class Collator:
    """Rows -> one batch, padded to its longest row.

    Rows with `labels` are padded on the right. Rows to generate from are padded on the left, so that
    the next token follows the prompt; their `label_ids`, (B, labels, tokens), are padded with `IGNORED`.
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        training = "labels" in rows[0]
        side = "right" if training else "left"
        input_ids = pad([row["input_ids"] for row in rows], self.pad_token_id, side)
        batch = {
            "input_ids": input_ids,
            "attention_mask": pad([[1] * len(row["input_ids"]) for row in rows], 0, side),
        }
        if training:
            batch["labels"] = pad([row["labels"] for row in rows], IGNORED, side)
            return batch
        batch["index"] = torch.tensor([row["index"] for row in rows])
        count = len(rows[0]["label_ids"])
        if count:
            flat = pad([ids for row in rows for ids in row["label_ids"]], IGNORED, "right")
            batch["label_ids"] = flat.view(len(rows), count, -1)
        return batch


def pad(rows: list[list[int]], value: int, side: str) -> torch.Tensor:
    """Stack rows of different lengths, (B, longest), filled up with `value` on `side`."""
    width = max(map(len, rows))
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)])
