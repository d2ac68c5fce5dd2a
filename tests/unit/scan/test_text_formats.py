"""Text beside models: YAML tags, LightGBM's models, XGBoost's UBJSON, what only looks like JSON. What each refuses."""

from __future__ import annotations

from typing import Any

import pytest

from trainguard.scan import ScanPolicy, Verdict
from trainguard.scan.formats import lightgbm
from trainguard.scan.source import BytesSource
from trainguard.scan.vet import judge_source


def judged(data: bytes, name: str, policy: ScanPolicy | None = None) -> tuple[Verdict, str]:
    """(verdict, format) of bytes called `name`."""
    notes, (form, _) = judge_source(BytesSource(data), policy or ScanPolicy(), name, in_folder=True)
    return notes.verdict, form


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/tuple [1, 2]\n",
        "a: !!python/name:torch.nn.modules.activation.GELU ''\n",
        "a: !!python/object/apply:pathlib.PosixPath [runs, x]\n",
        "a: !<tag:yaml.org,2002:python/tuple> [1]\n",
        "a: !custom [1]\nb: wow! nice!\n",
    ],
)
def test_tags_of_plain_values_and_listed_names_are_inert(text: str) -> None:
    """What Lightning writes into hparams.yaml."""
    assert judged(text.encode(), "hparams.yaml") == (Verdict.SAFE, "yaml")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("a: !!python/object/apply:os.system [x]\n", Verdict.UNSAFE),
        ("a: !!%70ython/object/apply:os.system [x]\n", Verdict.UNSAFE),
        ("a: !!python/object/apply:o%73.system [x]\n", Verdict.UNSAFE),
        ("a: !<tag:yaml.org,2002:python/object/apply:os.system> [x]\n", Verdict.UNSAFE),
        ("%TAG !e! tag:yaml.org,2002:py\n---\na: !e!thon/object/apply:os.system [x]\n", Verdict.UNSAFE),
        ("%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system [x]\n", Verdict.UNSAFE),
        ("[a, !!python/object/apply:os.system [x]]\n", Verdict.UNSAFE),
        ('{"a": 1}\n--- !!python/object/apply:os.system [x]\n', Verdict.UNSAFE),
        ("a: !!python/object/apply:functools.partial [x]\n", Verdict.UNSAFE),
        ("a: !!python/object/new:mine.Thing [x]\n", Verdict.UNKNOWN),
        ("a: !!python/module:mine\n", Verdict.UNKNOWN),
        ("_target_: os.system\n", Verdict.UNKNOWN),
        ("'_target_' : os.system\n", Verdict.UNKNOWN),
        ('"_t\\x61rget_": os.system\n', Verdict.UNKNOWN),
        ('? "_tar\\\n  get_"\n: os.system\n', Verdict.UNKNOWN),
    ],
)
def test_tags_and_words_that_name_code_are_not(text: str, verdict: Verdict) -> None:
    """However the tag is spelled: handles, directives, verbatim, percent escapes, escaped and folded keys."""
    assert judged(text.encode(), "config.yaml")[0] is verdict


def test_yaml_past_the_limit_is_not_judged_by_its_beginning() -> None:
    """A payload behind the last byte that is read would not be seen."""
    data = b"# x\n" * 300 + b"a: !!python/object/apply:os.system [x]\n"
    assert judged(data, "a.yaml", ScanPolicy(json_bytes=1000))[0] is Verdict.UNKNOWN


@pytest.mark.parametrize("name", ["settings.toml", "vocab.txt", "notes", "train.cfg"])
def test_text_that_begins_like_json_is_text_where_no_reader_expects_json(name: str) -> None:
    """A table of TOML, a vocabulary that begins with [PAD]; the same bytes called .json are broken JSON."""
    text = b"[train]\nlr = 0.1\n"
    assert judged(text, name) == (Verdict.SAFE, "text")
    assert judged(text, "config.json")[0] is Verdict.UNSAFE


@pytest.mark.parametrize("name", ["modeling_x.py", "x.pth", "run.sh"])
def test_source_that_looks_like_json_lines_is_source(name: str) -> None:
    """Two sets on two lines are JSON Lines to a quick look, and a program to Python."""
    data = b'{"a":1}\n{__import__("os").system("true")}\n'
    assert judged(data, name)[0] is Verdict.UNKNOWN


def test_template_that_looks_like_json_lines_is_a_template() -> None:
    """The rules for templates hold whatever its first bytes are."""
    data = b'{"a":1}\n{{ x.__class__ }}\n'
    assert judged(data, "chat_template.jinja")[0] is Verdict.UNSAFE


def test_logs_with_colours_are_text() -> None:
    """Escape sequences, bells and backspaces of progress bars."""
    assert judged(b"step 1 \x1b[32mok\x1b[0m\x07\x08\n", "train.log") == (Verdict.SAFE, "text")


