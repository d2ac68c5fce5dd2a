"""Who wrote an object, by the object store's own log: claimed evidence beside what our log witnesses (docs/stores.md).

    entries = read_store_log(Path("cloudtrail.json.gz"))
    told = writings(files, entries, {"/mnt/ckpt/": "s3://models/team-a/"})

Read are AWS CloudTrail data events, Amazon S3 server access logs, Google Cloud audit logs of Cloud Storage and Azure
Storage resource logs, plain or gzipped. What they say is the word of whoever runs the store, and of whoever delivered
the file: it names a principal that the store let in, and never who used it. It changes no incident and no candidate.
"""

from __future__ import annotations

import datetime
import gzip
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import msgspec

from trainguard.archive import RunReader
from trainguard.errors import MalformedEvidence, Misuse, Unavailable, VerificationError
from trainguard.home import Home
from trainguard.incident.correlate import Incident

LIMIT_BYTES = 256 << 20
"""Of a log, unpacked."""
LINE_LIMIT_BYTES = 1 << 20
ENTRIES_LIMIT = 1_000_000
TEXT_LIMIT = 1024

Act = Literal["wrote", "copied", "deleted", "changed access"]
Store = Literal["s3", "gs", "az"]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One act on one object, as the store tells it."""

    store: Store
    bucket: str
    """Bucket; of Azure `account/container`."""
    key: str
    act: Act
    principal: str
    """As the store names it: an ARN, a service account, an object id; `anonymous` where it let anybody."""
    kind: str
    """IAMUser, AssumedRole, Root, service account, SAS, AccountKey, …"""
    chosen: str | None = None
    """A name that whoever came in chose for the session: it points at nobody."""
    address: str | None = None
    agent: str | None = None
    at_ns: int
    """Nanoseconds since the epoch, by the store's clock."""
    request: str | None = None
    version: str | None = None
    source: str
    """`file:line` or `file:record` of the log."""

    @property
    def url(self) -> str:
        """`s3://bucket/key`."""
        return f"{self.store}://{self.bucket}/{self.key}"


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What the logs say of one file."""

    path: str
    url: str | None
    """None where no mapping covers the file."""
    entries: tuple[Entry, ...]
    """In the order of the store's clock."""


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """What a log holds, and the time it covers."""

    entries: tuple[Entry, ...]
    first_ns: int | None
    last_ns: int | None
    """Of all that it tells, whatever it is about."""


def writings(paths: Iterable[str], entries: Sequence[Entry], mapping: Mapping[str, str]) -> tuple[Told, ...]:
    """For each local file the entries about its object. mapping: local prefix → `s3://bucket/prefix`.

    Files are told by name alone: what no prefix covers is linked to nothing.
    """
    by_url: dict[str, list[Entry]] = {}
    for entry in entries:
        by_url.setdefault(entry.url, []).append(entry)
    told = []
    for path in dict.fromkeys(paths):
        url = _mapped(path, mapping)
        found = sorted(by_url.get(url, ()), key=lambda one: one.at_ns) if url is not None else ()
        told.append(Told(path=path, url=url, entries=tuple(found)))
    return tuple(told)


def parse_mapping(words: Iterable[str]) -> dict[str, str]:
    """`/mnt/ckpt/=s3://models/team-a/`, several. Raises Misuse."""
    mapping = {}
    for word in words:
        local, equals, url = word.partition("=")
        if not equals or not local.startswith("/") or not re.match(r"(?:s3|gs|az)://[^/]+", url):
            raise Misuse(
                f"--map {word[:120]!r}: expected /LOCAL/PREFIX=s3://BUCKET/PREFIX (or gs://, az://ACCOUNT/CONTAINER/), "
                "found something else"
            )
        mapping[local.rstrip("/") + "/"] = url.rstrip("/") + "/"
    return mapping


