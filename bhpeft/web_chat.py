"""The chat in a browser, with Gradio (pip install -r requirements-web.txt): streaming, stop, side by side, shades.

Under each token of an adapter with Gaussian weights lies a shade by its uncertainty (token_uncertainty.py), drawn once
the answer is complete. The shade's opacity is on a scale that is the same for all answers:

    weights     sqrt(I_t / FULL)        I_t mutual information over S posterior samples; half a nat or more is full
    all         H_t / log V             H_t predictive entropy, at most log V for V tokens

Nothing leaves the machine: no analytics, no fonts or scripts from elsewhere, no tunnel; all text is escaped here.
"""

from __future__ import annotations

import html
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr  # noqa: E402

from bhpeft.chat import Answer, ChatModel  # noqa: E402
from bhpeft.chat_settings import Settings  # noqa: E402
from bhpeft.errors import InputError  # noqa: E402
from bhpeft.token_uncertainty import TokenUncertainty, token_uncertainty  # noqa: E402

WEIGHTS, ALL = "the weights' part (mutual information)", "all (entropy)"
FULL = 0.5  # nats
SECONDS_A_FRAME = 0.05  # how often the browser is shown what is new
CSS = """
footer, [aria-label="Clear"] { display: none !important; }
.said { white-space: normal; overflow-wrap: anywhere; }
.stopped { opacity: 0.6; font-size: 0.85em; }
.token { border-radius: 2px; box-decoration-break: clone; }
.scale { display: inline-block; width: 9em; height: 0.8em; border-radius: 2px; vertical-align: middle; margin: 0 0.5em;
  background: linear-gradient(to right, rgba(220, 90, 20, 0), rgba(220, 90, 20, 1)); border: 1px solid #8885; }
"""


@dataclass
class Turn:
    """A message and its answer on one side, as it is shown."""

    message: str
    pieces: list[str] = field(default_factory=list)
    stopped: bool = False
    uncertainty: TokenUncertainty | None = None

    @property
    def reply(self) -> str:
        """The answer so far, without space around it."""
        return "".join(self.pieces).strip()


def as_html(text: str) -> str:
    """Text as one block of HTML that Markdown leaves alone: nothing in it is markup, and it has no empty line."""
    return html.escape(re.sub(r"\r\n?", "\n", text)).replace("\n", "<br>")


def opacity(uncertainty: TokenUncertainty, token: int, measure: str) -> float:
    """How dark a token's shade is, from 0 to 1."""
    if measure == WEIGHTS:
        return min(1.0, math.sqrt(uncertainty.mutual_information[token] / FULL))
    return min(1.0, uncertainty.entropy[token] / math.log(uncertainty.vocabulary))


def shaded(turn: Turn, measure: str) -> str:
    """An answer as HTML, each token over its shade. A character of several tokens has the shade of the last."""
    if turn.uncertainty is None:
        body = as_html("".join(turn.pieces))
    else:
        spans = []
        for i, piece in enumerate(turn.pieces):
            if not piece:
                continue
            values = turn.uncertainty.entropy[i], turn.uncertainty.mutual_information[i]
            title = "entropy {:.3f}, of it the weights' {:.4f} nats".format(*values)
            colour = f"rgba(220, 90, 20, {opacity(turn.uncertainty, i, measure):.3f})"
            spans.append(
                f'<span class="token" style="background: {colour}" title="{html.escape(title)}">{as_html(piece)}</span>'
            )
        body = "".join(spans)
    return body + (' <span class="stopped">[stopped]</span>' if turn.stopped else "")


def messages(turns: Sequence[Turn], measure: str) -> list[dict]:
    """Turns as Gradio's chatbot takes them."""
    shown = []
    for turn in turns:
        shown.append({"role": "user", "content": f'<div class="said">{as_html(turn.message)}</div>'})
        shown.append({"role": "assistant", "content": f'<div class="said">{shaded(turn, measure) or "…"}</div>'})
    return shown


class Session:
    """What the pages share: the model, the sides, and the answer each page is waiting for."""

    def __init__(self, chat: ChatModel, side_by_side: bool, samples: int):
        self.chat = chat
        self.samples = samples if chat.bayesian and chat.adapter_name else 0
        adapted = {chat.adapter_name or "frozen base": True}
        self.sides: dict[str, bool] = {"frozen base": False, **adapted} if side_by_side else adapted
        self.answers: dict[str, Answer] = {}  # by page
        self.stopped: set[str] = set()

    def stop(self, page: str) -> None:
        """End the answer that a page is waiting for; of two sides, the one that has not begun as well."""
        self.stopped.add(page)
        if page in self.answers:
            self.answers[page].stop()

    def talk(self, page: str, talks: list[list[Turn]], message: str, settings: Settings) -> Iterator[str]:
        """Answer a message on each side in turn; `talks` grows in place. Yields what there is to say about it.

        Raises:
            InputError: the message does not fit, or a setting cannot be.
        """
        settings.check()
        self.stopped.discard(page)
        notes = []
        for turns, (name, adapted) in zip(talks, self.sides.items(), strict=True):
            if page in self.stopped:
                break
            history = [(turn.message, turn.reply) for turn in turns if turn.reply]
            started, first, shown = time.perf_counter(), None, 0.0
            answer = self.answers[page] = self.chat.ask(history, message, settings, adapted)
            turns.append(Turn(message))
            yield f"{name} …"
            for _ in answer:
                turns[-1].pieces = list(answer.pieces)
                now = time.perf_counter()
                first = first or now - started
                if now - shown > SECONDS_A_FRAME:
                    shown = now
                    yield f"{name} …"
            turns[-1].pieces, turns[-1].stopped = list(answer.pieces), answer.stopped
            del self.answers[page]
            seconds = max(time.perf_counter() - started, 1e-9)
            kept = f", no room for the first {answer.dropped} exchanges" if answer.dropped else ""
            speed = f"first after {first or 0:.2f} s, {len(answer.ids) / seconds:.0f} a second"
            notes.append(f"{name}: {len(answer.ids)} tokens, {speed}{kept}")
            if self.samples and adapted and answer.ids:
                yield " · ".join([*notes, "shading …"])
                with self.chat.lock:
                    turns[-1].uncertainty = token_uncertainty(
                        self.chat.model, answer.prompt_ids, answer.ids, self.samples
                    )
        yield " · ".join(notes)


