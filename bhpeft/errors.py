"""Errors a user can mend: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import NoReturn

EXIT_BAD_INPUT = 2  # as argparse uses it for wrong flags


class InputError(ValueError):
    """Something the user gave is wrong; `str(error)` is one line: what, where, what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to `name`, or "" if none is close."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` for scripts: no abbreviated flags, help as it is written, and errors of one line."""

    def __init__(self, description: str | None):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=formatter)

    def error(self, message: str) -> NoReturn:
        """Raise `InputError` in place of printing the usage and leaving."""
        _, _, stray = message.partition("unrecognized arguments: ")
        near = nearest(stray.split()[0].split("=")[0], self._option_string_actions) if stray else ""
        raise InputError(f"{message}.{near} All flags: --help")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's `main`; turn an `InputError` into one line on stderr and exit code 2.

    With `--debug` on the command line the traceback is shown as well.
    """
    try:
        main()
    except InputError as error:
        if "--debug" in sys.argv:
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # every rank finds the error; one of each machine says it
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the first rank to exit has the launcher end the others, the one that speaks among them
        sys.exit(EXIT_BAD_INPUT)