TREE = """Tree={number}
num_leaves=3
num_cat=0
split_feature=0 1
split_gain=1 1
threshold=0.5 0.5
decision_type=2 2
left_child=1 -1
right_child=-3 -2
leaf_value=0 1 2
is_linear=0
shrinkage=0.1


"""


def model(**changes: Any) -> bytes:
    """A small model of two trees as LightGBM writes it; `changes` replace lines of the first tree, by name."""
    first = TREE.format(number=0)
    for name, value in changes.items():
        lines = [f"{name}={value}" if line.startswith(f"{name}=") else line for line in first.split("\n")]
        first = "\n".join(lines)
    second = TREE.format(number=1)
    head = (
        "tree\nversion=v4\nnum_class=1\nmax_feature_idx=1\nobjective=binary\nfeature_names=a b\n"
        f"feature_infos=[0:1] [0:1]\ntree_sizes={len(first)} {len(second)}\n\n"
    )
    return (head + first + second + "end of trees\n\nfeature_importances:\na=1\n\npandas_categorical:null\n").encode()


def test_a_model_of_lightgbms_is_read() -> None:
    """By its first line, whatever its name."""
    assert judged(model(), "model.bin") == (Verdict.SAFE, "lightgbm")


@pytest.mark.parametrize(
    "changes",
    [
        {"left_child": "9 -1"},
        {"left_child": "1 -9"},
        {"left_child": "0 -1"},
        {"right_child": "-3 -3"},
        {"num_leaves": "4"},
        {"num_leaves": "999999999"},
        {"split_feature": "0 7"},
        {"split_feature": "0 -1"},
        {"leaf_value": "0 1"},
        {"threshold": "0.5 0.5\nthreshold=1"},
        {"decision_type": "2 1"},
        {"num_cat": "x"},
        {"is_linear": "1"},
        {"Tree": "5"},
    ],
)
def test_a_tree_that_leads_out_of_itself_is_refused(changes: dict[str, str]) -> None:
    """LightGBM follows the numbers it reads into memory that is not the tree's."""
    assert judged(model(**changes), "model.txt")[0] is Verdict.UNSAFE


def test_trees_cut_short_or_of_other_sizes_are_refused() -> None:
    """The head says how long each tree is, and LightGBM believes it."""
    data = model()
    assert judged(data[: data.index(b"Tree=1")], "model.txt")[0] is Verdict.UNSAFE
    assert judged(data.replace(b"tree_sizes=1", b"tree_sizes=9", 1), "model.txt")[0] is Verdict.UNSAFE


def test_sets_of_categories_lie_in_their_table() -> None:
    """A node that splits by categories names a set; its boundaries must ascend to the end of the table."""
    good = {"num_cat": "1", "decision_type": "1 2", "threshold": "0 0.5\ncat_boundaries=0 1\ncat_threshold=6"}
    lightgbm.check(model(**good).decode())
    for bad in ("0 0.5\ncat_boundaries=0 2\ncat_threshold=6", "1 0.5\ncat_boundaries=0 1\ncat_threshold=6"):
        with pytest.raises(lightgbm.Broken):
            lightgbm.check(model(**good | {"threshold": bad}).decode())


def ubj(text: str, data: bytes) -> bytes:
    """An object with one key."""
    return b"{L" + len(text).to_bytes(8, "big") + text.encode() + data + b"}"


NUMBERS = b"[$d#L" + (2).to_bytes(8, "big") + bytes(8)


@pytest.mark.parametrize(
    ("data", "verdict"),
    [
        (ubj("learner", ubj("a", NUMBERS)), Verdict.SAFE),
        (ubj("learner", b"[" + NUMBERS + b"TZ" + b"Si\x01x]"), Verdict.SAFE),
        (ubj("learner", b"[#i\x02Ti\x05"), Verdict.SAFE),
        (ubj("learner", b"[#i\x02T"), Verdict.UNSAFE),
        (ubj("learner", NUMBERS) + b"x", Verdict.UNSAFE),
        (ubj("learner", NUMBERS[:-1]), Verdict.UNSAFE),
        (ubj("learner", b"[$d#L" + b"\x7f" + bytes(7)), Verdict.UNSAFE),
        (ubj("learner", b"[$S#i\x01i\x01x"), Verdict.UNSAFE),
        (ubj("learner", b"Si\xffx"), Verdict.UNSAFE),
        (ubj("learner", b"?"), Verdict.UNSAFE),
        (ubj("learner", b"[" * 100), Verdict.ERROR),
        (ubj("other", NUMBERS), Verdict.UNKNOWN),
    ],
)
def test_ubjson_is_read_to_its_last_byte(data: bytes, verdict: Verdict) -> None:
    """Lengths are believed by XGBoost, so each must lie inside the file; what is no model of XGBoost's is unknown."""
    assert judged(data, "model.ubj")[0] is verdict