class Writers(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to "who wrote these objects?", with what it stands on."""

    schema: str = "trainguard/writers/v1"
    incident: str
    run: str
    began_ns: int | None
    ended_ns: int | None
    """Of the run, by its host's clock."""
    files: tuple[Told, ...]
    covers: tuple[tuple[str, int | None, int | None], ...]
    """Log, and the times of its first and last record."""

    @property
    def gaps(self) -> list[str]:
        """What the logs cannot tell."""
        said = [f"{one.path}: no --map covers it" for one in self.files if one.url is None]
        before = [first for _, first, _ in self.covers if first is not None]
        after = [last for _, _, last in self.covers if last is not None]
        if self.began_ns is not None and not any(first <= self.began_ns for first in before):
            said.append("no log begins before the run did: who wrote an object that the run found is not told")
        if self.ended_ns is not None and not any(last >= self.ended_ns for last in after):
            said.append("no log reaches to the run's end: deliveries come late, and may be missing")
        return said

    def when(self, entry: Entry) -> str:
        """Where an act lies beside the run, by two clocks that may differ."""
        if self.began_ns is not None and entry.at_ns < self.began_ns:
            return "before the run"
        return "after the run" if self.ended_ns is not None and entry.at_ns > self.ended_ns else "during the run"


def writers(incident: Incident, home: Home, logs: Sequence[Path], mapping: Mapping[str, str]) -> Writers:
    """Who wrote the objects behind the files that an incident's findings name.

    Raises as `read_store_log` does, and Misuse where no finding of the incident is about a file.
    """
    named = [re.sub(r":\d+$", "", finding.subject.path) for finding in incident.findings if finding.subject.path]
    paths = [path for path in named if path.startswith("/")]
    if not paths:
        raise Misuse(
            f"incident {incident.id}: none of its findings is about a file",
            next_step=f"trainguard incident show {incident.id}",
        )
    read = [(path.name, read_store_log(path)) for path in logs]
    began, ended = _times(home, incident.run)
    return Writers(
        incident=incident.id,
        run=incident.run,
        began_ns=began,
        ended_ns=ended,
        files=writings(paths, [entry for _, log in read for entry in log.entries], mapping),
        covers=tuple((name, log.first_ns, log.last_ns) for name, log in read),
    )


def _times(home: Home, run: str) -> tuple[int | None, int | None]:
    """Clock of the first and of the last record that verifies."""
    first = last = None
    try:
        for record in RunReader(home, run).records():
            first = record.at if first is None else first
            last = record.at
    except VerificationError:
        pass  # the verdict has it as a finding
    return first, last


def _mapped(path: str, mapping: Mapping[str, str]) -> str | None:
    prefix = max((one for one in mapping if path.startswith(one)), key=len, default=None)
    return None if prefix is None else mapping[prefix] + path[len(prefix) :]


def read_store_log(path: Path) -> Log:
    """The acts on objects in a log; its form is told from its first record.

    Raises Unavailable where it cannot be read, MalformedEvidence where it is none of the forms, or over its limits.
    """
    data = _bytes(path)
    name = path.name
    start = data.lstrip()[:1]
    found: list[tuple[int | None, Entry | None]] = []
    rows = _json_rows(data, name) if start in (b"{", b"[") else _text_rows(data, name)
    for row in rows:
        found.append(row)
        if len(found) > ENTRIES_LIMIT:
            raise MalformedEvidence(f"{name}: expected at most {ENTRIES_LIMIT:,} records, found more; split the log")
    if not found:
        raise MalformedEvidence(f"{name}: expected a log of an object store, found no record in it")
    times = [at for at, _ in found if at is not None]
    entries = {entry: None for _, entry in found if entry is not None}  # deliveries may repeat
    return Log(entries=tuple(entries), first_ns=min(times, default=None), last_ns=max(times, default=None))


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            stream: Any = gzip.GzipFile(fileobj=file) if packed else file
            data: bytes = stream.read(LIMIT_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise Unavailable(f"{path}: cannot be read as a log: {error}", next_step="fetch the log again") from error
    if len(data) > LIMIT_BYTES:
        raise MalformedEvidence(f"{path.name}: expected at most {LIMIT_BYTES:,} bytes, found more; split the log")
    return data


# -- forms in JSON ----------------------------------------------------------------------------------------------------


def _json_rows(data: bytes, name: str) -> Iterator[tuple[int | None, Entry | None]]:
    """Records of one document (`Records`, `records`, `entries`, a list) or of one a line."""
    for where, record in _records(data, name):
        place = f"{name}:{where}"
        reader = next((reader for fits, reader in FORMS if fits(record)), None)
        if reader is None:
            raise MalformedEvidence(
                f"{place}: expected a record of CloudTrail, Cloud Audit Logs or Azure Storage, "
                f"found the fields {', '.join(sorted(map(str, record))[:6])[:120]}"
            )
        yield reader(record, place)


def _records(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        yield from _lines_of_json(data, name)
        return
    if isinstance(value, dict):
        value = next((value[key] for key in ("Records", "records", "entries") if key in value), [value])
    if not isinstance(value, list):
        raise MalformedEvidence(f"{name}: expected a list of records, found {type(value).__name__}")
    for number, record in enumerate(value, 1):
        if not isinstance(record, dict):
            raise MalformedEvidence(f"{name}:{number}: expected a record, found {type(record).__name__}")
        yield number, record


def _lines_of_json(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        if len(line) > LINE_LIMIT_BYTES:
            raise MalformedEvidence(f"{name}:{number}: expected a line of at most {LINE_LIMIT_BYTES:,} bytes")
        try:
            record = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise MalformedEvidence(f"{name}:{number}: expected JSON, one record a line: {error}") from error
        if not isinstance(record, dict):
            raise MalformedEvidence(f"{name}:{number}: expected a record, found {type(record).__name__}")
        yield number, record


CLOUDTRAIL: Mapping[str, Act] = {
    "PutObject": "wrote",
    "CompleteMultipartUpload": "wrote",
    "PostObject": "wrote",
    "RestoreObject": "wrote",
    "CopyObject": "copied",
    "DeleteObject": "deleted",
    "PutObjectAcl": "changed access",
}


def _cloudtrail(record: dict[str, Any], place: str) -> tuple[int | None, Entry | None]:
    at = _when(record.get("eventTime"), place)
    act = CLOUDTRAIL.get(_text(record.get("eventName")) or "")
    given = _object(record.get("requestParameters"))
    bucket, key = _text(given.get("bucketName")), _text(given.get("key"))
    if act is None or record.get("errorCode") is not None or bucket is None or key is None:
        return at, None
    who = _object(record.get("userIdentity"))
    arn, chosen = _text(who.get("arn")), None
    issuer = _object(_object(who.get("sessionContext")).get("sessionIssuer"))
    if who.get("type") == "AssumedRole" and arn is not None:
        chosen = arn.rpartition("/")[2]
        arn = _text(issuer.get("arn")) or arn.rpartition("/")[0]
    answer = _object(record.get("responseElements"))
    return at, Entry(
        store="s3",
        bucket=bucket,
        key=key,
        act=act,
        principal=arn or _text(who.get("invokedBy")) or _text(who.get("principalId")) or "anonymous",
        kind=_text(who.get("type")) or "unknown",
        chosen=chosen,
        address=_text(record.get("sourceIPAddress")),
        agent=_text(record.get("userAgent")),
        at_ns=at,
        request=_text(record.get("requestID")),
        version=_text(answer.get("x-amz-version-id")),
        source=place,
    )


CLOUD_AUDIT: Mapping[str, Act] = {
    "storage.objects.create": "wrote",
    "storage.objects.compose": "wrote",
    "storage.objects.update": "changed access",
    "storage.objects.delete": "deleted",
    "storage.setIamPermissions": "changed access",
}
OBJECT = re.compile(r"projects/_/buckets/([^/]+)/objects/(.+)", re.DOTALL)


def _cloud_audit(record: dict[str, Any], place: str) -> tuple[int | None, Entry | None]:
    at = _when(record.get("timestamp"), place)
    payload = _object(record.get("protoPayload"))
    act = CLOUD_AUDIT.get(_text(payload.get("methodName")) or "")
    named = OBJECT.fullmatch(_text(payload.get("resourceName")) or "")
    failed = _object(payload.get("status")).get("code") not in (None, 0)
    if act is None or named is None or failed:
        return at, None
    who, how = _object(payload.get("authenticationInfo")), _object(payload.get("requestMetadata"))
    principal = _text(who.get("principalEmail")) or _text(who.get("principalSubject"))
    service = principal is not None and principal.endswith(".gserviceaccount.com")
    return at, Entry(
        store="gs",
        bucket=named.group(1),
        key=named.group(2),
        act=act,
        principal=principal or "anonymous",
        kind="service account" if service else "user" if principal else "anonymous",
        address=_text(how.get("callerIp")),
        agent=_text(how.get("callerSuppliedUserAgent")),
        at_ns=at,
        request=_text(record.get("insertId")),
        source=place,
    )


AZURE: Mapping[str, Act] = {
    "PutBlob": "wrote",
    "PutBlockList": "wrote",
    "PutBlobFromURL": "copied",
    "CopyBlob": "copied",
    "CopyBlobFromURL": "copied",
    "AppendBlock": "wrote",
    "PutPage": "wrote",
    "DeleteBlob": "deleted",
    "FlushFile": "wrote",
    "DeleteFile": "deleted",
    "RenamePathFile": "copied",
    "SetBlobTier": "changed access",
}


def _azure(record: dict[str, Any], place: str) -> tuple[int | None, Entry | None]:
    at = _when(record.get("time"), place)
    act = AZURE.get(_text(record.get("operationName")) or "")
    try:
        url = urlsplit(_text(record.get("uri")) or "")
        account = (url.hostname or "").partition(".")[0]
    except ValueError:
        return at, None
    container, _, key = unquote(url.path).lstrip("/").partition("/")
    worked = str(record.get("statusCode", "2"))[:1] == "2"
    if act is None or not worked or not account or not container or not key:
        return at, None
    who = _object(record.get("identity"))
    asked = _object(who.get("requester"))
    named = (_text(asked.get(field)) for field in ("upn", "objectId", "appId"))
    kind = _text(who.get("type")) or "unknown"
    token = _text(who.get("tokenHash"))
    return at, Entry(
        store="az",
        bucket=f"{account}/{container}",
        key=key,
        act=act,
        principal=next(filter(None, named), None) or (f"{kind} {token[:24]}" if token else kind),
        kind=kind,
        address=(_text(record.get("callerIpAddress")) or "").rpartition(":")[0] or None,
        agent=_text(_object(record.get("properties")).get("userAgentHeader")),
        at_ns=at,
        request=_text(record.get("correlationId")),
        source=place,
    )


FORMS: tuple[
    tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any], str], tuple[int | None, Entry | None]]], ...
] = (
    (lambda record: "eventName" in record and "eventTime" in record, _cloudtrail),
    (lambda record: "protoPayload" in record, _cloud_audit),
    (lambda record: "operationName" in record and "time" in record, _azure),
)


