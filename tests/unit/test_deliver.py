"""Signed deliveries: taken once, tried again where that can help, never sent where they were not addressed."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from tests.helpers import told

from trainguard.cli import main
from trainguard.deliver import WAITS_SECONDS, deliver, signature, verify_delivery, verify_events
from trainguard.envelope import load_public_key, sign_statement, statement
from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError
from trainguard.home import Home

SECRET = b"a secret of sixteen bytes or more"


class Receiver:
    """A server on this machine that answers as it is told, and keeps what it was sent."""

    def __init__(self, *answers: int | tuple[int, str]) -> None:
        self.taken: list[tuple[str, dict[str, str], bytes]] = []
        receiver, left = self, list(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.taken.append((self.path, dict(self.headers), body))
                answer = left.pop(0) if left else 204
                status, location = answer if isinstance(answer, tuple) else (answer, "")
                self.send_response(status)
                if location:
                    self.send_header("Location", location)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                return

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook?team=a"


@contextlib.contextmanager
def receiving(*answers: int | tuple[int, str]) -> Iterator[Receiver]:
    receiver = Receiver(*answers)
    thread = threading.Thread(target=receiver.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        receiver.server.shutdown()
        thread.join()
        receiver.server.server_close()


def test_a_delivery_arrives_whole_and_its_signature_holds() -> None:
    """What the receiver checks is what was sent."""
    body = b'[{"finding": 1}]'
    with receiving() as receiver:
        done = deliver(receiver.url, body, secret=SECRET, now=lambda: 1000.0)
    [(path, headers, taken)] = receiver.taken
    assert (path, taken, done.status, done.attempts) == ("/hook?team=a", body, 204, 1)
    assert headers["Trainguard-Delivery"] == done.delivery
    verify_delivery(taken, headers["Trainguard-Signature"], secret=SECRET, now=1010.0)


@pytest.mark.parametrize(
    ("body", "header", "secret", "now"),
    [
        (b"other", None, SECRET, 1000),
        (b"body", None, b"another secret of 16 bytes", 1000),
        (b"body", None, SECRET, 1301),
        (b"body", None, SECRET, 699),
        (b"body", "", SECRET, 1000),
        (b"body", "t=1000", SECRET, 1000),
        (b"body", "t=1000,v1=" + "0" * 64, SECRET, 1000),
        (b"body", "t=1001,v1={mac}", SECRET, 1000),
    ],
)
def test_a_forged_or_late_delivery_is_refused(body: bytes, header: str | None, secret: bytes, now: float) -> None:
    """Another body, another secret, another time: each is a refusal."""
    honest = signature(b"body", SECRET, 1000)
    given = honest if header is None else header.replace("{mac}", honest.partition("v1=")[2])
    verify_delivery(b"body", honest, secret=SECRET, now=1000)
    with pytest.raises(VerificationError):
        verify_delivery(body, given, secret=secret, now=now)


def test_a_busy_receiver_is_asked_again_with_the_same_identity() -> None:
    """After waits that grow; a receiver that drops known identities takes it once."""
    waited: list[float] = []
    with receiving(503, 429, 200) as receiver:
        done = deliver(receiver.url, b"{}", secret=SECRET, sleep=waited.append)
    assert (done.status, done.attempts, waited) == (200, 3, list(WAITS_SECONDS[:2]))
    assert len({headers["Trainguard-Delivery"] for _, headers, _ in receiver.taken}) == 1


def test_a_receiver_that_never_recovers_is_given_up() -> None:
    """Bounded: four attempts."""
    with receiving(*[500] * 9) as receiver, pytest.raises(Unavailable, match=r"4 attempts.*status 500"):
        deliver(receiver.url, b"{}", secret=SECRET, sleep=lambda _seconds: None)
    assert len(receiver.taken) == len(WAITS_SECONDS) + 1


@pytest.mark.parametrize("answer", [400, 401, 404, 413])
def test_a_refusal_is_not_tried_again(answer: int) -> None:
    """It would be refused again."""
    with receiving(answer) as receiver, pytest.raises(Unavailable, match=f"status {answer}"):
        deliver(receiver.url, b"{}", secret=SECRET, sleep=lambda _seconds: None)
    assert len(receiver.taken) == 1


def test_a_redirect_is_not_followed() -> None:
    """Nobody can send findings on to another address."""
    with receiving() as elsewhere, receiving((307, elsewhere.url)) as receiver:
        with pytest.raises(Unavailable, match="status 307"):
            deliver(receiver.url, b"{}", secret=SECRET, sleep=lambda _seconds: None)
        assert (len(receiver.taken), len(elsewhere.taken)) == (1, 0)


def test_nobody_there_is_said_after_all_attempts() -> None:
    """A port that was open and is not any more."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(Unavailable, match="ConnectionRefusedError"):
        deliver(f"http://127.0.0.1:{port}/", b"{}", secret=SECRET, sleep=lambda _seconds: None)


@pytest.mark.parametrize(
    "url",
    [
        "http://siem.example/hook",
        "ftp://127.0.0.1/",
        "https://",
        "https://user:word@siem.example/",
        "https://siem.example:99999/",
        "http://127.0.0.1/a b",
        "http://127.0.0.1/\r\nX: 1",
        "siem.example",
    ],
)
def test_an_address_that_cannot_be_meant_is_refused_before_anything_is_sent(url: str) -> None:
    """Plain http over a network, passwords in addresses, header injection."""
    with pytest.raises(Misuse):
        deliver(url, b"{}", secret=SECRET)


