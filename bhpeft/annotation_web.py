"""Judging explanations in a browser: one page, served to this machine alone. Plain Python; see `annotation.py`.

The server listens on 127.0.0.1. A request is answered only where its Host header names this machine (so that no other
site's name can be pointed at it) and its path begins with a token made anew each time. The page loads nothing from
elsewhere, and texts of models come as data, never as HTML.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from bhpeft.annotation import Session
from bhpeft.errors import InputError

PAGE = Path(__file__).parent / "templates" / "annotate.html"
MOST_BYTES = 1000  # of a request's body


class AnnotationServer(ThreadingHTTPServer):
    """Serves one session until it is quit.

    Attributes:
        url: where the page is, token included.
    """

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0):
        """Listen on a port of 127.0.0.1 (0: any free one).

        Raises:
            InputError: the port is taken or must not be used.
        """
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise InputError(f"--port {port}: cannot be listened on ({why}); choose another.") from None
        self.session, self.lock = session, threading.Lock()
        self.token = secrets.token_urlsafe(24)
        self.hosts = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}
        self.url = f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def state(self) -> dict:
        """What the page shows."""
        session = self.session
        found = {"judged": session.judged, "total": session.total, "annotator": session.annotator, "at": None}
        if session.place is not None:
            found |= {"at": [session.place.item, session.place.question], **session.shown()}
        return found

    def act(self, key: str, at: list | None) -> dict:
        """Do what a key says of the question at `at`; nothing where another one is open by now (a second tab's)."""
        with self.lock:
            place = self.session.place
            if at == (None if place is None else [place.item, place.question]):
                self.session.act(key)
            return self.state()

    def quit(self) -> None:
        """Stop serving; `serve_forever` returns."""
        threading.Thread(target=self.shutdown, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: AnnotationServer
    server_version, sys_version = "bhpeft", ""

    def do_GET(self) -> None:
        path = self._allowed_path()
        if path == "":
            nonce = secrets.token_urlsafe(12)
            policy = (
                f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
                "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            )
            page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
            self._send(200, page, "text/html; charset=utf-8", policy)
        elif path == "state":
            with self.server.lock:
                state = self.server.state()
            self._send_json(state)
        elif path is not None:
            self._refuse(404)

    def do_POST(self) -> None:
        path = self._allowed_path()
        if path is None:
            return
        if path != "act" or self.headers.get_content_type() != "application/json":
            self._refuse(404)
            return
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 < length <= MOST_BYTES:
                raise ValueError(length)
            asked = json.loads(self.rfile.read(length))
            key, at = asked["key"], asked["at"]
        except (ValueError, KeyError, TypeError):
            self._refuse(400)
            return
        try:
            state = self.server.act(key, at)
        except InputError as error:  # it cannot be written
            self._send_json({"error": str(error)}, 500)
            return
        self._send_json({**state, "quit": key == "q"})
        if key == "q":
            self.server.quit()

    def _allowed_path(self) -> str | None:
        """What follows the token; None, with the refusal sent, where host or token are wrong."""
        start, _, rest = self.path.lstrip("/").partition("/")
        if self.headers.get("Host", "") not in self.server.hosts:
            self._refuse(403)
        elif not hmac.compare_digest(start.encode(), self.server.token.encode()):
            self._refuse(404)
        else:
            return rest
        return None

    def _refuse(self, code: int) -> None:
        self.close_connection = True
        self._send(code, "refused\n", "text/plain; charset=utf-8")

    def _send_json(self, found: dict, code: int = 200) -> None:
        self._send(code, json.dumps(found), "application/json")

    def _send(self, code: int, text: str, kind: str, policy: str = "default-src 'none'") -> None:
        data = text.encode("utf-8", "replace")
        self.send_response(code)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(data))),
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args) -> None:
        """Nothing: the token would stand in the terminal once a request."""
