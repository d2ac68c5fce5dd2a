"""What a checkpoint consists of: read strictly, hashed as OMS and Go do."""

import hashlib
import os
import socket
import stat
from pathlib import Path

import pytest

from trainguard.errors import Misuse, Unavailable
from trainguard.home import Home
from trainguard.seal import manifest as m
from trainguard.seal import seal_path, verify_seal
from trainguard.seal.manifest import (
    SINGLE,
    directory_hash,
    go_dirhash,
    list_entries,
    read_manifest,
    resolve,
    root_digest,
    seal_path_of,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two files, one below, an empty folder, a link, a git file, and a seal."""
    root = tmp_path / "model"
    (root / "sub").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "b.bin").write_bytes(b"bb")
    (root / "sub" / "a.bin").write_bytes(b"a")
    (root / "link.bin").symlink_to("sub/a.bin")
    (root / ".gitignore").write_text("*.tmp\n")
    (root / "model.sig").write_text("an old seal")
    (root / "b.bin").chmod(0o640)
    return root


def test_every_kind_of_entry_is_recorded(folder: Path) -> None:
    """Size, mode, kind and link target of each; the seal itself is left out."""
    read = {entry.name: entry for entry in read_manifest(folder).entries}
    assert set(read) == {".gitignore", "b.bin", "empty", "link.bin", "sub/a.bin"}
    assert (read["b.bin"].kind, read["b.bin"].size, read["b.bin"].mode) == ("file", 2, 0o640)
    assert (read["link.bin"].kind, read["link.bin"].target) == ("link", "sub/a.bin")
    assert read["link.bin"].digest == read["sub/a.bin"].digest == hashlib.sha256(b"a").hexdigest()
    assert (read["empty"].kind, read["empty"].digest) == ("folder", None)


def test_what_oms_ignores_is_ours_to_bind(folder: Path) -> None:
    """OMS lists files and links; `.git*` at the top and empty folders are in the rest, `.git*` below is not special."""
    (folder / "sub" / ".gitignore").write_text("")
    manifest = read_manifest(folder)
    assert [e.name for e in manifest.resources] == ["b.bin", "link.bin", "sub/.gitignore", "sub/a.bin"]
    assert [e.name for e in manifest.others] == [".gitignore", "empty"]


def test_names_are_sorted_by_code_point(tmp_path: Path) -> None:
    """OMS section 5.2.1; not by locale, and not folder by folder."""
    for name in ("b", "a/z", "a.x", "é", "B"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [e.name for e in list_entries(tmp_path)] == ["B", "a.x", "a/z", "b", "é"]


def test_one_file_is_a_manifest_of_one(tmp_path: Path) -> None:
    """Called `.`, as model_signing calls it, so that it may be renamed."""
    path = tmp_path / "c.pt"
    path.write_bytes(b"x")
    manifest = read_manifest(path)
    assert (manifest.single, manifest.name, [e.name for e in manifest.entries]) == (True, "c.pt", [SINGLE])


def test_the_root_digest_is_blind_to_names_and_dirhash_is_not() -> None:
    """Why dirHash stands beside it."""
    first, second = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    assert root_digest(iter([first])) == hashlib.sha256(bytes.fromhex(first)).hexdigest()
    assert directory_hash(iter([("a", first)])) != directory_hash(iter([("b", first)]))
    assert directory_hash(iter([("b", second), ("a", first)])) == directory_hash(iter([("a", first), ("b", second)]))


def test_dirhash_is_what_go_prints() -> None:
    """Worked by hand from Hash1's definition: sorted lines `<hex>  <name>\\n`, SHA-256, base64."""
    digest = hashlib.sha256(b"x").hexdigest()
    lines = f"{digest}  a\n{digest}  b\n".encode()
    value = directory_hash(iter([("b", digest), ("a", digest)]))
    assert value == hashlib.sha256(lines).hexdigest()
    assert go_dirhash(value).startswith("h1:")
    assert len(go_dirhash(value)) == 3 + 44


@pytest.mark.parametrize("kind", ["fifo", "socket", "outside", "parent", "dangling", "circle", "folder link", "device"])
def test_what_is_no_regular_file_is_refused_unopened(folder: Path, kind: str) -> None:
    """One sentence that names it; nothing hangs."""
    path = folder / "odd"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif kind == "device":
        try:
            os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making device nodes needs root")
    else:
        targets = {
            "outside": "/etc/hostname",
            "parent": "..",
            "dangling": "none",
            "circle": "odd",
            "folder link": "sub",
        }
        path.symlink_to(targets[kind])
    with pytest.raises(Unavailable, match="odd"):
        read_manifest(folder)


def test_an_empty_checkpoint_is_refused(tmp_path: Path) -> None:
    """OMS section 6.1: at least one file."""
    (tmp_path / "m").mkdir()
    with pytest.raises(Unavailable, match="no file in it"):
        read_manifest(tmp_path / "m")


@pytest.mark.parametrize("name", ["a\nb", "a\x1bb", b"a\xff".decode("utf-8", "surrogateescape")])
def test_names_that_cannot_be_signed_unambiguously_are_refused(tmp_path: Path, name: str) -> None:
    """Hash1 would read a newline as another file; JSON has no bytes that are not UTF-8."""
    (tmp_path / "m").mkdir()
    Path(os.fsdecode(os.fsencode(str(tmp_path / "m" / name)))).write_bytes(b"")
    with pytest.raises(Unavailable, match="control characters"):
        read_manifest(tmp_path / "m")


def test_names_in_any_script_are_fine(tmp_path: Path) -> None:
    """Spaces, accents, emoji, non-breaking space."""
    names = ["ein Modell.pt", "模型.pt", "🚀", "a\u00a0b"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert {e.name for e in read_manifest(tmp_path).entries} == set(names)


def test_a_file_that_changes_while_it_is_read_is_unavailable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size, times, inode or mode: whichever moves between listing and the last byte."""
    original = m._digest

    def meanwhile(*arguments: object) -> object:
        (folder / "b.bin").write_bytes(b"cc")
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(m, "_digest", meanwhile)
    with pytest.raises(Unavailable, match="changed while it was read"):
        read_manifest(folder)


def test_a_file_that_appears_while_reading_is_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is listed again at the end."""
    original = m._digest

    def meanwhile(*arguments: object) -> object:
        (folder / "late.bin").write_bytes(b"cc")
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(m, "_digest", meanwhile)
    with pytest.raises(Unavailable, match="changed while it was read"):
        read_manifest(folder)


def test_a_link_slipped_in_after_listing_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """O_NOFOLLOW on every component: neither the file nor the folder above it may become a link."""
    original = m._open

    def swap_file(path: Path, root: int | None, name: str) -> int:
        if name == "sub/a.bin" and not (folder / "sub").is_symlink():
            (folder / "sub").rename(folder.parent / "elsewhere")
            (folder / "sub").symlink_to(folder.parent / "elsewhere")
        return original(path, root, name)

    monkeypatch.setattr(m, "_open", swap_file)
    with pytest.raises(Unavailable):
        read_manifest(folder)


def test_too_many_entries_and_too_deep_folders_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounded before anything is read."""
    monkeypatch.setattr(m, "ENTRY_LIMIT", 3)
    for number in range(4):
        (tmp_path / str(number)).write_bytes(b"")
    with pytest.raises(Unavailable, match="more than 3 entries"):
        list_entries(tmp_path)
    monkeypatch.setattr(m, "ENTRY_LIMIT", 1000)
    deep = tmp_path / "d"
    for _ in range(m.DEPTH_LIMIT + 2):
        deep = deep / "d"
    deep.mkdir(parents=True)
    with pytest.raises(Unavailable, match="nested deeper"):
        list_entries(tmp_path)


def test_a_path_is_resolved_or_refused_in_one_sentence(tmp_path: Path) -> None:
    """Missing, circular, impossible."""
    (tmp_path / "x").symlink_to("y")
    (tmp_path / "y").symlink_to("x")
    for path in (tmp_path / "none", tmp_path / "x"):
        with pytest.raises(Unavailable, match="expected a checkpoint"):
            resolve(path)
    with pytest.raises(Misuse, match="not a path"):
        resolve(Path("a\0b"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_unavailable(folder: Path) -> None:
    """Names the file."""
    (folder / "b.bin").chmod(0)
    with pytest.raises(Unavailable, match=r"b\.bin: cannot be opened"):
        read_manifest(folder)


def test_the_seal_lies_where_oms_tools_look(folder: Path) -> None:
    """model.sig inside a folder, `.sig` beside a file."""
    assert seal_path_of(folder) == folder / "model.sig"
    assert seal_path_of(folder / "b.bin") == folder / "b.bin.sig"


@pytest.mark.parametrize("hash_type", ["sha256", "blake3", "blake2b"])
def test_all_hash_types_of_oms_can_be_read(folder: Path, hash_type: str) -> None:
    """64 or 128 hex digits."""
    digests = {e.digest for e in read_manifest(folder, hash_type=hash_type).resources}
    assert {len(d or "") for d in digests} == {128 if hash_type == "blake2b" else 64}


def test_a_file_that_grew_into_a_hole_is_refused_without_reading_it(tmp_path: Path) -> None:
    """A truncate to terabytes would keep a verifier busy for hours; its size alone says that it changed."""
    state = Home(tmp_path / "state")
    root = tmp_path / "ckpt"
    root.mkdir()
    (root / "a.bin").write_bytes(b"a" * 100)
    (root / "b.bin").write_bytes(b"b" * 100)
    seal_path(state, root, run="r", step=1)
    os.truncate(root / "a.bin", 1 << 42)
    (root / "b.bin").write_bytes(b"c" * 100)
    report = verify_seal(root, home=state)
    assert report.status == "violated"
    assert {f.subject.path for f in report.findings} == {"ckpt/a.bin", "ckpt/b.bin"}
    assert any("far longer" in f.message for f in report.findings)
    (root / "b.bin").write_bytes(b"b" * 100)
    os.truncate(root / "a.bin", 100)
    assert verify_seal(root, home=state).status == "upheld"
