"""Words of the command line and of recipes, checked by their names. No torch."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import NoReturn

import yaml
from transformers.hf_argparser import HfArgumentParser

from bhpeft.errors import InputError, nearest


class FlagParser(HfArgumentParser):
    """`HfArgumentParser` whose errors are one line, without the usage text of 200 flags."""

    def error(self, message: str) -> NoReturn:
        """Raise `InputError` in place of printing the usage and leaving."""
        raise InputError(f"{message}. All flags: --help")


def command_words(argv: list[str], known: set[str]) -> list[str]:
    """The words of the recipe that `--config` names, if any, and of the command line behind them, which so beats it.

    Args:
        argv: words of the command line without the program's name.
        known: names of all flags.

    Raises:
        InputError: an unknown flag or key (with the nearest name), or a recipe that cannot be read.
    """
    # A bare --debug asks for tracebacks (see errors.run_main); with a value it is transformers' own flag.
    argv = [
        word
        for i, word in enumerate(argv)
        if not (word == "--debug" and (i + 1 == len(argv) or argv[i + 1].startswith("--")))
    ]
    config = _config_of(argv)
    words = (_recipe_as_flags(config, known) if config else []) + argv
    for word in words:
        name = word.split("=")[0]
        if name.startswith("--") and name[2:] not in known:
            real = [flag for flag in known if not flag.startswith("no_") and "-" not in flag]
            raise InputError(f"unknown flag {name}.{nearest(name[2:].replace('-', '_'), real)} All flags: --help")
    return words


class _Loader(yaml.SafeLoader):
    """YAML without a key that stands there twice, of which YAML would silently take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.MarkedYAMLError(problem=f"{twice} stands there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _recipe_as_flags(path: str, known: set[str]) -> list[str]:
    """Read a recipe and return it as command-line words, so that file and flags are checked in one way."""
    if Path(path).is_dir():
        raise InputError(f"--config {path}: is a folder; give a YAML file in it")
    if not Path(path).is_file():
        folder = Path(path).parent
        found = [str(p) for p in sorted(folder.glob("*.yaml"))] if folder.is_dir() else []
        close = difflib.get_close_matches(path, found, n=1, cutoff=0.5)
        raise InputError(f"--config {path}: no such file." + (f" Did you mean {close[0]}?" if close else ""))
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: must be a mapping of flag names to values, as `lora_rank: 8`")
    words: list[str] = []
    for name, value in settings.items():
        if str(name) not in known - {"config"}:
            raise InputError(f"{path}: unknown key {name!r}.{nearest(str(name), known)} All keys: --help")
        if value is None:
            continue
        if isinstance(value, list):
            if any(isinstance(item, bool) for item in value):
                raise InputError(f"{path}: {name}: YAML reads yes, no, on and off as truth values; put them in quotes")
            if any(isinstance(item, list | dict) for item in value):
                raise InputError(f"{path}: {name}: holds a list in a list; give a plain list, as [q_proj, v_proj]")
            words += [f"--{name}", *map(str, value)]
        else:
            words.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def _config_of(argv: list[str]) -> str | None:
    if sum(word.split("=")[0] == "--config" for word in argv) > 1:
        raise InputError("--config: given twice; put what both say into one recipe, or the rest into flags")
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv) or argv[i + 1].startswith("--"):
                raise InputError("--config: names no file; give it one, as --config recipes/NAME.yaml")
            return argv[i + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None
