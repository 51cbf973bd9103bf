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
EXIT_FAILED = 3  # the run itself went wrong: numbers, or another rank
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped by SIGTERM, all that was learned is saved; --resume goes on


class InputError(ValueError):
    """Something the user gave is wrong; `str(error)` is one line: what, where, what to do."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class RunError(RuntimeError):
    """A run cannot go on, and not for what it was given; `str(error)` is one line.

    Attributes:
        code: what the process exits with.
        every_rank: not only one rank of each machine says it; the one that would may be gone.
    """

    code = EXIT_FAILED

    def __init__(self, message: str, every_rank: bool = False):
        super().__init__(" ".join(message.split()))
        self.every_rank = every_rank


class Stopped(RunError):
    """The run was told to stop and has saved a checkpoint."""

    code = EXIT_STOPPED


def check_utf8(what: str, text: str) -> None:
    """Raise `InputError` for a text with bytes that were no UTF-8: Python keeps them as halves of letters, which no
    tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what}: character {error.start + 1} is not UTF-8; convert the text first") from None


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
    """Run a script's `main`; turn an `InputError` or a `RunError` into one line on stderr and an exit code.

    With `--debug` on the command line the traceback is shown as well.
    """
    try:
        main()
    except (InputError, RunError) as error:
        if "--debug" in sys.argv and not isinstance(error, Stopped):
            raise
        # Every rank finds the error; one of each machine says it.
        if os.environ.get("LOCAL_RANK", "0") == "0" or getattr(error, "every_rank", False):
            kind = "stopped" if isinstance(error, Stopped) else "error"
            behind = "\n" if isinstance(error, RunError) else ""  # a progress bar, which has no line end
            print(f"{behind}{kind}: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(3)  # the first rank to exit has the launcher end the others, the one that speaks among them
        sys.exit(getattr(error, "code", EXIT_BAD_INPUT))
