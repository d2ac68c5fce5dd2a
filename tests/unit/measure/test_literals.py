"""Which files a script names in its own text."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainguard.measure import data
from trainguard.measure.literals import TEXT_LIMIT_BYTES, Literals, literals_of


@pytest.mark.parametrize(
    ("text", "options", "read"),
    [
        ("torch.load('start.pt')", (), ("start.pt",)),
        ("torch.load(f='start.pt', map_location='cpu')", (), ("start.pt", "cpu")),
        ("NAME = 'rows.csv'\nopen(NAME).read()", (), ("rows.csv",)),
        ("with open('rows.csv', 'r', encoding='utf-8') as f: pass", (), ("rows.csv", "r", "utf-8")),
        ("Path('rows.csv').read_text()", (), ("rows.csv",)),
        ("json.load(open(Path('rows.json')))", (), ("rows.json",)),
        ("np.load('a.npy'); np.memmap('b.bin', dtype=np.uint16)", (), ("a.npy", "b.bin")),
        ("p.add_argument('-i', '--input-file', default='names.txt')", (("input-file", "names.txt"),), ()),
        ("@click.option('--data', default='rows.csv')\ndef main(data): pass", (("data", "rows.csv"),), ()),
        ("D = 'rows'\np.add_argument('--data', default=D)", (("data", "rows"),), ()),
        ("open('log.txt', 'w'); open('log.txt')", (), ()),
        ("Path('log.txt').open('a'); Path('log.txt').read_text()", (), ()),
        ("open('log.txt', mode='x'); open('log.txt')", (), ()),
        ("torch.save(model, 'last.pt'); torch.load('last.pt')", (), ()),
        ("frame.to_csv('out.csv'); pd.read_csv('out.csv')", (), ()),
        ("NAME = 'a'\nNAME = 'b'\nopen(NAME)", (), ()),
        ("for NAME in names: open(NAME)\nNAME = 'a'", (), ()),
        ("def f(name):\n    open(name)\nname = 'a'", (), ()),
        ("open(f'{a}.txt'); open(x + 'y'); fn('z')", (), ()),
        ("def f(:", (), ()),
        ("\0", (), ()),
    ],
)
def test_literals_are_sorted_by_what_is_done_with_them(
    text: str, options: tuple[tuple[str, str], ...], read: tuple[str, ...]
) -> None:
    """Words that are no path are harmless: they name no file."""
    found = literals_of(text.encode())
    assert (found.options, found.read) == (options, read)


def test_a_hostile_text_is_bounded() -> None:
    """Too long, too deep, too many: no literals, or the first ones."""
    assert literals_of(b"#" * (TEXT_LIMIT_BYTES + 1)) == Literals()
    assert literals_of(b"(" * 100_000) == Literals()
    assert len(literals_of("\n".join(f"open('{i}')" for i in range(5000)).encode()).read) == 1000


def test_a_default_counts_unless_the_command_gives_its_option(tmp_path: Path) -> None:
    """And folders that hold other things than one job's data never do."""
    for name in ("rows.csv", "other.csv", "start.pt", "model.pt"):
        (tmp_path / name).write_text("x")
    literals = Literals(
        options=(("data", "rows.csv"), ("log-dir", "logs"), ("cache", "/tmp"), ("at", "."), ("model", "model.pt")),
        read=("start.pt", "model.pt", "absent.txt", "/dev/zero"),
    )

    def names(*argv: str) -> list[str]:
        found = data.inputs_of(argv, cwd=tmp_path, code_root=tmp_path, data=(), outputs=(), literals=literals)
        assert [path.name for path in found.written] == ["logs"]
        return [f"{entry.role}:{entry.label}" for entry in found.read]

    assert names() == ["data:rows.csv", "weights:start.pt"]
    assert names("--data", "other.csv") == ["data:other.csv", "weights:start.pt"]
