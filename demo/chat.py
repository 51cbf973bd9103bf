"""Talk to a trained adapter, in the terminal or in the browser; beside the frozen base, if wanted.

    python demo/chat.py --adapter_path FOLDER [--side_by_side] [--web]
    python demo/chat.py --base_only --base_model HUB_ID_OR_FOLDER

The conversation so far is given to the model as far as it has positions. Ctrl-C stops an answer, and at the prompt ends
the program. --web opens the same in a browser, on this machine alone (pip install -r requirements-web.txt); for an
adapter with Gaussian weights it shades each token by how unsure the weights are of it.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from classify import PRECISIONS, quieten  # noqa: E402

from bhpeft.adapter_files import check_adapter_folder  # noqa: E402
from bhpeft.annotation_terminal import printable  # noqa: E402
from bhpeft.chat_settings import Settings  # noqa: E402
from bhpeft.errors import InputError, Parser, check_utf8, nearest, run_main  # noqa: E402

if TYPE_CHECKING:  # torch is loaded once the flags are known to be right
    from bhpeft.chat import ChatModel

COMMANDS = {
    "/reset": "forget the conversation",
    "/save FILE": "write the conversation into a file; /save FILE overwrite replaces one",
    "/settings [NAME VALUE]": "show how answers are generated, or change it: /settings temperature 0.9",
    "/help": "this list",
    "/quit": "leave (so do Ctrl-D, and Ctrl-C here; during an answer Ctrl-C stops the answer)",
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the flags.

    Raises:
        InputError: flags that contradict each other.
    """
    parser = Parser(__doc__)
    parser.add_argument("--adapter_path", metavar="FOLDER", help="folder of the adapter")
    parser.add_argument("--base_model", help="hub id or folder (default: the one the adapter names)")
    parser.add_argument("--base_only", action="store_true", help="talk to the frozen base, without the adapter")
    parser.add_argument("--side_by_side", action="store_true", help="ask the frozen base and the adapter")
    parser.add_argument("--web", action="store_true", help="in the browser, with Gradio")
    parser.add_argument("--host", default="127.0.0.1", help="--web: address to listen on (default: 127.0.0.1 alone)")
    parser.add_argument("--port", type=int, default=7860, help="--web: port (default: 7860; 0: any free one)")
    parser.add_argument("--posterior_samples", type=int, default=8, metavar="S",
                        help="--web: weights drawn for the shade under tokens (default: 8; 0: no shade)")  # fmt: skip
    parser.add_argument("--prompt_template", help="as the trainer's (default: the adapter's, else the tokenizer's own)")
    parser.add_argument("--instruction", help="what a template with {instruction} says")
    parser.add_argument("--context_turns", type=int, help="most exchanges before a message (default: the adapter's)")
    for name, kind, words in (
        ("max_new_tokens", int, "most tokens of an answer (default: 200, or a quarter of the model's positions)"),
        ("temperature", float, "what logits are divided by (default: 0.7)"),
        ("top_k", int, "only the k likeliest tokens; 0 for all (default: 50)"),
        ("top_p", float, "only the likeliest tokens of this probability together (default: 0.95)"),
        ("seed", int, "of the drawn tokens, for every answer (default: another each time)"),
    ):
        parser.add_argument(f"--{name}", type=kind, help=words)
    parser.add_argument("--greedy", action="store_true", help="the likeliest token each time, instead of drawing")
    parser.add_argument("--dtype", choices=PRECISIONS, default="float32", help="of the base (default: float32)")
    parser.add_argument("--load_in_4bit", action="store_true", help="the base in 4 bit (default: as it was trained)")
    parser.add_argument(
        "--allow_full_precision", action="store_true", help="load the base whole where it was trained on in 4 bit"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)

    if args.adapter_path is None and not args.base_only:
        raise InputError("--adapter_path: missing; give the folder of an adapter, or --base_only with --base_model")
    if args.adapter_path is not None and not Path(args.adapter_path).is_dir():
        raise InputError(f"--adapter_path {args.adapter_path}: no such folder; give the folder of an adapter")
    if args.base_only and args.side_by_side:
        raise InputError("--base_only and --side_by_side: one side is left; give one of them")
    if args.context_turns is not None and args.context_turns < 0:
        raise InputError(f"--context_turns {args.context_turns}: must be 0 (none) or more")
    if args.posterior_samples < 0 or args.posterior_samples == 1:
        raise InputError(f"--posterior_samples {args.posterior_samples}: must be 0 (no shade), or 2 or more")
    if not 0 <= args.port < 65536:
        raise InputError(f"--port {args.port}: must be at least 0 and below 65536")
    settings_of(args, Settings())  # what cannot be is said before anything is loaded
    return args


def settings_of(args: argparse.Namespace, settings: Settings) -> Settings:
    """The settings that the flags ask for, the rest as they are."""
    for name in ("max_new_tokens", "temperature", "top_k", "top_p", "seed"):
        if getattr(args, name) is not None:
            settings = settings.changed(name, str(getattr(args, name)))
    return settings.changed("do_sample", "false") if args.greedy else settings


