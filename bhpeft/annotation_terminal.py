"""Judging explanations in the terminal: one key an answer. Plain Python; see `annotation.py`."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator

from bhpeft.annotation import KEYS, Session

MENU = "[y]es  [n]o  [s]kip  [b]ack  [q]uit"
QUIT = ("q", "\x03", "\x04", "")  # Ctrl-C and Ctrl-D, as keys; the end of the input


def printable(text: str) -> str:
    """A model's text without what a terminal would obey: control characters are shown as escapes."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def annotate(session: Session, read_key: Callable[[], str] | None = None) -> None:
    """Ask until all is judged or the annotator quits; every answer is on the disk by then.

    Args:
        read_key: gives one key, "" at the end of the input (default: from the terminal, or a line of standard input).
    """
    with _single_keys():
        _ask(session, read_key or _read_key)


def _ask(session: Session, read_key: Callable[[], str]) -> None:
    on_screen = None  # the item whose texts were printed last
    while session.place is not None:
        _show(session, texts=session.place.item != on_screen)
        on_screen = session.place.item
        key = read_key().lower()
        while key not in QUIT and not session.act(key):
            print(f"\n  nothing before this one; {MENU} " if key == "b" else f"\n  {MENU} ", end="", flush=True)
            key = read_key().lower()
        if key in QUIT:
            break
        print(KEYS[key], flush=True)
    left = session.total - session.judged
    more = f", {left} left: the same command goes on" if left else ""
    print(f"\n{session.judged} of {session.total} judged{more}")
    for file in session.files:
        print(f"written: {file}")


def _show(session: Session, texts: bool) -> None:
    shown = session.shown()
    width = max(40, min(100, shutil.get_terminal_size().columns)) - 2
    if texts:
        print(f"\n--- {session.judged} of {session.total} judged ---")
        for name in ("query", "output", "expected"):
            lines = printable(str(shown[name])).splitlines() or ["(nothing)"]
            wrapped = [part for line in lines for part in textwrap.wrap(line, width - 12) or [""]]
            print(f"  {name:<10}" + f"\n{'':<12}".join(wrapped))
    before = {None: "", 0: " (was: no)", 1: " (was: yes)"}[shown["answered"]]
    print(f"  {shown['question']}{before}  {MENU} ", end="", flush=True)


def _read_key() -> str:
    """One key of a terminal without waiting for the line's end; elsewhere the first letter of a line."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.strip()[:1] or ("" if not line else "\n")
    if os.name == "nt":
        import msvcrt

        return msvcrt.getwch()
    return sys.stdin.read(1)


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """The terminal gives every key at once, for the length of the block, Ctrl-C as a key too; elsewhere nothing.

    For all of a session: a key pressed between two questions would be lost, or a Ctrl-C taken for a signal.
    """
    if os.name == "nt" or not sys.stdin.isatty():
        yield
        return
    import termios

    handle = sys.stdin.fileno()
    before, now = termios.tcgetattr(handle), termios.tcgetattr(handle)
    now[3] &= ~(termios.ICANON | termios.ECHO | termios.ISIG)
    termios.tcsetattr(handle, termios.TCSADRAIN, now)
    try:
        yield
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
