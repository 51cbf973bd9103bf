"""Whole conversations as context: the last exchanges that fit, each written as it would be trained on alone.

    [template(u1) a1 end] [later(u2) a2 end] ... later(u_n)  ->  a_n end

Every exchange keeps the tokens it has by itself, so that a chat's history is made of the tokens that training saw, and
what is left out at the front changes nothing behind it. The loss is on the last reply alone: each reply of a tree is an
example of its own, and is so trained on once, however many conversations run through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from bhpeft.tasks.dialogue import Reply
from bhpeft.tasks.encoding import Encoder
from bhpeft.tasks.example import Example

# What stands around a later message, where it is not what stands around the first: the instruction is given once.
LATER = {
    "instruction": "### Input:\n{text_input}\n\n### Response:\n",
    "llama2": "[INST] {text_input} [/INST]",
}


def later_template(name: str, first: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text around every message but the first of a conversation.

    Args:
        name: a name of `templates.TEMPLATES`, or the text itself.
        first: the text around the first message, resolved.
    """
    if name != "chat":
        return LATER.get(name, first)
    turns = [("user", "first"), ("assistant", "{answer}"), ("user", "{text_input}")]
    turns = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    # The answer's own end is a token of the answer.
    return text.partition("{answer}")[2].strip(" ").removeprefix(tokenizer.eos_token or "")


@dataclass
class DialogueEncoder(Encoder):
    """An encoder whose prompts begin with the exchanges before the message.

    Attributes:
        later: text around every message but the first.
        context_turns: most exchanges before the message; None for as many as fit.
    """

    later: str = "{text_input}"
    context_turns: int | None = None

    def prompt(self, example: Example) -> str:
        """The last message in its template; what stands before it are tokens, see `context`."""
        template = self.later if getattr(example, "history", ()) else self.template
        return template.replace("{text_input}", example.query).rstrip(" ")

    def encode(self, example: Example) -> tuple[list[int], list[int]]:
        """Token ids of (context and message, reply).

        The context takes at most half of `max_length` with the message, whatever the reply's own length is, which a
        test row must not give away.
        """
        prompt_ids, answer_ids = super().encode(example)
        if not getattr(example, "history", ()):
            return prompt_ids, answer_ids
        return self.context(example.history, example.query, self.max_length - self.max_length // 2)[0], answer_ids

    def context(self, history: Sequence[tuple[str, str]], message: str, room: int) -> tuple[list[int], int]:
        """Token ids of a message behind the last exchanges that fit.

        Args:
            history: (message, reply) of the exchanges before, oldest first.
            room: most tokens of all; the message itself is never cut.

        Returns:
            The ids, and how many exchanges of `history` are in them.
        """
        most = len(history) if self.context_turns is None else min(self.context_turns, len(history))
        best, kept = self._piece(message, None, True), 0
        tail = self._piece(message, None, False)
        for count in range(1, most + 1):
            exchange = history[-count]
            ids = self._piece(*exchange, True) + tail
            if len(ids) > room:
                break
            best, kept = ids, count
            tail = self._piece(*exchange, False) + tail
        return best, kept

    def _piece(self, message: str, reply: str | None, opens: bool) -> list[int]:
        """Ids of one exchange, or of a message alone where there is no reply; `opens`: nothing stands before it."""
        example = Reply("", message, reply or "", "", history=() if opens else (("", ""),))
        prompt_ids, answer_ids = Encoder.encode(self, example)
        bos = self.tokenizer.bos_token_id
        if not opens and len(prompt_ids) > 1 and prompt_ids[0] == bos is not None:
            prompt_ids = prompt_ids[1:]
        return prompt_ids if reply is None else prompt_ids + answer_ids