def around(value: float, low: float, high: float) -> tuple[float, float, float]:
    """Ends of a slider that also holds a value given on the command line; and the value."""
    return min(low, value), max(high, value), value


def build(session: Session, settings: Settings) -> gr.Blocks:
    """The page."""
    chat, sides = session.chat, list(session.sides)
    with gr.Blocks(title="bhpeft chat", analytics_enabled=False) as page:
        adapter = f"{chat.adapter_name} `{Path(chat.adapter_path or '').name}` on " if chat.adapter_name else ""
        gr.Markdown(f"### {adapter}frozen `{Path(chat.base_name).name}`")
        state = gr.State([[] for _ in sides])
        with gr.Row():
            bots = [
                gr.Chatbot(
                    label=name, height=440, elem_id=f"side-{i}", sanitize_html=False, latex_delimiters=[],
                    buttons=[], feedback_options=None, group_consecutive_messages=False,
                )
                for i, name in enumerate(sides)
            ]  # fmt: skip
        with gr.Row():
            box = gr.Textbox(placeholder="Message", show_label=False, elem_id="message", scale=6, autofocus=True)
            send = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
            stop = gr.Button("Stop", elem_id="stop", min_width=80)
            reset = gr.Button("Reset", elem_id="reset", min_width=80)
        status = gr.Markdown("", elem_id="status")
        measure = gr.Radio([WEIGHTS, ALL], value=WEIGHTS, label="Shade: uncertainty of each token", elem_id="measure",
                           visible=bool(session.samples))  # fmt: skip
        if session.samples:
            gr.HTML(f'sure<span class="scale"></span>unsure, over {session.samples} samples of the weights; '
                    "hold the pointer over a token for its figures")  # fmt: skip
        with gr.Accordion("Settings", open=False):
            longest = max(settings.max_new_tokens, min(1024, (chat.positions or 2048) // 2))
            fields = {
                "max_new_tokens": gr.Slider(1, longest, settings.max_new_tokens, step=1, label="most new tokens"),
                "do_sample": gr.Checkbox(settings.do_sample, label="draw tokens (else the likeliest each time)"),
                "temperature": gr.Slider(*around(settings.temperature, 0.05, 2), step=0.05, label="temperature"),
                "top_k": gr.Slider(*around(settings.top_k, 0, 200), step=1, label="top k (0: all)"),
                "top_p": gr.Slider(*around(settings.top_p, 0.05, 1), step=0.05, label="top p"),
            }

        def respond(message: str, talks: list, shade: str, request: gr.Request, *values):
            if not message.strip():
                yield gr.skip()
                return
            asked = Settings(**dict(zip(fields, values, strict=True)), seed=settings.seed)
            try:
                for note in session.talk(request.session_hash, talks, message.strip(), asked):
                    yield ["", talks, note, *(messages(turns, shade) for turns in talks)]
            except InputError as error:
                yield [message, talks, f"**error:** {html.escape(str(error))}", *(messages(t, shade) for t in talks)]

        def end(request: gr.Request) -> None:
            session.stop(request.session_hash)

        def forget(request: gr.Request) -> list:
            session.stop(request.session_hash)
            return ["", [[] for _ in sides], "", *([] for _ in sides)]

        outputs = [box, state, status, *bots]
        asking = {"inputs": [box, state, measure, *fields.values()], "outputs": outputs, "show_progress": "hidden"}
        events = [gr.on([box.submit, send.click], respond, **asking, api_visibility="private", concurrency_limit=1)]
        stop.click(end, queue=False, api_visibility="private", show_progress="hidden")
        reset.click(
            forget, None, outputs, cancels=events, queue=False, api_visibility="private", show_progress="hidden"
        )
        measure.change(lambda talks, shade: [messages(turns, shade) for turns in talks], [state, measure], bots,
                       queue=False, api_visibility="private", show_progress="hidden")  # fmt: skip
    return page


def serve(
    chat: ChatModel, settings: Settings, side_by_side: bool, host: str = "127.0.0.1", port: int = 7860, samples: int = 8
) -> None:
    """Serve the page until Ctrl-C.

    Args:
        port: 0 for any free one.
        samples: weights drawn from the posterior for the shades; 0 for none.

    Raises:
        InputError: the port is taken, or the address is not this machine's.
    """
    port = free_port(host, port)
    page = build(Session(chat, side_by_side, samples), settings)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host, server_port=port, share=False, inbrowser=False, quiet=True, theme=theme, css=CSS,
        ssr_mode=False, pwa=False, mcp_server=False, enable_monitoring=False, footer_links=[], prevent_thread_lock=True,
    )  # fmt: skip
    print(f"http://{host}:{port} - Ctrl-C ends it", flush=True)
    if host not in ("127.0.0.1", "localhost", "::1"):
        print("Whoever reaches this address can talk to the model.", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        page.close(verbose=False)


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0; `InputError` if it cannot be listened on."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error.strerror}; give another, or --port 0 for any") from None
