"""Most mistakes, found in a second: before torch and the libraries on it are imported, which takes several.

What is looked at here is looked at again later, with all that is known then; this only speaks earlier.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from bhpeft.adapter_files import check_adapter_folder
from bhpeft.arguments import OWN_CLASSES, DataArguments
from bhpeft.flags import FlagParser, command_words
from bhpeft.results import check_run_name
from bhpeft.tasks import load_task
from bhpeft.tasks.card import TaskCard
from bhpeft.tasks.table import READERS

SMALL = 5_000_000  # bytes: files up to here are read twice; larger ones wait until the libraries are there


@dataclass
class _Doing:
    """Of the Trainer's flags, those that say what is done with the data."""

    do_train: bool = True
    do_eval: bool = False
    data_seed: int = 42
    run_name: str | None = None


def known_flags() -> set[str] | None:
    """Names of all flags, those of `transformers.TrainingArguments` read off its source; None where there is none."""
    spec = importlib.util.find_spec("transformers")
    sources = [Path(__file__).with_name("trainer_arguments.py")]
    sources += [Path(spec.origin).with_name("training_args.py")] if spec and spec.origin else []
    if len(sources) < 2 or not all(source.is_file() for source in sources):
        return None
    names = {"config", "help", *(field.name for part in OWN_CLASSES for field in fields(part))}
    for source in sources:
        text = source.read_text(encoding="utf-8")
        for part in ast.parse(text).body:
            if isinstance(part, ast.ClassDef):
                names |= {line.target.id for line in part.body if isinstance(line, ast.AnnAssign)}
        names |= set(re.findall(r'"--(\w+)"\)', text))
    names |= {f"no_{name}" for name in names}
    return names | {name.replace("_", "-") for name in names}


def begin() -> None:
    """`check_early` of this process's command line; then bitsandbytes, which peft imports, is made to cost little.

    A plan, which quantises nothing, does without it.
    """
    if check_early():
        sys.modules.setdefault("bitsandbytes", None)  # as if it were not installed
    else:
        importlib.import_module("bhpeft.late_compile")


def check_early(argv: list[str] | None = None) -> bool:
    """Raise `InputError` for what is wrong with a command line of the trainer, as far as it can be seen at once.

    Names of flags and of a recipe's keys, values of this project's own flags, the run's name, the adapter's folder, and
    files of rows.

    Args:
        argv: words of the command line without the program's name; default `sys.argv[1:]`.

    Returns:
        Whether a plan is asked for, and nothing else.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    known = known_flags()
    if known is None or {"-h", "--help"} & set(argv):
        return False
    words = command_words(argv, known)
    parser = FlagParser((*OWN_CLASSES, _Doing), allow_abbrev=False)
    _, adapter, data, _, rounds, plan, doing, _ = parser.parse_args_into_dataclasses(words, True)
    if doing.run_name is not None:
        check_run_name(doing.run_name)
    if adapter.adapter_path:
        check_adapter_folder(adapter.adapter_path)
        TaskCard.read(adapter.adapter_path)
    elif not plan.plan and not rounds.on and _small_files(data):
        load_task(data, doing.data_seed, doing.do_eval, doing.do_train)
    return plan.plan


def _small_files(data: DataArguments) -> bool:
    """Whether all rows come from files, and from small ones."""
    files = [file for file in (data.dataset_name, data.test_file, data.validation_file) if file]
    if not files or not all(file.lower().endswith(tuple(READERS)) for file in files):
        return False
    return not any(Path(file).is_file() and Path(file).stat().st_size > SMALL for file in files)