@contextlib.contextmanager
def on_interrupt(call: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C makes a call for the length of the block, in place of an exception, which code at work may swallow."""
    before = signal.signal(signal.SIGINT, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Terminal:
    """The conversation in the terminal."""

    def __init__(self, chat: ChatModel, settings: Settings, side_by_side: bool):
        self.chat, self.settings = chat, settings
        sides = {"frozen base": False, chat.adapter_name: True} if side_by_side else {chat.adapter_name or "base": True}
        self.sides: dict[str, bool] = sides  # name -> whether the adapter answers
        self.histories: dict[str, list[tuple[str, str]]] = {name: [] for name in sides}

    def run(self) -> None:
        """Read messages and commands until the end."""
        who = f"{self.chat.adapter_name} on " if self.chat.adapter_name else "the frozen base "
        print(f"{who}{self.chat.base_name}{self.alone()}. /help lists commands.", flush=True)
        while True:
            try:
                line = input("\nyou> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            try:
                if line.startswith("/"):
                    if self.command(line):
                        return
                elif line:
                    self.ask(line)
            except InputError as error:
                print(f"error: {error}", flush=True)
            except KeyboardInterrupt:  # before the first token, or a second time while an answer ends
                print(" [stopped]", flush=True)

    def alone(self) -> str:
        """What to say where messages are answered without those before."""
        return "; each message stands alone (--context_turns)" if self.chat.encoder.context_turns == 0 else ""

    def ask(self, message: str) -> None:
        """Stream the answer of each side; one that is stopped is kept as far as it came, and ends the round."""
        check_utf8("this line", message)
        for name, adapted in self.sides.items():
            history = self.histories[name]
            answer = self.chat.ask(history, message, self.settings, adapted)
            if answer.dropped:
                print(f"(no room any more for the first {answer.dropped} of {len(history)} exchanges)")
            print(f"{name}> ", end="", flush=True)
            with on_interrupt(answer.stop):
                for piece in answer:
                    print(printable(piece), end="", flush=True)
            print(" [stopped]" if answer.stopped else "", flush=True)
            if answer.text:
                history.append((message, answer.text))
            if answer.stopped:
                return

    def command(self, line: str) -> bool:
        """Do what a line beginning with / says; True to leave.

        Raises:
            InputError: it cannot be done.
        """
        name, *words = line.split()
        if name == "/quit":
            return True
        if name == "/help":
            print("\n".join(f"  {command:<24}{meaning}" for command, meaning in COMMANDS.items()))
        elif name == "/reset":
            for history in self.histories.values():
                history.clear()
            print("The conversation is forgotten.")
        elif name == "/settings":
            if len(words) not in (0, 2):
                raise InputError("/settings: give a name and a value, as /settings temperature 0.9, or nothing")
            if words:
                self.settings = self.settings.changed(*words)
            print("\n".join(f"  {field:<16}{value}" for field, value in vars(self.settings).items()))
        elif name == "/save":
            file = line.removeprefix("/save").strip()
            kept = file.removesuffix(" overwrite")
            self.save(kept.strip(), overwrite=kept != file)
        else:
            known = [command.split()[0] for command in COMMANDS]
            raise InputError(f"{name}: no such command.{nearest(name, known)} /help lists them")
        return False

    def save(self, file: str, overwrite: bool) -> None:
        """Write the conversation, whole or not at all; an existing file is replaced only where that was said."""
        from bhpeft.files import write_atomic

        if not file:
            raise InputError("/save: names no file; give one, as /save talk.txt")
        if not any(self.histories.values()):
            raise InputError("/save: nothing has been said yet")
        path = Path(file).expanduser()
        if path.is_dir():
            raise InputError(f"/save {file}: is a folder; give a file in it")
        if path.exists() and not overwrite:
            raise InputError(f"/save {file}: exists; /save {file} overwrite replaces it")
        write_atomic(path, self.transcript())
        print(f"Saved as {path}.")

    def transcript(self) -> str:
        """Who was asked, how, and what was said."""
        lines = [f"base model: {self.chat.base_name}", f"adapter: {self.chat.adapter_path or 'none'}"]
        lines += [f"{name}: {value}" for name, value in vars(self.settings).items()]
        for name, history in self.histories.items():
            lines += ["", f"==== {name}"]
            for message, reply in history:
                lines += [f"you> {message}", f"{name}> {reply}"]
        return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Talk until the person leaves."""
    args = parse_arguments(argv)
    if args.web and importlib.util.find_spec("gradio") is None:
        raise InputError("--web: Gradio is not installed; pip install -r requirements-web.txt, or leave --web out")
    if args.adapter_path is not None:
        check_adapter_folder(args.adapter_path)

    from bhpeft.chat_setup import ChatArguments, open_chat  # torch: not before the folder is known to be whole

    names = ("adapter_path", "base_model", "base_only", "load_in_4bit", "allow_full_precision", "prompt_template",
             "instruction", "context_turns")  # fmt: skip
    chat = open_chat(ChatArguments(**{name: getattr(args, name) for name in names}, precision=PRECISIONS[args.dtype]))
    settings = settings_of(args, chat.default_settings())
    if args.web:
        from bhpeft.web_chat import serve

        serve(chat, settings, args.side_by_side, args.host, args.port, args.posterior_samples)
        return
    if sys.stdin.isatty():
        import readline  # noqa: F401 - input() then has a history and can be edited

    Terminal(chat, settings, args.side_by_side).run()


if __name__ == "__main__":
    quieten()
    try:
        run_main(main)
    except KeyboardInterrupt:  # while the model is loaded
        sys.exit(130)
