"""OpenAssistant conversations (oasst1): trees of messages -> a prompter's message, one reply, and what came before.

Source: Köpf et al. 2023, "OpenAssistant Conversations", arXiv 2304.07327. The messages come nested in trees
(`*.trees.jsonl.gz`), or as a list of messages that name their parents (`*.messages.jsonl.gz`, and the hub). Both
give the same pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bhpeft.errors import InputError
from bhpeft.tasks.example import Example
from bhpeft.tasks.layouts import Row, column, json_lines, names_in, text

ROLES = ("prompter", "assistant")


class Message(NamedTuple):
    """One message; `parent` is None at the root of a tree."""

    id: str
    parent: str | None
    tree: str | None  # None where the file does not name it; it is the root's id then
    role: str
    row: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Reply(Example):
    """A reply: `query` is the message it answers, `history` the (message, reply) of the exchanges before, in order."""

    history: tuple[tuple[str, str], ...] = ()


class Pair(NamedTuple):
    """A prompter's message, one reply to it, and what was said before: (role, text) of each turn, root first."""

    id: str  # the reply's message id
    tree: str
    history: tuple[tuple[str, str], ...]
    prompt: str
    reply: str


def oasst1(folder: Path, split: str) -> Iterator[Row] | None:
    """The messages of a .jsonl or .jsonl.gz file, nested or flat, in the hub's columns.

    Args:
        folder: the file, or the folder it stands in. Of several files there, the one whose name holds "tree" is
            read, for the others hold the same messages.
        split: "train" gives all messages; for "test" there is none in this distribution.

    Returns:
        The rows, or None for "test": hold out trees of the training rows then.

    Raises:
        InputError: no such file, or several that could be meant.
    """
    if split == "test":
        return None
    return _messages(_the_file(folder))


def _the_file(folder: Path) -> Path:
    if folder.is_file():
        files = [folder]
    else:
        files = sorted(file for pattern in ("*.jsonl", "*.jsonl.gz") for file in folder.glob(pattern))
        if not files:
            raise InputError(f"--data_path {folder}: no .jsonl or .jsonl.gz there ({names_in(folder)})")
    trees = [file for file in files if "tree" in file.name]
    if len(trees) != 1 and len(files) != 1:
        raise InputError(
            f"--data_path {folder}: several files could be meant ({names_in(folder)}); give one of them as --data_path"
        )
    file = trees[0] if len(trees) == 1 else files[0]
    if file.stat().st_size == 0:
        raise InputError(f"{file}: is empty; fetch the file again")
    return file


def _messages(file: Path) -> Iterator[Row]:
    for where, row in json_lines(file):
        if "prompt" in row:
            yield from _flattened(column(row, "prompt", where), None, row.get("message_tree_id"), where)
        else:
            yield from _flattened(row, None, row.get("message_tree_id"), where)


def _flattened(message: Any, parent: str | None, tree: str | None, where: str) -> Iterator[Row]:
    """A message and all its replies, each with its parent and tree, in the order of the file."""
    if not isinstance(message, dict):
        raise InputError(f"{where}: a message is {message!r:.40} instead of an object; mend or remove this line")
    row = {name: value for name, value in message.items() if name != "replies"}
    row["parent_id"] = message.get("parent_id") or parent
    row["message_tree_id"] = message.get("message_tree_id") or tree
    yield where, row
    for reply in message.get("replies") or []:
        yield from _flattened(reply, row.get("message_id"), row["message_tree_id"], where)


def preceding_turns(message: Message, messages: dict[str, Message]) -> list[Message] | None:
    """The messages above one, root first; None where a parent is unknown or the parents form a circle."""
    above: list[Message] = []
    seen = {message.id}
    while message.parent is not None:
        if message.parent in seen or message.parent not in messages:
            return None
        message = messages[message.parent]
        seen.add(message.id)
        above.append(message)
    return above[::-1]


def read_pairs(rows: Iterable[Row], name: str, notes: list[str], language: str = "en") -> list[Pair]:
    """Pair each reply with the message it answers.

    A pair is left out where either message is in another language, deleted or synthetic (written by a model), and
    where a message above it is not in the data. Earlier turns may be deleted or synthetic. Messages that failed
    review are kept. Everything left out is counted in `notes`.

    Args:
        rows: messages in the hub's columns; only `message_id`, `parent_id`, `text` and `role` must be there.
        name: what the notes call the data.
        notes: gets a line for each kind of thing left out.
        language: the code both messages must have as `lang`.

    Returns:
        The pairs in the order of the replies, each with the turns before it.

    Raises:
        InputError: a message without id or text, with another role, or with an id met before.
    """
    messages = _indexed(rows)
    pairs, dropped, failed = [], Counter(), 0
    orphans = 0
    for message in messages.values():
        above = preceding_turns(message, messages)
        if above is None:
            orphans += 1
            continue
        if message.role != "assistant":
            continue
        if not above or above[-1].role != "prompter":
            dropped["answering no prompter"] += 1
            continue
        both = (above[-1], message)
        reason = _reason_to_drop(both, language)
        if reason:
            dropped[reason] += 1
            continue
        failed += any(part.row.get("review_result") is False for part in both)
        prompt, reply = (text(part.row, "text", part.where) for part in both)
        history = tuple((turn.role, str(turn.row.get("text") or "").strip()) for turn in above[:-1])
        pairs.append(Pair(message.id, message.tree or above[0].id, history, prompt, reply))
    for reason, count in dropped.items():
        notes.append(f"{name}: {count} replies left out, {reason}")
    if orphans:
        notes.append(f"{name}: {orphans} messages left out, a message above them is not in the data")
    if failed:
        notes.append(f"{name}: {failed} pairs hold a message that failed review; they are kept")
    return pairs


def _indexed(rows: Iterable[Row]) -> dict[str, Message]:
    messages: dict[str, Message] = {}
    for where, row in rows:
        name, role = text(row, "message_id", where), text(row, "role", where)
        if name in messages:
            raise InputError(f"{where}: message {name} stands in {messages[name].where} already; remove one")
        if role not in ROLES:
            raise InputError(f"{where}: message {name} has the role {role!r}; known: {', '.join(ROLES)}")
        column(row, "text", where)
        column(row, "parent_id", where)
        messages[name] = Message(name, row["parent_id"], row.get("message_tree_id"), role, row, where)
    return messages


def _reason_to_drop(pair: tuple[Message, Message], language: str) -> str | None:
    rows = [message.row for message in pair]
    if any(row.get("lang", language) != language for row in rows):
        return f"not in the language {language!r}"
    if any(row.get("deleted") for row in rows):
        return "deleted, or answering a deleted message"
    if any(row.get("synthetic") for row in rows):
        return "synthetic, or answering a synthetic message"
    return None


def exchanges(history: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """The (message, reply) of turns, oldest first: those at the end that take turns and are not empty."""
    turns = list(history)
    found: list[tuple[str, str]] = []
    while len(turns) > 1:
        (first, message), (second, reply) = turns[-2:]
        if (first, second) != ROLES or not (message and reply):
            break
        found.insert(0, (message, reply))
        turns = turns[:-2]
    return tuple(found)


def examples(rows: Iterable[Row], split: str, notes: list[str]) -> list[Reply]:
    """English pairs as examples: the prompter's message is the query, its tree the group, what came before the history.

    Raises:
        InputError: as `read_pairs`.
    """
    pairs = read_pairs(rows, f"oasst1 {split}", notes)
    return [Reply(pair.id, pair.prompt, pair.reply, pair.tree, (), exchanges(pair.history)) for pair in pairs]
