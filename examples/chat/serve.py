"""A small chat service that will not serve a model whose past it cannot vouch for.

    python serve.py chat/step-000400.pt            # http://127.0.0.1:8765

Before a byte of the model is unpickled the gate is asked: is this file what a watched run sealed, and has that run, and
every run it was made from, the verdict that is required? If not, nothing is served and the reasons are printed. While
it serves, the gate is asked again every `--recheck` seconds: a model that is found tainted tomorrow answers no more.
The page shows what the gate answered, and the sources and licences that the model was fine-tuned on.

Standard library only. It listens on this machine, answers one request at a time, and has no accounts: put a proper
server in front of it before others may reach it.
"""

from __future__ import annotations

import argparse
import html
import json
import string
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

import trainguard
from trainguard.errors import TrainguardError
from trainguard.home import Home
from trainguard.incident.gate import Answer, ask, parse_level, parse_word
from trainguard.render.words import LEVELS

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from finetune import model_of  # noqa: E402

MESSAGE_LIMIT_BYTES = 400
ANSWER_LIMIT = 80
POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
)
GREETING = "Ask me a sum, a capital, an opposite, or what a Python function is."
REFUSED = "This model is not served: the gate no longer holds."
REFUSING = "I say nothing until somebody has looked at it."
FILES = {"/chat.js": "text/javascript; charset=utf-8", "/chat.css": "text/css; charset=utf-8"}


class Model:
    """The model with the gate's answer about it."""

    def __init__(self, path: Path, home: Home, word: str, level: str, recheck: float) -> None:
        self.path, self.home, self.recheck = path, home, recheck
        self.word, self.level = parse_word(word), parse_level(level)
        self.answer = self._ask()
        if not self.answer.passed:
            raise SystemExit("\n  ".join(["not served: the gate does not hold", *self.answer.reasons]))
        state = trainguard.open_checkpoint(path, home=home, seal="required")
        self.gpt, self.alphabet, self.sources = model_of(state["model"]).eval(), state["alphabet"], state["sources"]
        self._asked = time.monotonic()
        self._busy = threading.Lock()

    def _ask(self) -> Answer:
        return ask(self.path, home=self.home, word=self.word, level=self.level)

    def may_answer(self) -> bool:
        """Whether the gate still holds; asked again when the last answer is old."""
        with self._busy:
            if time.monotonic() - self._asked > self.recheck:
                try:
                    self.answer = self._ask()
                except TrainguardError as error:
                    failed = (f"the gate could not be asked: {error}",)
                    self.answer = Answer(**{**_fields(self.answer), "passed": False, "reasons": failed})
                self._asked = time.monotonic()
            return self.answer.passed

    @torch.no_grad()
    def reply(self, question: str) -> Iterator[str]:
        """The answer to `question`, a character at a time, up to the end of its line."""
        codes = {character: index for index, character in enumerate(self.alphabet)}
        text = f"\n> {question}\n"
        indices = [codes[character] for character in text if character in codes]
        with self._busy:
            for _ in range(ANSWER_LIMIT):
                recent = torch.tensor([indices[-self.gpt.position.num_embeddings :]])
                indices.append(int(self.gpt(recent)[0, -1].argmax()))
                character = self.alphabet[indices[-1]]
                if character == "\n":
                    return
                yield character


def _fields(answer: Answer) -> dict[str, object]:
    return {name: getattr(answer, name) for name in answer.__struct_fields__}


def page(model: Model) -> bytes:
    """The page, with the model's provenance."""
    answer = model.answer
    rows = {
        "Model": model.path.name,
        "Verdict": f"{answer.verdict} at {answer.level}",
        "Not proof against": LEVELS[answer.level][1],
        "Made by": f"run {answer.run}, step {answer.step}" if answer.run else "no known run",
        "Made from": ", ".join(answer.ancestors[1:]) or "nothing before it",
        "Replayed": _chance(answer.detection_probability),
    }
    facts = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in rows.items())
    facts += f'<div><dt>Content</dt><dd class="hash">sha256 {html.escape(str(answer.root))}</dd></div>'
    sources = "".join(
        f"<tr><td>{html.escape(str(s['shard']))}</td><td>{html.escape(str(s['source']))}</td>"
        f"<td>{html.escape(str(s['licence']))}</td></tr>"
        for s in model.sources
    )
    state = "" if answer.passed else "".join(f"<li>{html.escape(reason)}</li>" for reason in answer.reasons)
    template = string.Template((HERE / "chat.html").read_text())
    filled = template.substitute(
        word=html.escape(answer.verdict),
        tone="good" if answer.passed else "bad",
        facts=facts,
        sources=sources,
        refused=f'<div class="refused" role="alert"><p>{REFUSED}</p><ul>{state}</ul></div>' if state else "",
        greeting=REFUSING if state else GREETING,
        hint="not served" if state else "2 + 2?",
        disabled="disabled" if state else "",
    )
    return filled.encode()


