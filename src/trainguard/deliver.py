"""Delivery to a webhook: signed, bounded, tried a few times (docs/exports.md).

    deliver("https://siem.example/hook", body, secret=b"…")

    Trainguard-Signature: t=<seconds since the epoch>,v1=<HMAC-SHA-256 of "<t>.<body>", hex>
    Trainguard-Delivery:  <first 32 hex digits of the body's SHA-256>

    deliver(url, sealed_events(events, key, at=now), secret=None)

The second form is a DSSE envelope around an in-toto statement, by the key that signs the log's statements: anybody who
has its public half can check it, today or in a year, with `verify_events`, cosign or openssl, and no secret is shared.

A receiver checks the first with `verify_delivery` (constant time, with a tolerance against resubmission) and drops
deliveries it knows by the second: the same body has the same id, however often it is sent. No redirect is followed,
so a body goes nowhere but where it was addressed; plain HTTP only to this machine.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import re
import ssl
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from trainguard.digest import canonical_json, sha256_hex
from trainguard.envelope import PREDICATE_BASE, sign_statement, statement, verify_statement
from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError

BODY_LIMIT_BYTES = 16 << 20
EVENTS = "events/v1"
"""Predicate type of sealed events; their subject is the SHA-256 of the events as canonical JSON."""
ENVELOPE_TYPE = "application/vnd.dsse.envelope.v1+json"
ANSWER_LIMIT_BYTES = 64 << 10
SECRET_BYTES = 16
TIMEOUT_SECONDS = 10.0
WAITS_SECONDS = (0.5, 2.0, 8.0)
"""Between attempts; one more attempt than waits."""
TOLERANCE_SECONDS = 300
AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
"""Answers after which trying again can help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """How a delivery went."""

    status: int
    attempts: int
    delivery: str


def deliver(
    url: str,
    body: bytes,
    *,
    secret: bytes | None,
    content_type: str = "application/json",
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.time,
) -> Delivered:
    """Post `body` until the receiver takes it. sleep, now: for tests.

    secret: signs the headers; None for a body that carries its own signature.

    Raises Misuse for an address or secret that cannot be meant, Unavailable when nobody took it.
    """
    parts = _address(url)
    if secret is not None and len(secret) < SECRET_BYTES:
        raise Misuse(f"webhook: expected a secret of at least {SECRET_BYTES} bytes, found {len(secret)}")
    if len(body) > BODY_LIMIT_BYTES:
        raise Misuse(f"webhook: expected a body of at most {BODY_LIMIT_BYTES} bytes, found {len(body)}")
    identity = hashlib.sha256(body).hexdigest()[:32]
    why = "not tried"
    for attempt, wait in enumerate((0.0, *WAITS_SECONDS), start=1):
        if wait:
            sleep(wait)
        headers = {
            "Content-Type": content_type,
            "User-Agent": "trainguard",
            "Trainguard-Delivery": identity,
        }
        if secret is not None:
            headers["Trainguard-Signature"] = signature(body, secret, int(now()))
        try:
            status = _post(parts, body, headers)
        except (OSError, http.client.HTTPException) as error:
            why = f"{type(error).__name__}: {error}"[:200]
            continue
        if 200 <= status < 300:
            return Delivered(status=status, attempts=attempt, delivery=identity)
        why = f"status {status}"
        if status not in AGAIN:
            break
    raise Unavailable(f"webhook {parts.hostname}: not delivered ({attempt} attempts): {why}")


def signature(body: bytes, secret: bytes, at: int) -> str:
    """The header's value for a body sent at `at`, seconds since the epoch."""
    return f"t={at},v1={_mac(body, secret, at)}"


def verify_delivery(body: bytes, header: str, *, secret: bytes, now: float) -> None:
    """Raises VerificationError unless `header` is of this body and secret, and at most 300 s old or ahead."""
    found = re.fullmatch(r"t=(\d{1,12}),v1=([0-9a-f]{64})", header)
    if found is None:
        raise VerificationError(f"webhook: expected t=…,v1=… as signature, found {header[:80]!r}")
    at = int(found[1])
    if not hmac.compare_digest(_mac(body, secret, at), found[2]):
        raise VerificationError("webhook: the signature is of another body or secret")
    if abs(now - at) > TOLERANCE_SECONDS:
        raise VerificationError(
            f"webhook: signed {abs(now - at):.0f} s away from now, {TOLERANCE_SECONDS} are tolerated"
        )


def sealed_events(events: Sequence[Any], key: ec.EllipticCurvePrivateKey, *, at: int) -> bytes:
    """The DSSE envelope (JSON) of `events`, sealed at `at`, seconds since the epoch."""
    digest = {"sha256": sha256_hex(canonical_json(events))}
    body = {"sealed_at": at, "events": list(events)}
    return sign_statement(statement(EVENTS, body, [{"name": "events", "digest": digest}]), key)


def verify_events(body: bytes, key: ec.EllipticCurvePublicKey, *, now: float | None = None) -> list[Any]:
    """The events in an envelope that `key` sealed; with `now`, at most 300 s ago or ahead.

    Raises MalformedEvidence for what is no such envelope, VerificationError where it is another's, or late.
    """
    value = verify_statement(body, [key], where="webhook", limit_bytes=BODY_LIMIT_BYTES)
    told = value["predicate"]
    events, at = told.get("events"), told.get("sealed_at")
    if value.get("predicateType") != PREDICATE_BASE + EVENTS or not isinstance(events, list) or type(at) is not int:
        raise MalformedEvidence(f"webhook: expected sealed events, found {str(value.get('predicateType'))[:80]!r}")
    stated = [{"name": "events", "digest": {"sha256": sha256_hex(canonical_json(events))}}]
    if value.get("subject") != stated:
        raise MalformedEvidence("webhook: expected the digest of the events as subject, found another")
    if now is not None and abs(now - at) > TOLERANCE_SECONDS:
        raise VerificationError(
            f"webhook: sealed {abs(now - at):.0f} s away from now, {TOLERANCE_SECONDS} are tolerated"
        )
    return events


def _mac(body: bytes, secret: bytes, at: int) -> str:
    return hmac.new(secret, b"%d." % at + body, hashlib.sha256).hexdigest()


def _address(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise Misuse(f"webhook: not an address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise Misuse(f"webhook: expected https://HOST/…, found {url[:80]!r}")
    if parts.username is not None or parts.password is not None:
        raise Misuse("webhook: expected an address without a password in it", next_step="use --secret-file")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise Misuse(f"webhook {parts.hostname}: expected https; plain http only goes to this machine (port {port})")
    return parts


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _post(parts: urllib.parse.SplitResult, body: bytes, headers: dict[str, str]) -> int:
    host = parts.hostname or ""
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(host, parts.port, timeout=TIMEOUT_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=TIMEOUT_SECONDS)
    try:
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("POST", path, body=body, headers=headers)
        answer = connection.getresponse()
        answer.read(ANSWER_LIMIT_BYTES)
        return answer.status
    finally:
        connection.close()
