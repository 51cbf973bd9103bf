"""Talk to a model: history, prompts, streamed answers that can be stopped. The terminal and the browser share this.

A conversation is put to the model as training put it (tasks/conversation.py): the last exchanges that leave room for an
answer, each in its template. Tokens are handed out one by one as they are generated, with the KV cache, in a thread of
their own; `Answer.stop` ends it after the token at hand. One answer is generated at a time.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from bhpeft.adapters.bh_peft import gaussian_layers
from bhpeft.chat_settings import Settings
from bhpeft.errors import InputError
from bhpeft.prediction import generate, greedy_config, sampling_config
from bhpeft.tasks.conversation import DialogueEncoder

History = Sequence[tuple[str, str]]  # (message, reply) of each exchange, oldest first


class Answer:
    """An answer while it is generated: iterate over it for pieces of text.

    Attributes:
        prompt_ids: what the model was given.
        dropped: how many exchanges, the oldest, there was no room for.
        ids, pieces: tokens so far and what each added to the text; a piece is "" where a character is not complete.
        stopped: whether `stop` cut it short.
    """

    def __init__(self, prompt_ids: list[int], dropped: int, work, decoder: Decoder):
        self.prompt_ids, self.dropped = prompt_ids, dropped
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.stopped = False
        self._decoder = decoder
        self._tokens: queue.SimpleQueue = queue.SimpleQueue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        """The whole answer so far, without spaces around it."""
        return "".join(self.pieces).strip()

    def stop(self) -> None:
        """End the answer after the token at hand."""
        self._stop.set()

    def _run(self, work) -> None:
        try:
            work(_Streamer(self._tokens), StoppingCriteriaList([_Stop(self._stop)]))
            self._tokens.put(None)
        except BaseException as error:  # it belongs to whoever reads the answer
            self._tokens.put(error)

    def __iter__(self) -> Iterator[str]:
        try:
            while True:
                token = self._tokens.get()
                if isinstance(token, BaseException):
                    raise token
                if token is None:
                    self.stopped = self._stop.is_set()
                    return
                if token in self._decoder.ends:
                    continue
                piece = self._decoder.add(token)
                if not "".join(self.pieces).strip():
                    piece = piece.lstrip()
                self.ids.append(token)
                self.pieces.append(piece)
                if piece:
                    yield piece
        except GeneratorExit:  # nobody listens any more
            self._stop.set()
            raise


class Decoder:
    """Tokens -> text, one by one. A token's text depends on those before it, so a few are decoded again each time."""

    def __init__(self, tokenizer, ends: set[int]):
        self.tokenizer, self.ends = tokenizer, ends
        self._ids: list[int] = []
        self._from = self._read = 0

    def add(self, token: int) -> str:
        """What one more token adds; "" while a character is not complete."""
        self._ids.append(token)
        before = self.tokenizer.decode(self._ids[self._from : self._read], skip_special_tokens=True)
        after = self.tokenizer.decode(self._ids[self._from :], skip_special_tokens=True)
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._from, self._read = self._read, len(self._ids)
        return after[len(before) :]


class _Streamer(BaseStreamer):
    """Puts tokens into a queue. transformers' own text streamers hold each word back until the next begins."""

    def __init__(self, tokens: queue.SimpleQueue):
        self._tokens, self._prompt_seen = tokens, False

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_seen:
            self._tokens.put(int(value.reshape(-1)[0]))
        self._prompt_seen = True  # the first call hands over the prompt

    def end(self) -> None:
        pass


class _Stop(StoppingCriteria):
    def __init__(self, event: threading.Event):
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self._event.is_set(), device=input_ids.device)


class ChatModel:
    """A model with or without an adapter, and how it is spoken to.

    Attributes:
        model: a PeftModel, or the base alone.
        encoder: how a conversation becomes tokens.
        adapter_name: None where there is no adapter.
        positions: most tokens of prompt and answer together, virtual ones not counted; None for no limit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: DialogueEncoder,
        base_name: str,
        adapter_name: str | None = None,
        adapter_path: str | None = None,
        positions: int | None = None,
    ):
        self.model, self.encoder, self.tokenizer = model, encoder, encoder.tokenizer
        self.base_name, self.adapter_name, self.adapter_path = base_name, adapter_name, adapter_path
        self.positions = positions
        self.lock = threading.Lock()

    @property
    def bayesian(self) -> bool:
        """Whether the adapter has Gaussian weights."""
        return bool(gaussian_layers(self.model))

    def default_settings(self) -> Settings:
        """`Settings`, with answers that leave most positions to the conversation."""
        longest = Settings.max_new_tokens
        return Settings(max_new_tokens=longest if self.positions is None else max(1, min(longest, self.positions // 4)))

    def prompt(self, history: History, message: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Token ids of the conversation so far, and how many of its oldest exchanges there was no room for.

        Raises:
            InputError: the message alone leaves no room for an answer.
        """
        room = None if self.positions is None else self.positions - max_new_tokens
        ids, kept = self.encoder.context(history, message, 2**62 if room is None else room)
        if room is not None and len(ids) > room:
            raise InputError(
                f"the message has {len(ids)} tokens, and the base model's positions leave {max(room, 0)} beside "
                f"max_new_tokens {max_new_tokens}; shorten it, or lower max_new_tokens"
            )
        turns = self.encoder.context_turns
        return ids, (len(history) if turns is None else min(turns, len(history))) - kept

    def ask(self, history: History, message: str, settings: Settings, adapted: bool = True) -> Answer:
        """Begin to answer a message.

        Args:
            adapted: with the adapter; else the frozen base answers.

        Raises:
            InputError: as `prompt`.
        """
        ids, dropped = self.prompt(history, message, settings.max_new_tokens)
        config = greedy_config(self.tokenizer, settings.max_new_tokens, self.encoder.end_id)
        config.eos_token_id = sorted({*config.eos_token_id, *self.own_ends})
        if settings.do_sample:
            config = sampling_config(config, settings.temperature, settings.top_k, settings.top_p)

        def work(streamer: BaseStreamer, stopping: StoppingCriteriaList) -> None:
            inputs = torch.tensor([ids], device=next(self.model.parameters()).device)
            with self.lock, self.switched(adapted):
                if settings.do_sample:
                    torch.manual_seed(settings.seed) if settings.seed is not None else torch.seed()
                further = {"streamer": streamer, "stopping_criteria": stopping}
                generate(self.model, inputs, torch.ones_like(inputs), config, **further)

        return Answer(ids, dropped, work, Decoder(self.tokenizer, set(config.eos_token_id)))

    @property
    def own_ends(self) -> set[int]:
        """Tokens that end an answer by the base's own generation settings: a chat's turn may end by another token than
        a text does."""
        ends = getattr(self.model.generation_config, "eos_token_id", None)
        return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)

    @contextlib.contextmanager
    def switched(self, adapted: bool) -> Iterator[None]:
        """The adapter on, or off, for the length of the block."""
        if adapted or self.adapter_name is None:
            yield
            return
        with self.model.disable_adapter():
            yield
