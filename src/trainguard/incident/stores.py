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
from trainguard.errors import Misuse, Unavailable, VerificationError
from trainguard.home import Home
from trainguard.incident.correlate import Incident

LIMIT_BYTES = 256 << 20
"""Of a log, unpacked."""
OBJECTS_LIMIT = 4_000_000
"""Objects and lists in a document of JSON: counted before it is read, because each takes some hundred bytes then."""
LINE_LIMIT_BYTES = 1 << 20
ENTRIES_LIMIT = 1_000_000
TEXT_LIMIT = 1024

Row = tuple[int, str | None, "Entry | None"]
"""Time of a record, its bucket as `s3://bucket`, and the act, where it is one."""
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
    caller: str | None = None
    """Who used the principal, where the store tells it too: a service account may be used by others."""
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


class Cover(msgspec.Struct, frozen=True, kw_only=True):
    """Times of the first and last record of one bucket in one log, reads and refusals included."""

    log: str
    bucket: str
    first_ns: int
    last_ns: int


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """What a log holds, and the time it covers."""

    entries: tuple[Entry, ...]
    covers: tuple[Cover, ...]


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
    covers: tuple[Cover, ...]
    relative: tuple[str, ...] = ()
    """Paths of findings that are not absolute."""

    @property
    def gaps(self) -> list[str]:
        """What the logs cannot tell."""
        said = [f"{path}: no absolute path, so it is no object of a store" for path in self.relative]
        said += [f"{one.path}: no --map covers it" for one in self.files if one.url is None]
        if self.began_ns is None or self.ended_ns is None:
            return [*said, "when the run began and ended is not recorded: no log can be said to cover it"]
        for bucket in dict.fromkeys(bucket_of(one.url) for one in self.files if one.url is not None):
            said += self._uncovered(bucket, self.began_ns, self.ended_ns)
        return said

    def _uncovered(self, bucket: str, began_ns: int, ended_ns: int) -> Iterator[str]:
        """The parts of the run's time from which no log has a record of this bucket before and after."""
        spans = sorted((one.first_ns, one.last_ns) for one in self.covers if one.bucket == bucket)
        if not spans:
            yield f"{bucket}: no record of it is in these logs"
            return
        told = spans[0][1]
        if spans[0][0] > began_ns:
            yield f"{bucket}: the logs begin at {_clock(spans[0][0])}, after the run did ({_clock(began_ns)})"
        for first, last in spans[1:]:
            if first > told and began_ns < first and told < ended_ns:
                yield f"{bucket}: no log covers {_clock(told)} to {_clock(first)}"
            told = max(told, last)
        if told < ended_ns:
            end = _clock(ended_ns)
            yield f"{bucket}: the logs end at {_clock(told)}, before the run did ({end}); deliveries come late"

    def when(self, entry: Entry) -> str:
        """Where an act lies beside the run, by two clocks that may differ."""
        if self.began_ns is None or self.ended_ns is None:
            return "at some time"
        if entry.at_ns < self.began_ns:
            return "before the run"
        return "after the run" if entry.at_ns > self.ended_ns else "during the run"