# -- S3 server access logs -------------------------------------------------------------------------------------------

ACCESS = re.compile(
    r'(\S+) (\S+) \[([^\]]{1,40})\] (\S+) (\S+) (\S+) (\S+) (\S+) (?:"([^"]*)"|-) (\S+) (\S+) (\S+) (\S+) (\S+) (\S+) '
    r'(?:"([^"]*)"|-) (?:"(.*?)"|-) (\S+)(?: .*)?'
)
"""Owner, bucket, time, address, requester, request, operation, key, URI, status, error, …, referrer, agent, version."""
OPERATIONS: Mapping[str, Act] = {
    "REST.PUT.OBJECT": "wrote",
    "REST.POST.UPLOAD": "wrote",
    "REST.POST.OBJECT": "wrote",
    "REST.COPY.OBJECT": "copied",
    "REST.DELETE.OBJECT": "deleted",
    "BATCH.DELETE.OBJECT": "deleted",
    "S3.EXPIRE.OBJECT": "deleted",
    "S3.CREATE.DELETEMARKER": "deleted",
    "REST.PUT.ACL": "changed access",
}


def _text_rows(data: bytes, name: str) -> Iterator[tuple[int | None, Entry | None]]:
    for number, raw in enumerate(data.splitlines(), 1):
        if not raw.strip():
            continue
        place = f"{name}:{number}"
        fields = ACCESS.fullmatch(raw.decode("utf-8", "replace")) if len(raw) <= LINE_LIMIT_BYTES else None
        if fields is None:
            raise MalformedEvidence(
                f"{place}: expected a line of an S3 server access log, or JSON, found {raw[:60]!r}",
            )
        yield _access(fields, place)