def test_a_short_secret_and_a_huge_body_are_refused() -> None:
    """Before anything is sent."""
    with pytest.raises(Misuse, match="at least 16 bytes"):
        deliver("http://127.0.0.1/", b"{}", secret=b"short")
    with pytest.raises(Misuse, match="at most"):
        deliver("http://127.0.0.1/", b"x" * (17 << 20), secret=SECRET)


def test_the_verb_delivers_findings_as_one_signed_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a log to a receiver."""
    home = Home(tmp_path / "state")
    monkeypatch.setenv("TRAINGUARD_HOME", str(home.root))
    recorded(home)
    (tmp_path / "secret").write_bytes(SECRET + b"\n")
    with receiving() as receiver:
        words = ["export", "webhook", "--url", receiver.url, "--secret-file", str(tmp_path / "secret"), "bad"]
        assert main(words) == 0
    [(_, headers, body)] = receiver.taken
    at = float(headers["Trainguard-Signature"].partition(",")[0].removeprefix("t="))
    verify_delivery(body, headers["Trainguard-Signature"], secret=SECRET, now=at)
    assert {event["class_uid"] for event in json.loads(body)} == {2004}
    assert "events taken with status 204" in capsys.readouterr().out


def recorded(home: Home) -> None:
    """A run with one finding."""
    silent = ("silent", {"pid": 9, "cmdline": ["python", "-I", "x.py"]}, {"pid": 9})
    told.record(home, "bad", told.whole_run(silent, told.step(1)))


def by_openssl(body: bytes, public: Path, folder: Path) -> bool:
    """What openssl says of an envelope, by the recipe in docs/exports.md."""
    outer = json.loads(body)
    payload = base64.b64decode(outer["payload"])
    (folder / "pae").write_bytes(b"DSSEv1 28 application/vnd.in-toto+json %d " % len(payload) + payload)
    (folder / "sig").write_bytes(base64.b64decode(outer["signatures"][0]["sig"]))
    words = ["openssl", "dgst", "-sha256", "-verify", public, "-signature", folder / "sig", folder / "pae"]
    return subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0


def test_an_envelope_that_the_verb_sent_is_believed_by_openssl_and_not_once_altered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a log to a receiver without a shared secret; the receiver has the public key, and needs nothing of ours."""
    home = Home(tmp_path / "state")
    monkeypatch.setenv("TRAINGUARD_HOME", str(home.root))
    recorded(home)
    with receiving() as receiver:
        assert main(["export", "webhook", "--url", receiver.url, "--envelope", "bad", "--quiet"]) == 0
    [(_, headers, body)] = receiver.taken
    assert headers["Content-Type"] == "application/vnd.dsse.envelope.v1+json"
    assert "Trainguard-Signature" not in headers
    public = home.keys / "attestation.pub"
    at = json.loads(base64.b64decode(json.loads(body)["payload"]))["predicate"]["sealed_at"]
    events = verify_events(body, load_public_key(public), now=at + 10.0)
    assert {event["class_uid"] for event in events} == {2004}
    with pytest.raises(VerificationError, match="away from now"):
        verify_events(body, load_public_key(public), now=at + 301.0)
    outer = json.loads(body)
    payload = base64.b64decode(outer["payload"]).replace(b"High", b"Info", 1).replace(b"Medium", b"Little", 1)
    altered = json.dumps({**outer, "payload": base64.b64encode(payload).decode()}).encode()
    with pytest.raises(VerificationError, match="by none of the 1 known keys"):
        verify_events(altered, load_public_key(public))
    if shutil.which("openssl") is None:
        pytest.skip("no openssl here: the envelope was checked by our own code alone")
    assert by_openssl(body, public, tmp_path)
    assert not by_openssl(altered, public, tmp_path)


def test_the_verb_sends_nothing_that_nobody_can_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = Home(tmp_path / "state")
    monkeypatch.setenv("TRAINGUARD_HOME", str(home.root))
    recorded(home)
    with receiving() as receiver, pytest.raises(SystemExit) as left:
        main(["export", "webhook", "--url", receiver.url, "bad"])
    assert (left.value.code, receiver.taken) == (2, [])
    assert "--secret-file, --envelope or both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "body", "subject", "reason"),
    [
        ("run/v1", {"sealed_at": 1, "events": []}, None, "expected sealed events"),
        ("events/v1", {"sealed_at": "1", "events": []}, None, "expected sealed events"),
        ("events/v1", {"sealed_at": 1, "events": {}}, None, "expected sealed events"),
        ("events/v1", {"sealed_at": 1, "events": [1]}, [{"name": "events", "digest": {"sha256": "0" * 64}}], "digest"),
        ("events/v1", {"sealed_at": 1, "events": [1]}, [], "digest"),
    ],
)
def test_what_the_key_signed_for_something_else_is_no_delivery(kind: str, body: Any, subject: Any, reason: str) -> None:
    """A statement out of the log, say: its signature holds, and it is refused."""
    key = ec.generate_private_key(ec.SECP256R1())
    envelope = sign_statement(statement(kind, body, subject or []), key)
    with pytest.raises(MalformedEvidence, match=reason):
        verify_events(envelope, key.public_key())
