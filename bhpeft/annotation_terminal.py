"""Judging explanations in the terminal: one key an answer. Plain Python; see `annotation.py`."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Callable

from bhpeft.annotation import KEYS, Session

MENU = "[y]es  [n]o  [s]kip  [b]ack  [q]uit"
QUIT = ("q", "\x03", "\x04", "")  # Ctrl-C and Ctrl-D, as keys; the end of the input


def printable(text: str) -> str:
    """A model's text without what a terminal would obey: control characters are shown as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def annotate(session: Session, read_key: Callable[[], str] | None = None) -> None:
    """Ask until all is judged or the annotator quits; every answer is on the disk by then.

    Args:
        read_key: gives one key, "" at the end of the input (default: from the terminal, or a line of standard input).
    """
    read_key = read_key or _read_key
    while session.place is not None:
        _show(session)
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


def _show(session: Session) -> None:
    shown = session.shown()
    width = max(40, min(100, shutil.get_terminal_size().columns)) - 2
    if session.place.question == 0 or shown["answered"] is not None:
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
    try:
        import termios
        import tty
    except ImportError:  # no POSIX terminal
        import msvcrt

        return msvcrt.getwch()
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)
    try:
        tty.setraw(handle, termios.TCSADRAIN)
        return sys.stdin.read(1)
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