def _access(fields: re.Match[str], place: str) -> tuple[int, Entry | None]:
    _, bucket, time, address, requester, request, operation, key, _, status = fields.groups()[:10]
    try:
        at = int(datetime.datetime.strptime(time, "%d/%b/%Y:%H:%M:%S %z").timestamp()) * 10**9
    except (ValueError, OverflowError) as error:
        raise MalformedEvidence(
            f"{place}: expected a time such as 06/Feb/2026:00:00:38 +0000, found {time!r}"
        ) from error
    act = OPERATIONS.get(operation)
    worked = status == "-" or status[:1] == "2"
    if act is None or not worked or key == "-":
        return at, None
    role, chosen = requester, None
    if ":assumed-role/" in requester:
        role, _, chosen = requester.rpartition("/")
    lifecycle = operation.startswith("S3.")
    return (
        at,
        Entry(
            store="s3",
            bucket=bucket,
            key=unquote(unquote(key)),  # some characters are written encoded twice
            act=act,
            principal="the store's own rules" if lifecycle else "anonymous" if role == "-" else role[:TEXT_LIMIT],
            kind="lifecycle" if lifecycle else "AssumedRole" if chosen else "requester",
            chosen=chosen,
            address=None if address == "-" else address,
            agent=(fields.group(17) or None) and fields.group(17)[:TEXT_LIMIT],
            at_ns=at,
            request=request,
            version=None if fields.group(18) == "-" else fields.group(18),
            source=place,
        ),
    )


# -- values ----------------------------------------------------------------------------------------------------------


def _when(value: object, place: str) -> int:
    """Nanoseconds since the epoch of an RFC 3339 time with a zone."""
    text = re.sub(r"(\.\d{6})\d+", r"\1", _text(value) or "").replace("Z", "+00:00")
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise MalformedEvidence(f"{place}: expected a time such as 2026-11-22T10:00:00Z, found {text[:40]!r}")
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value[:TEXT_LIMIT] if isinstance(value, str) and value else None
