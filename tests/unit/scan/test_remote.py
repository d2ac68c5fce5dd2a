"""Remote files are vetted by ranged reads: the same verdicts, few bytes, and no store can make it read without end."""

from __future__ import annotations

import http.server
import re
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner

from trainguard.cli.scan import command
from trainguard.errors import Misuse, Unavailable
from trainguard.scan import Verdict, remote, vet
from trainguard.scan.remote import Fetched, vet_remote
from trainguard.testing.forge import forge

pytestmark = pytest.mark.torch


@pytest.fixture
def store() -> Iterator[Any]:
    """An empty bucket in memory."""
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


def model(path: Path, tensors: int = 40, elements: int = 50_000) -> Path:
    """A torch file whose tensors are nearly all of it."""
    torch.save({f"layer.{n}": torch.full((elements,), float(n)) for n in range(tensors)}, path)
    return path


def test_of_a_torch_file_only_directory_headers_and_pickle_are_fetched(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 MB of tensors, a few hundred kB of requests."""
    path = model(tmp_path / "a.pt")
    store.pipe_file("/models/a.pt", path.read_bytes())
    seen: list[Fetched] = []
    make = remote.Fetched
    monkeypatch.setattr(remote, "Fetched", lambda *arguments: seen.append(make(*arguments)) or seen[-1])
    report = vet_remote("memory://models/a.pt")
    assert report.verdict is Verdict.SAFE
    assert report.files[0].sha256 is None
    assert report.files[0].globals == vet(path).files[0].globals
    assert seen[0].fetched < 300_000 < path.stat().st_size / 20


@pytest.mark.slow
def test_every_forgery_has_the_verdict_it_has_on_the_disk(tmp_path: Path, store: Any) -> None:
    """The judges are the same; only the bytes come another way."""
    for number, forged in enumerate(forge(tmp_path / "forged", tmp_path / "marker")):
        path = Path(forged.path)
        if number % 3 or not path.is_file():
            continue
        store.pipe_file(f"/f/{path.parent.name}/{path.name}", path.read_bytes())
        address = f"memory://f/{path.parent.name}/{path.name}"
        assert vet_remote(address).verdict is vet(path).verdict, forged


def test_a_prefix_is_vetted_file_by_file_and_a_side_file_is_named(tmp_path: Path, store: Any) -> None:
    """S2 in a bucket."""
    store.pipe_file("/run/model.pt", model(tmp_path / "a.pt").read_bytes())
    store.pipe_file("/run/dcp/.metadata", b"\x80\x02cposix\nmkdir\nX\1\0\0\0x\x85R.")
    report = vet_remote("memory://run")
    assert {file.path: file.verdict.value for file in report.files} == {"model.pt": "safe", "dcp/.metadata": "unsafe"}
    assert next(f for f in report.files if f.path == "dcp/.metadata").reasons[0].technique == "E2"
    result = CliRunner().invoke(command, ["memory://run"])
    assert result.exit_code == 1
    assert "posix.mkdir" in result.output


class Ranges(http.server.BaseHTTPRequestHandler):
    """A file server that knows ranges, unless its path says otherwise."""

    content = b""
    served = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        if "whole" not in self.path:
            self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        match = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if match is None or "whole" in self.path:
            body = self.content
            self.send_response(200)
        else:
            start, end = int(match[1]), int(match[2])
            body = self.content[start : end + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(self.content)}")
        if "short" in self.path:
            body = body[:-1]
        type(self).served += len(body)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server on loopback that holds one model."""
    Ranges.content = model(tmp_path / "a.pt").read_bytes()
    Ranges.served = 0
    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.server_address[1]}"
    listening.shutdown()
    listening.server_close()
    thread.join(5)


def test_over_http_the_tensors_stay_where_they_are(server: str) -> None:
    """Counted by the server."""
    report = vet_remote(f"{server}/a.pt")
    assert report.verdict is Verdict.SAFE, report
    assert Ranges.served < 300_000 < len(Ranges.content) / 20


def test_a_server_without_ranges_or_with_other_lengths_is_refused(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence, and no endless download."""
    monkeypatch.setattr(remote, "FETCH_BYTES", 1 << 20)
    for path in ("whole.pt", "short.pt", "missing/../whole"):
        report = vet_remote(f"{server}/{path}")
        assert report.verdict is Verdict.ERROR
        assert len(report.files[0].reasons) == 1


def test_a_format_that_must_be_read_whole_ends_at_the_limit(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that says what to do, never a verdict on half a file."""
    monkeypatch.setattr(remote, "FETCH_BYTES", 1 << 14)
    store.pipe_file("/a.pkl", b"\x80\x02B\x00\x00\x02\x00" + bytes(1 << 17) + b".")
    store.pipe_file("/b.txt", b"words \n" * 10_000)
    for name in ("a.pkl", "b.txt"):
        report = vet_remote(f"memory://{name}")
        assert report.verdict is Verdict.ERROR
        assert "download it" in report.files[0].reasons[0].what


def test_a_file_that_changes_while_it_is_read_has_no_verdict(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk."""
    store.pipe_file("/a.pt", model(tmp_path / "a.pt", 2, 10).read_bytes())
    judge = remote.judge_source

    def rewrite(*arguments: Any, **options: Any) -> Any:
        result = judge(*arguments, **options)
        store.pipe_file("/a.pt", b"another")
        return result

    monkeypatch.setattr(remote, "judge_source", rewrite)
    assert "changed while it was read" in vet_remote("memory://a.pt").files[0].reasons[0].what


def test_addresses_we_do_not_read_are_refused_in_one_sentence(store: Any) -> None:
    """Chains of file systems would show other bytes; a missing package and a missing file say so."""
    for address in ("simplecache::memory://a", "zip://a::memory://b", "ftp://host/a", "://x"):
        with pytest.raises(Misuse, match="expected an address of"):
            vet_remote(address)
    with pytest.raises(Unavailable, match="needs a package"):
        vet_remote("gs://bucket/a.pt")
    missing = vet_remote("memory://missing.pt")
    assert missing.verdict is Verdict.ERROR
    assert "cannot be read: FileNotFoundError" in missing.files[0].reasons[0].what


def test_a_zip_that_lies_about_its_directory_costs_no_more_than_the_limit(tmp_path: Path, store: Any) -> None:
    """The attacker owns every offset in it."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(300):
            archive.writestr(f"a/data/{number}", b"")
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\5\6")
    data[at + 16 : at + 20] = (0).to_bytes(4, "little")
    store.pipe_file("/a.zip", bytes(data))
    assert vet_remote("memory://a.zip").verdict is Verdict.UNSAFE