def writers(incident: Incident, home: Home, logs: Sequence[Path], mapping: Mapping[str, str]) -> Writers:
    """Who wrote the objects behind the files that an incident's findings name.

    Raises as `read_store_log` does, and Misuse where no finding of the incident is about a file.
    """
    named = [
        re.sub(r"(\.py):\d+$", r"\1", finding.subject.path) for finding in incident.findings if finding.subject.path
    ]
    paths = [path for path in named if path.startswith("/")]
    if not named:
        raise Misuse(
            f"incident {incident.id}: none of its findings is about a file",
            next_step=f"trainguard incident show {incident.id}",
        )
    read = [read_store_log(path) for path in logs]
    began, ended = _times(home, incident.run)
    return Writers(
        incident=incident.id,
        run=incident.run,
        began_ns=began,
        ended_ns=ended,
        files=writings(paths, [entry for log in read for entry in log.entries], mapping),
        covers=tuple(cover for log in read for cover in log.covers),
        relative=tuple(dict.fromkeys(path for path in named if not path.startswith("/"))),
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

    Raises Unavailable where it cannot be read, is none of the forms, or is over its limits.
    """
    data = _bytes(path)
    name = path.name
    start = data.lstrip()[:1]
    rows = _json_rows(data, name) if start in (b"{", b"[") else _text_rows(data, name)
    spans: dict[str, tuple[int, int]] = {}
    entries: dict[Entry, Entry] = {}
    count = 0
    for count, (at, bucket, entry) in enumerate(rows, 1):
        if count > ENTRIES_LIMIT:
            raise Unavailable(f"{name}: expected at most {ENTRIES_LIMIT:,} records, found more; split the log")
        if bucket is not None:
            first, last = spans.get(bucket, (at, at))
            spans[bucket] = (min(first, at), max(last, at))
        if entry is not None:  # deliveries may repeat
            entries.setdefault(msgspec.structs.replace(entry, source=""), entry)
    if not count:
        raise Unavailable(f"{name}: expected a log of an object store, found no record in it")
    covers = tuple(Cover(log=name, bucket=one, first_ns=a, last_ns=b) for one, (a, b) in spans.items())
    return Log(entries=tuple(entries.values()), covers=covers)


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
        raise Unavailable(f"{path.name}: expected at most {LIMIT_BYTES:,} bytes, found more; split the log")
    return data


# -- forms in JSON ----------------------------------------------------------------------------------------------------


def _json_rows(data: bytes, name: str) -> Iterator[Row]:
    """Records of one document (`Records`, `records`, `entries`, a list) or of one a line."""
    for where, record in _records(data, name):
        place = f"{name}:{where}"
        reader = next((reader for fits, reader in FORMS if fits(record)), None)
        if reader is None:
            raise Unavailable(
                f"{place}: expected a record of CloudTrail, Cloud Audit Logs or Azure Storage, "
                f"found the fields {', '.join(sorted(map(str, record))[:6])[:120]!r}"
            )
        yield reader(record, place)


def _records(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    if data.count(b"{") + data.count(b"[") > OBJECTS_LIMIT:
        raise Unavailable(f"{name}: expected at most {OBJECTS_LIMIT:,} objects and lists, found more; split the log")
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        yield from _lines_of_json(data, name)
        return
    if isinstance(value, dict):
        value = next((value[key] for key in ("Records", "records", "entries") if key in value), [value])
    if not isinstance(value, list):
        raise Unavailable(f"{name}: expected a list of records, found {type(value).__name__}")
    for number, record in enumerate(value, 1):
        if not isinstance(record, dict):
            raise Unavailable(f"{name}:{number}: expected a record, found {type(record).__name__}")
        yield number, record


def _lines_of_json(data: bytes, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        if len(line) > LINE_LIMIT_BYTES:
            raise Unavailable(f"{name}:{number}: expected a line of at most {LINE_LIMIT_BYTES:,} bytes")
        try:
            record = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise Unavailable(f"{name}:{number}: expected JSON, one record a line: {error}") from error
        if not isinstance(record, dict):
            raise Unavailable(f"{name}:{number}: expected a record, found {type(record).__name__}")
        yield number, record


CLOUDTRAIL: Mapping[str, Act] = {
    "PutObject": "wrote",
    "CompleteMultipartUpload": "wrote",
    "PostObject": "wrote",
    "CopyObject": "copied",
    "DeleteObject": "deleted",
    "PutObjectAcl": "changed access",
}


def _cloudtrail(record: dict[str, Any], place: str) -> Row:
    at = _when(record.get("eventTime"), place)
    act = CLOUDTRAIL.get(_text(record.get("eventName")) or "")
    given = _object(record.get("requestParameters"))
    bucket, key = _text(given.get("bucketName")), _text(given.get("key"))
    place_of = None if bucket is None else f"s3://{bucket}"
    if act is None or record.get("errorCode") is not None or bucket is None or key is None:
        return at, place_of, None
    who = _object(record.get("userIdentity"))
    arn, chosen = _without_session(_text(who.get("arn")))
    if chosen is not None:
        issuer = _object(_object(who.get("sessionContext")).get("sessionIssuer"))
        arn = _text(issuer.get("arn")) or arn
    answer = _object(record.get("responseElements"))
    return (
        at,
        place_of,
        Entry(
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
        ),
    )


CLOUD_AUDIT: Mapping[str, Act] = {
    "storage.objects.create": "wrote",
    "storage.objects.compose": "wrote",
    "storage.objects.update": "changed access",
    "storage.objects.delete": "deleted",
    "storage.setIamPermissions": "changed access",
}
OBJECT = re.compile(r"projects/_/buckets/([^/]+)/objects/(.+)", re.DOTALL)


def _cloud_audit(record: dict[str, Any], place: str) -> Row:
    at = _when(record.get("timestamp"), place)
    payload = _object(record.get("protoPayload"))
    act = CLOUD_AUDIT.get(_text(payload.get("methodName")) or "")
    resource = _text(payload.get("resourceName")) or ""
    named = OBJECT.fullmatch(resource)
    bucket = resource.split("/")[3] if resource.startswith("projects/_/buckets/") else None
    place_of = None if bucket is None else f"gs://{bucket}"
    failed = _object(payload.get("status")).get("code") not in (None, 0)
    if act is None or named is None or failed:
        return at, place_of, None
    who, how = _object(payload.get("authenticationInfo")), _object(payload.get("requestMetadata"))
    principal = _text(who.get("principalEmail")) or _text(who.get("principalSubject"))
    service = principal is not None and principal.endswith(".gserviceaccount.com")
    return (
        at,
        place_of,
        Entry(
            store="gs",
            bucket=named.group(1),
            key=named.group(2),
            act=act,
            principal=principal or "anonymous",
            kind="service account" if service else "user" if principal else "anonymous",
            caller=_delegated(who.get("serviceAccountDelegationInfo")),
            address=_text(how.get("callerIp")),
            agent=_text(how.get("callerSuppliedUserAgent")),
            at_ns=at,
            request=_text(record.get("insertId")),
            source=place,
        ),
    )


def _delegated(chain: object) -> str | None:
    """Who stands at the end of a chain of accounts that act for each other."""
    for link in reversed(chain[:100] if isinstance(chain, list) else []):
        for party in ("firstPartyPrincipal", "thirdPartyPrincipal"):
            named = _text(_object(_object(link).get(party)).get("principalEmail"))
            if named is not None:
                return named
        subject = _text(_object(link).get("principalSubject"))
        if subject is not None:
            return subject
    return None


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
}


def _azure(record: dict[str, Any], place: str) -> Row:
    at = _when(record.get("time"), place)
    act = AZURE.get(_text(record.get("operationName")) or "")
    try:
        url = urlsplit(_text(record.get("uri")) or "")
        account = (url.hostname or "").partition(".")[0]
    except ValueError:
        return at, None, None
    container, _, key = unquote(url.path).lstrip("/").partition("/")
    place_of = f"az://{account}/{container}" if account and container else None
    worked = str(record.get("statusCode", "2"))[:1] == "2"
    if act is None or not worked or place_of is None or not key:
        return at, place_of, None
    who = _object(record.get("identity"))
    asked = _object(who.get("requester"))
    named = (_text(asked.get(field)) for field in ("upn", "objectId", "appId"))
    kind = _text(who.get("type")) or "unknown"
    token = _text(who.get("tokenHash"))
    return (
        at,
        place_of,
        Entry(
            store="az",
            bucket=f"{account}/{container}",
            key=key,
            act=act,
            principal=next(filter(None, named), None) or (f"{kind} {token[:24]}" if token else kind),
            kind=kind,
            address=re.sub(r"^([\d.]+|\[[^\]]*\]):\d+$", r"\1", _text(record.get("callerIpAddress")) or "") or None,
            agent=_text(_object(record.get("properties")).get("userAgentHeader")),
            at_ns=at,
            request=_text(record.get("correlationId")),
            source=place,
        ),
    )


FORMS: tuple[tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any], str], Row]], ...] = (
    (lambda record: "eventName" in record and "eventTime" in record, _cloudtrail),
    (lambda record: "protoPayload" in record, _cloud_audit),
    (lambda record: "operationName" in record and "time" in record, _azure),
)


# -- S3 server access logs -------------------------------------------------------------------------------------------

HEAD = re.compile(r"(\S+) (\S+) \[([^\]]{1,40})\] (\S+) (\S+) (\S+) (\S+) (\S+) (.*)")
"""Owner, bucket, time, address, requester, request, operation, key, and the rest of a line."""
REST = re.compile(r'(?:"[^"]*"|-) (\S+)(?: \S+){5} (?:"[^"]*"|-) (?:"([^"]*)"|-) ([^"\s]+)(?: [^"]*)?')
"""URI, status, five more, referrer, agent, version. Whoever sends a request may write quotes into three of these: then
the rest says nothing, and the request counts as one that was let in."""
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


def _text_rows(data: bytes, name: str) -> Iterator[Row]:
    for number, raw in enumerate(data.splitlines(), 1):
        if not raw.strip():
            continue
        place = f"{name}:{number}"
        fields = HEAD.fullmatch(raw.decode("utf-8", "replace")) if len(raw) <= LINE_LIMIT_BYTES else None
        if fields is None:
            raise Unavailable(
                f"{place}: expected a line of an S3 server access log, or JSON, found {raw[:60]!r}",
            )
        yield _access(fields, place)


def _access(fields: re.Match[str], place: str) -> Row:
    _, bucket, time, address, requester, request, operation, key, rest = fields.groups()
    more = REST.fullmatch(rest)
    status, agent, version = more.groups() if more is not None else ("-", None, None)
    try:
        at = int(datetime.datetime.strptime(time, "%d/%b/%Y:%H:%M:%S %z").timestamp()) * 10**9
    except (ValueError, OverflowError) as error:
        raise Unavailable(f"{place}: expected a time such as 06/Feb/2026:00:00:38 +0000, found {time!r}") from error
    act = OPERATIONS.get(operation)
    worked = status == "-" or status[:1] == "2"
    if act is None or not worked or key == "-":
        return at, f"s3://{bucket}", None
    role, chosen = _without_session(requester)
    rule = operation.startswith("S3.")
    return (
        at,
        f"s3://{bucket}",
        Entry(
            store="s3",
            bucket=bucket,
            key=unquote(unquote(key)) if operation.startswith("REST.") else unquote(key),  # requests are encoded twice
            act=act,
            principal="the store's own rules"
            if rule
            else "anonymous"
            if role in ("-", None)
            else str(role)[:TEXT_LIMIT],
            kind="lifecycle" if rule else "session" if chosen else "requester",
            chosen=chosen,
            address=None if address == "-" else address,
            agent=agent[:TEXT_LIMIT] if agent else None,
            at_ns=at,
            request=request,
            version=None if version in ("-", None) else version,
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
        raise Unavailable(f"{place}: expected a time such as 2026-11-22T10:00:00Z, found {text[:40]!r}")
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return (since.days * 86_400 + since.seconds) * 10**9 + since.microseconds * 1000


def _without_session(arn: str | None) -> tuple[str | None, str | None]:
    """An ARN without the name that whoever opened the session chose, and that name."""
    if arn is None or not re.search(r":(?:assumed-role|federated-user)/", arn):
        return arn, None
    role, _, chosen = arn.rpartition("/")
    return role, chosen


def bucket_of(url: str) -> str:
    """`s3://bucket` of an object; `az://account/container`."""
    store, _, rest = url.partition("://")
    return f"{store}://{'/'.join(rest.split('/')[: 2 if store == 'az' else 1])}"


def _clock(at_ns: int) -> str:
    return datetime.datetime.fromtimestamp(at_ns // 10**9, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value[:TEXT_LIMIT] if isinstance(value, str) and value else None