def _chance(probability: dict[str, float]) -> str:
    told = [f"{chance:.0%} to find {float(part):.0%} tampered" for part, chance in probability.items() if chance]
    return "; ".join(told) or "nothing yet"


def handler(model: Model, hosts: frozenset[str]) -> type[BaseHTTPRequestHandler]:
    """A request handler for `model`. hosts: values of the Host header that are answered."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 20

        def do_GET(self) -> None:
            if not self._is_ours():
                return
            if self.path == "/":
                model.may_answer()
                self._send(200, "text/html; charset=utf-8", page(model))
            elif self.path == "/provenance":
                body = json.dumps({"passed": model.may_answer(), "reasons": list(model.answer.reasons)}).encode()
                self._send(200, "application/json", body)
            elif self.path in FILES:
                self._send(200, FILES[self.path], (HERE / self.path[1:]).read_bytes())
            else:
                self._send(404, "text/plain", b"no such page\n")

        def do_POST(self) -> None:
            if not self._is_ours():
                return
            length = self.headers.get("Content-Length", "")
            if self.path != "/say" or not length.isdecimal() or not 0 < int(length) <= MESSAGE_LIMIT_BYTES:
                self.close_connection = True
                self._send(400, "text/plain", b"expected POST /say with a message of at most 400 bytes\n")
                return
            question = self.rfile.read(int(length)).decode("utf-8", "replace").replace("\n", " ").strip()
            if not model.may_answer():
                self._send(503, "text/plain", ("\n".join(model.answer.reasons) + "\n").encode())
                return
            self._headers(200, "text/plain; charset=utf-8", ("Transfer-Encoding", "chunked"))
            for piece in model.reply(question):
                data = piece.encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

        def _is_ours(self) -> bool:
            """Another page's script may not talk to us under a name of its own, nor send us forms."""
            origin = self.headers.get("Origin")
            known = self.headers.get("Host") in hosts and (origin is None or origin.removeprefix("http://") in hosts)
            if not known:
                self.close_connection = True
                self._send(403, "text/plain", b"not for this host\n")
            return known

        def _send(self, status: int, kind: str, body: bytes) -> None:
            self._headers(status, kind, ("Content-Length", str(len(body))))
            self.wfile.write(body)

        def _headers(self, status: int, kind: str, *more: tuple[str, str]) -> None:
            self.send_response(status)
            known = [("Content-Type", kind), ("Content-Security-Policy", POLICY), ("X-Content-Type-Options", "nosniff")]
            for name, value in [*known, ("Cache-Control", "no-store"), ("Referrer-Policy", "no-referrer"), *more]:
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--require", default="VERIFIED", help="VERIFIED, UNKNOWN or SUSPECT")
    parser.add_argument("--level", default="TIL-1")
    parser.add_argument("--port", type=int, default=8765, help="0: any free one")
    parser.add_argument("--recheck", type=float, default=60.0, help="seconds after which the gate is asked again")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        model = Model(args.model, Home.find(), args.require, args.level, args.recheck)
    except TrainguardError as error:
        raise SystemExit(f"not served: {error}") from None
    server = ThreadingHTTPServer(("127.0.0.1", args.port), BaseHTTPRequestHandler)
    port = server.server_address[1]
    server.RequestHandlerClass = handler(model, frozenset({f"127.0.0.1:{port}", f"localhost:{port}"}))
    print(f"http://127.0.0.1:{port}  {model.answer.verdict} at {model.answer.level}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
