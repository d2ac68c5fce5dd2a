"""What can have become of a step: hypotheses, each a list of acts for watch/acts.py, likeliest first.

    for hypothesis in hypotheses(scene): …

Which are made follows the causal order of links: what differs first says where the cause entered, what else differs
says how far it reached. A hypothesis with a free number (`Scalar`) has that number estimated from the values that the
run recorded; explain.py does so. Nothing here knows how a sabotage was written, and none is proof by itself: equality
of all fingerprints of the step is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import msgspec

from trainguard.replay.committed import Step

Act = Mapping[str, Any]
SINGLE_LABELS_LIMIT = 160
MOST = 0.7
"""Where more of the tensors differ than this, an act is taken to be on all of them."""

PERMUTED_LIMIT = 40
TURNS_LIMIT = 8
SHARES = (0.5, 0.25, 0.2, 0.1, 0.05, 0.01)


class Scalar(msgspec.Struct, frozen=True, kw_only=True):
    """A free number of a hypothesis."""

    make: Callable[[float], Sequence[Act]]
    probes: tuple[float, float]
    """Two values to try first. The first one may be None of the clean step's doing."""
    neutral: float | None = None
    """The value at which nothing would be other, where it is known."""
    base: float | None = None
    """The clean value: what is found is also looked at as a multiple of it."""
    low: float = -1e12
    high: float = 1e12


class Hypothesis(msgspec.Struct, frozen=True, kw_only=True):
    """Something that may have been done."""

    kind: str
    """Stable name, such as `learning rate` or `gradient sign`."""
    words: str
    """For people; `{x}` stands for the number."""
    acts: Sequence[Act] = ()
    scalar: Scalar | None = None
    techniques: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    """Recorded values that the number is estimated by."""


class Scene(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the step, before anything is tried."""

    run: Step
    clean: Step
    parted: Mapping[str, tuple[int, ...]]
    """Link → places that differ, in causal order."""
    names: tuple[str, ...]
    facts: Mapping[str, Any]
    settings: Sequence[Mapping[str, Any]]
    ask: Callable[..., Any]

    @property
    def first(self) -> str:
        """The link at which the cause entered."""
        return next(iter(self.parted))

    def only(self, link: str) -> dict[str, Any]:
        """Restriction of an act to the tensors that differ, where these are not nearly all of them.

        The sums of small tensors do not see every change: turning the sign of four numbers may leave them as they were.
        """
        places = self.parted.get(link, ())
        vector = self.run.vector(link) or ()
        if not places or len(places) > MOST * len(vector) or len(vector) != len(self.names):
            return {"opt": self.run.opt}
        return {"only": list(places), "opt": self.run.opt}

    def tensors(self, link: str) -> str:
        """The tensors that differ, in words."""
        restricted = self.only(link).get("only")
        if restricted is None:
            return "of every tensor"
        shown = ", ".join(self.names[place] for place in restricted[:2])
        return f"of {shown}" + (f" and {len(restricted) - 2} more" if len(restricted) > 2 else "")

    def row(self, *links: str) -> tuple[str, ...]:
        """Recorded values that both steps have, of these links."""
        wanted = tuple(name for name in self.run.lanes if name.partition(":")[0] in links)
        return tuple(name for name in wanted if name in self.clean.lanes)


def hypotheses(scene: Scene) -> Iterator[Hypothesis]:
    """All that may explain the first link that differs, likeliest first."""
    for source in ORDER.get(scene.first, ()):
        yield from source(scene)


# -- modes, streams, settings ----------------------------------------------------------------------------------------


def _modes(scene: Scene) -> Iterator[Hypothesis]:
    """At the start of the step, and at every call of the model: many scripts call train() in between."""
    found = scene.ask("modes", digest=scene.run.modes) or ()
    for place in ("now", "enter"):
        for act in found:
            kinds = ", ".join(act.get("kinds", ())[:3]) or "modules"
            acts = [{**{k: v for k, v in act.items() if k != "kinds"}, "at": place}]
            rate, mode = act.get("rate"), "training" if act.get("training") else "evaluation"
            if rate is not None:
                kind, words = "rate of modules", f"rate of {kinds} set to {rate}"
            else:
                kind, words = "mode", f"{kinds} put into {mode} mode"
            yield Hypothesis(kind=kind, words=words, acts=acts, techniques=("C11",))


def _streams(scene: Scene) -> Iterator[Hypothesis]:
    clean = scene.facts.get("streams")
    if not isinstance(clean, list) or len(clean) < 3:
        return
    wanted = [*scene.run.rng[:3], None, None, None][:3]
    found = scene.ask("streams", wanted=wanted, clean=clean, seeds=[scene.facts.get("seed", 0), scene.run.number]) or ()
    by_stream: dict[str, list[Act]] = {}
    for act in found:
        by_stream.setdefault(str(act["stream"]), []).append(act)
    for stream, acts in by_stream.items():
        for act in acts:
            yield from _stream(scene, stream, act, [each[0] for name, each in by_stream.items() if name != stream])


def _stream(scene: Scene, stream: str, act: Act, others: Sequence[Act]) -> Iterator[Hypothesis]:
    if act["do"] == "fewer":
        yield from _hidden_dropout(scene)
        return
    if act["do"] == "draw":
        yield from _noises(scene)
        for place in ("front", "leave", "now", "backward", "enter", "loss"):
            yield Hypothesis(
                kind="extra draws",
                words=f"{act['count']} more numbers drawn from the {stream} stream",
                acts=[{"at": place, **act}],
                techniques=("D1",),
            )
        yield from _each_turn(scene, stream, act)
        return
    places = ("now", "enter", "loss") if act.get("drawn") else ("front", "backward", "leave")
    rest = [{"do": "seed", "stream": each["stream"], "seed": each["seed"]} for each in others if each["do"] == "seed"]
    for place in places:
        seeded = [
            {"at": place, "do": "seed", "stream": stream, "seed": act["seed"]},
            *({"at": place, **e} for e in rest),
        ]
        yield Hypothesis(
            kind="reseed", words=f"{stream} stream seeded again with {act['seed']}", acts=seeded, techniques=("D1",)
        )


def _each_turn(scene: Scene, stream: str, act: Act) -> Iterator[Hypothesis]:
    """As many numbers in every micro-batch of a step: each is drawn once more, and the first is lost."""
    turns, count = int(scene.facts.get("backwards") or 0), int(act["count"])
    if turns < 2 or count % turns:
        return
    each = {**act, "count": count // turns}
    after = [{"at": "backward", "turn": turn, **each} for turn in range(1, turns + 1)]
    ways: list[list[Act]] = [[{"at": "now", **each}, *after[:-1]], list(after)]
    ways += [[{"at": place, **each}] for place in ("enter", "leave", "loss")]
    for acts in ways:
        yield Hypothesis(
            kind="extra draws",
            words=f"{each['count']} more numbers drawn from the {stream} stream in each of {turns} micro-batches",
            acts=acts,
            techniques=("D1", "D2"),
        )


def _noises(scene: Scene) -> Iterator[Hypothesis]:
    """Noise drawn from the job's own stream moves the stream too."""
    for link, do, places in (
        ("before", "weights", ("now", "front")),
        ("raw", "grads", ("backward",)),
        ("used", "grads", ("backward", "front")),
        ("weights", "weights", ("end",)),
    ):
        if link not in scene.parted:
            continue
        for place in places:
            for law in ("normal", "uniform"):
                for fused in (False, True):
                    yield _noise(scene, link, do, place, law=law, fused=fused)
        return


def _noise(scene: Scene, link: str, do: str, place: str, **details: Any) -> Hypothesis:
    where = {"at": place, "do": do, "op": "noise", **scene.only(link), **details}
    what = {"weights": "weights", "grads": "gradient"}[do]
    return Hypothesis(
        kind=f"noise on {what}",
        words=f"noise of size {{x}} added to the {what} {scene.tensors(link)}",
        scalar=Scalar(make=lambda x: [{**where, "by": x}], probes=(0.0, 0.01), neutral=0.0, low=0.0),
        rows=scene.row(link),
        techniques=("E4",) if do == "weights" else ("C1",),
    )


def _named_settings(scene: Scene) -> Iterator[Hypothesis]:
    changed = []
    for group in sorted(set(scene.run.hyper) & set(scene.clean.hyper)):
        was, clean = scene.run.hyper[group], scene.clean.hyper[group]
        changed += [(group, name, was[name]) for name in was if name in clean and was[name] != clean[name]]
    if not changed:
        return
    acts = [
        {"do": "setting", "name": name, "value": value, "groups": [int(group)], "opt": scene.run.opt}
        for group, name, value in changed
        if group.isdigit()
    ]
    name, value = changed[0][1], changed[0][2]
    clean_value = _number(scene.clean.hyper[changed[0][0]].get(name))
    words = f"{SETTINGS.get(name, name)} set to {_number(value)} (clean: {clean_value})"
    for place, back in (("now", False), ("front", False), ("front", True), ("inner", True), ("inner", False)):
        placed = [{"at": place, **act} for act in acts]
        if back and place == "front":
            returned = [
                {**act, "at": "end", "value": scene.clean.hyper[str(act["groups"][0])].get(str(act["name"]))}
                for act in acts
            ]
            placed += returned
        elif back:
            placed = [{**act, "back": True} for act in placed]
        yield Hypothesis(kind=SETTINGS.get(name, name), words=words, acts=placed, techniques=_of_setting(name))


SETTINGS = {
    "lr": "learning rate",
    "weight_decay": "weight decay",
    "betas": "betas",
    "betas[0]": "beta1",
    "betas[1]": "beta2",
    "eps": "eps",
    "momentum": "momentum",
    "dampening": "dampening",
    "nesterov": "nesterov",
    "maximize": "maximize",
    "alpha": "alpha",
    "rho": "rho",
}


def _of_setting(name: str) -> tuple[str, ...]:
    return ("C3",) if name == "lr" else ("C4",)


# -- settings that nobody sees ---------------------------------------------------------------------------------------


def _hidden_settings(scene: Scene) -> Iterator[Hypothesis]:
    """Another value only within the update: what the parameter groups say is as it should be."""
    known = next((each for each in scene.settings if each["opt"] == scene.run.opt), None)
    if known is None or not known["groups"]:
        return
    numbers, flags = _numbers(known["groups"])
    link = scene.first
    names = ("lr", "weight_decay", "eps", *numbers) if link == "weights" else tuple(numbers)
    rows = scene.row(link)
    for name in dict.fromkeys(names):
        if name == "eps" and name in numbers:
            yield from _eps(scene, numbers[name])
        if name in numbers:
            yield from _hidden(scene, name, numbers[name], known, rows)
    for name, value in flags.items():
        if name in ("maximize", "nesterov", "amsgrad", "centered", "decoupled_weight_decay"):
            yield Hypothesis(
                kind=name,
                words=f"{name} {'off' if value else 'on'} within the update",
                acts=[_inside(scene, name, value=not value)],
                techniques=("C4",),
            )
    if "step" in known["state"]:
        for place in ("inner", "now"):
            yield Hypothesis(
                kind="bias correction",
                words="update without bias correction",
                acts=[{"at": place, "do": "count", "value": 1e8, "opt": scene.run.opt}, *_counted_back(scene)],
                techniques=("C4",),
            )


def _eps(scene: Scene, clean: float) -> Iterator[Hypothesis]:
    """Far from linear, and written as a power of ten: tried as it is."""
    for power in (-3, -4, -5, -6, -7, -10, -12, -2, -1, 0, -8, -9, -16):
        value = float(f"1e{power}")
        if value != clean:
            yield Hypothesis(
                kind="eps",
                words=f"eps {value:g} within the update (clean: {_number(clean)})",
                acts=[_inside(scene, "eps", value=value)],
                techniques=("C4",),
            )


def _counted_back(scene: Scene) -> list[Act]:
    return [{"at": "end", "do": "count", "value": float(scene.clean.number), "opt": scene.run.opt}]


def _hidden(
    scene: Scene, name: str, value: float, known: Mapping[str, Any], rows: tuple[str, ...]
) -> Iterator[Hypothesis]:
    """One number. With groups of other values, the same factor in all of them first, then one value for all."""
    values = {_value(group, name) for group in known["groups"]} - {None}
    kind = SETTINGS.get(name, name)
    if len(values) > 1 or name == "lr":
        yield Hypothesis(
            kind=kind,
            words=f"{kind} times {{x}} within the update",
            scalar=Scalar(
                make=lambda x: [_inside(scene, name, times=x)], probes=(1.0, 1.5 if name == "lr" else 0.9), neutral=1.0
            ),
            rows=rows,
            techniques=_of_setting(name),
        )
    beta = name.startswith("betas") or name in ("momentum", "alpha", "rho", "dampening")
    probe = value * 0.9 if beta and value else value * 2 + (0.0 if value else 0.01)
    yield Hypothesis(
        kind=kind,
        words=f"{kind} {{x}} within the update (clean: {_number(value)})",
        scalar=Scalar(
            make=lambda x: [_inside(scene, name, value=x)],
            probes=(value, probe),
            neutral=value if len(values) == 1 else None,
            base=value,
            low=0.0,
            high=0.999999999 if beta else 1e6,
        ),
        rows=rows,
        techniques=_of_setting(name),
    )


def _inside(scene: Scene, name: str, **how: Any) -> Act:
    return {"at": "inner", "do": "setting", "name": name, "back": True, "opt": scene.run.opt, **how}


def _numbers(groups: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, bool]]:
    numbers: dict[str, float] = {}
    flags: dict[str, bool] = {}
    for name, value in groups[0].items():
        if name.startswith("initial_") or name in ("foreach", "fused", "capturable", "differentiable"):
            continue
        if isinstance(value, bool):
            flags[name] = value
        elif isinstance(value, int | float):
            numbers[name] = float(value)
        elif isinstance(value, list) and all(isinstance(each, int | float) for each in value):
            numbers.update({f"{name}[{place}]": float(each) for place, each in enumerate(value)})
    return numbers, flags


def _value(group: Mapping[str, Any], name: str) -> Any:
    base, _, place = name.partition("[")
    value = group.get(base)
    return value[int(place[:-1])] if place and isinstance(value, list) else value


# -- weights and state edited ----------------------------------------------------------------------------------------


def _edited(scene: Scene) -> Iterator[Hypothesis]:
    """Weights that are not what the step before left."""
    places = ("now", "front") if "raw" in scene.parted else ("front", "now")
    solved = scene.ask("edited", edited=[list(each) for each in scene.run.edited]) if scene.run.edited else []
    answers = [found[0] for found in solved or () if found]
    if answers and len(answers) == len(scene.run.edited):
        words, kind = _edit_in_words(scene, answers)
        together = answers
        if len(scene.parted["before"]) > len(answers) and answers[0]["do"] == "weights":
            together = [{**answers[0], **scene.only("before")}]
            together[0].pop("only", None) if "only" not in scene.only("before") else None
        for place in places:
            acts = [{"at": place, **{k: v for k, v in act.items() if k != "told"}} for act in together]
            yield Hypothesis(kind=kind, words=words, acts=acts, techniques=("E4", "E3"))
    yield from _operations(scene, "before", "weights", places)


def _edit_in_words(scene: Scene, answers: Sequence[Act]) -> tuple[str, str]:
    act = answers[0]
    name = scene.names[act["only"][0]] if act["only"][0] < len(scene.names) else f"tensor {act['only'][0]}"
    more = f" and {len(answers) - 1} more tensors" if len(answers) > 1 else ""
    if act["do"] == "word":
        told = act.get("told") or ()
        shown = ", ".join(f"element {index} from {_number(a)} to {_number(b)}" for index, a, b in told)
        return f"one weight of {name} edited{more}: {shown or 'element not shown'}", "one weight edited"
    return f"weights of {name}{more}: {_op_in_words(act)}", KINDS_OF_EDIT.get(str(act["op"]), "weights edited")


KINDS_OF_EDIT = {
    "scale": "weights scaled",
    "noise": "noise on weights",
    "older": "weights put back",
    "add": "weights shifted",
}


def _op_in_words(act: Act) -> str:
    op, by = str(act["op"]), act.get("by")
    words = {
        "scale": f"times {_number(by)}", "divide": f"divided by {_number(by)}", "add": f"{_number(by)} added",
        "negate": "sign turned", "zero": "set to zero", "fill": f"all set to {_number(by)}",
        "round": f"rounded to {act.get('dtype')}", "flip": "order of rows turned round", "roll": "rows moved on",
        "sign": "only the sign kept", "noise": f"noise of size {_number(by)} added",
        "top": f"all but the largest {_number(100 * float(by or 0))} % set to zero",
        "clamp": f"limited to {_number(by)}", "older": f"as it was {act.get('back', 1)} steps before",
    }  # fmt: skip
    return words.get(op, op)


def _operations(
    scene: Scene, link: str, do: str, places: Sequence[str], *, key: str | None = None, row: str = ""
) -> Iterator[Hypothesis]:
    """Everything that can be done to the elements of tensors at one place of a step."""
    what = {"weights": "weights", "grads": "gradient", "state": "optimizer state", "update": "update"}[do]
    techniques = {"weights": ("E4",), "grads": ("C1",), "state": ("C4", "E5"), "update": ("C9",)}[do]
    only = scene.only(link)
    of = scene.tensors(link)
    rows = scene.row(row or link)
    base = {"do": do, **only, **({"key": key} if key else {})}
    simple: list[dict[str, Any]] = [{"op": "negate"}, {"op": "zero"}]
    if do == "grads":
        simple.append({"op": "none"})
    if do == "state":
        simple.append({"op": "clear"})
    if do == "weights":
        simple += [{"op": "older", "back": back} for back in (1, 2, 3)]
    spans = [(only, of)]
    if "only" in only and len(scene.parted.get("weights", ())) > len(scene.parted[link]):
        spans.append(({"opt": scene.run.opt}, "of every tensor"))  # sums may not see it in some of them
    for place in places:
        for span, named in spans:
            for act in simple:
                yield Hypothesis(
                    kind=f"{what} {KIND_OF_OP[str(act['op'])]}", words=f"{what} {named}: {_op_in_words(act)}",
                    acts=[{"at": place, "do": do, **({"key": key} if key else {}), **span, **act}],
                    techniques=techniques,
                )  # fmt: skip
        yield Hypothesis(
            kind=f"{what} scaled", words=f"{what} {of} times {{x}}", rows=rows, techniques=techniques,
            scalar=_times(lambda x, place=place: [{"at": place, **base, "op": "scale", "by": x}]),  # type: ignore[misc]
        )  # fmt: skip
    more: list[dict[str, Any]] = [{"op": "round", "dtype": "bfloat16"}, {"op": "round", "dtype": "float16"}]
    more += [{"op": "sign"}, {"op": "flip"}, {"op": "roll", "by": 1}, {"op": "roll", "by": -1}]
    more += [{"op": "top", "by": share} for share in SHARES]
    for place in places:
        for act in more:
            yield Hypothesis(
                kind=f"{what} {KIND_OF_OP[str(act['op'])]}", words=f"{what} {of}: {_op_in_words(act)}",
                acts=[{"at": place, **base, **act}], techniques=techniques,
            )  # fmt: skip
        yield Hypothesis(
            kind=f"{what} shifted", words=f"{{x}} added to the {what} {of}", rows=rows, techniques=techniques,
            scalar=Scalar(make=lambda x, place=place: [{"at": place, **base, "op": "add", "by": x}],  # type: ignore[misc]
                          probes=(0.0, 0.01), neutral=0.0),
        )  # fmt: skip
    if do in ("weights", "grads"):
        for place in places:
            for seed in (0, 1, 42, 1234, 1337):
                yield _noise(scene, link, do, place, seed=seed)


KIND_OF_OP = {
    "negate": "sign", "zero": "zeroed", "none": "zeroed", "clear": "reset", "older": "put back", "round": "rounded",
    "sign": "sign only", "flip": "permuted", "roll": "permuted", "top": "sparsified", "fill": "filled",
}  # fmt: skip


def _times(make: Callable[[float], Sequence[Act]]) -> Scalar:
    return Scalar(make=make, probes=(1.0, 1.25), neutral=1.0)


# -- batches, labels, loss -------------------------------------------------------------------------------------------


def _loss(scene: Scene) -> Iterator[Hypothesis]:
    """The loss, or the gradient as a whole, times a number."""
    rows = scene.row("raw")
    if "only" in scene.only("raw"):
        return
    for place, do in (("root", "root"), ("loss", "times")):
        yield Hypothesis(
            kind="loss scaled", words="loss times {x}", rows=rows, techniques=("C6", "C7"),
            scalar=_times(lambda x, place=place, do=do: [{"at": place, "do": do, "op": "scale", "by": x}]),  # type: ignore[misc]
        )  # fmt: skip
    yield Hypothesis(
        kind="loss scaled", words="loss divided by {x}", rows=rows, techniques=("C6", "C7"),
        scalar=_times(lambda x: [{"at": "root", "do": "root", "op": "divide", "by": x}]),
    )  # fmt: skip


def _smoothing(scene: Scene) -> Iterator[Hypothesis]:
    if scene.facts.get("losses"):
        yield Hypothesis(
            kind="label smoothing", words="label smoothing {x}", rows=scene.row("raw"), techniques=("C6",),
            scalar=Scalar(
                make=lambda x: [{"at": "loss", "do": "smooth", "by": x}], probes=(0.0, 0.1), low=0.0, high=1.0
            ),
        )  # fmt: skip


def _hook_gradients(scene: Scene) -> Iterator[Hypothesis]:
    """Parameters that got no gradient, or another one, within backward."""
    only = scene.only("raw")
    of = scene.tensors("raw")
    numbers = scene.run.vector("raw") or ()
    if all(numbers[place] == 0 for place in scene.parted.get("raw", ()) if place < len(numbers)):
        freeze = {"at": "now", "do": "freeze", **only}
        yield Hypothesis(
            kind="parameter frozen", words=f"gradient {of} not computed", acts=[freeze], techniques=("C5",)
        )
        yield Hypothesis(
            kind="gradient zeroed", words=f"gradient {of}: set to zero", techniques=("C5", "C1"),
            acts=[{"at": "hook", "do": "grads", "op": "zero", **only}],
        )  # fmt: skip
    for act in ({"op": "negate"}, {"op": "zero"}, {"op": "sign"}, {"op": "round", "dtype": "bfloat16"},
                {"op": "round", "dtype": "float16"}):  # fmt: skip
        yield Hypothesis(
            kind=f"gradient {KIND_OF_OP[str(act['op'])]}", words=f"gradient {of}: {_op_in_words(act)}",
            acts=[{"at": "hook", "do": "grads", **act, **only}], techniques=("C1", "C6"),
        )  # fmt: skip
    yield Hypothesis(
        kind="gradient scaled", words=f"gradient {of} times {{x}}, within backward", rows=scene.row("raw"),
        scalar=_times(lambda x: [{"at": "hook", "do": "grads", "op": "scale", "by": x, **only}]), techniques=("C1",),
    )  # fmt: skip


def _each_backward(scene: Scene) -> Iterator[Hypothesis]:
    """Gradients changed after every backward pass of a step that has several: what the next one adds to is other."""
    if int(scene.facts.get("backwards") or 0) > 1:
        yield from _operations(scene, "raw", "grads", ("backward",))


def _batches(scene: Scene) -> Iterator[Hypothesis]:
    """Another batch: an earlier one again, a later one, rows in another order."""
    for back in (1, 2, 3):
        older = {"op": "older", "back": back}
        yield Hypothesis(
            kind="batch repeated", words=f"the batch of {back} steps before once more", techniques=("D2", "D4"),
            acts=[{"at": "enter", "do": "args", **older}, {"at": "loss", "do": "target", **older}],
        )  # fmt: skip
    yield from _turns(scene)
    if scene.facts.get("loaded"):
        for ahead in (1, 2, 3, -1, -2):
            kind = "batch skipped" if ahead > 0 else "batch repeated"
            words = f"a batch that comes {ahead} later" if ahead > 0 else f"a batch that came {-ahead} before"
            yield Hypothesis(
                kind=kind, words=words, techniques=("D2", "D4"),
                acts=[{"at": "enter", "do": "batch", "ahead": ahead}, {"at": "loss", "do": "batch", "ahead": ahead}],
            )  # fmt: skip
    for act in ({"op": "flip"}, {"op": "roll", "by": 1}, {"op": "roll", "by": -1}):
        for acts in _with_labels(scene, act):
            yield Hypothesis(
                kind="batch reordered", words="rows of the batch in another order", techniques=("D2",), acts=acts
            )


def _turns(scene: Scene) -> Iterator[Hypothesis]:
    """A step of several micro-batches: those of some turns before, or one of them once more."""
    calls = min(int(scene.facts.get("calls") or 0), TURNS_LIMIT)
    if calls < 2:
        return
    whole = [(f"the micro-batches of {turns} before once more", {"calls": turns}) for turns in range(1, calls)]
    single = [
        (f"the micro-batch before once more, as number {turn + 1} of the step", {"calls": 1, "turn": turn})
        for turn in range(calls)
    ]
    for words, which in (*whole, *single):
        for acts in _with_labels(scene, {"op": "older", **which}):
            yield Hypothesis(kind="batch repeated", words=words, acts=acts, techniques=("D2", "D4"))


def _with_labels(scene: Scene, act: Mapping[str, Any]) -> Iterator[list[Act]]:
    """The same with a batch and its labels: labels that the model is given with the rows have been changed with them,
    those that only the loss is given have to be."""
    given = {"at": "enter", "do": "args", **act}
    yield [given, {"at": "loss", "do": "target", **act}]
    if len(scene.facts.get("leaves") or ()) > 1:
        yield [given]


def _labels(scene: Scene) -> Iterator[Hypothesis]:
    """Labels other than those of the batch: at the loss, or where a model is given them."""
    classes = int(scene.facts.get("classes") or 0)
    acts: list[dict[str, Any]] = [{"op": "flip"}, {"op": "roll", "by": 1}, {"op": "roll", "by": -1}]
    acts += [{"op": "mirror", "classes": classes}]
    acts += [{"op": "shift", "by": by, "classes": classes} for by in range(1, min(classes, 8))]
    acts += [{"op": "zero"}, {"op": "first"}, {"op": "sort"}, {"op": "older", "back": 1}]
    acts += [{"op": "fill", "by": value} for value in range(1, min(classes, 12))]
    leaves = scene.facts.get("leaves") or ()
    whole = [place for place, (_, floating) in enumerate(leaves) if not floating]
    places: list[dict[str, Any]] = [{"at": "loss", "do": "target"}]
    places += [{"at": "enter", "do": "args", "leaf": leaf} for leaf in reversed(whole)]
    for act in acts:
        for place in places:
            yield Hypothesis(
                kind="labels permuted" if act["op"] in ("flip", "roll", "sort") else "labels changed",
                words=f"labels: {LABELS.get(str(act['op']), str(act['op']))}",
                acts=[{**place, **act}], techniques=("D4", "C6", "D5"),
            )  # fmt: skip


LABELS = {
    "flip": "in the opposite order of rows", "roll": "moved on by one row", "shift": "each another class",
    "mirror": "classes turned round", "zero": "all class 0", "first": "all that of the first row", "sort": "sorted",
    "older": "those of the step before", "fill": "all one class",
}  # fmt: skip


def _one_label(scene: Scene) -> Iterator[Hypothesis]:
    targets, classes = scene.facts.get("targets") or (), int(scene.facts.get("classes") or 0)
    if not targets or targets[0][1] or classes < 2:
        return
    count = 1
    for length in targets[0][0]:
        count *= length
    if count * classes > SINGLE_LABELS_LIMIT:
        return
    for index in range(count):
        for value in range(classes):
            yield Hypothesis(
                kind="one label changed", words=f"label {index} of the batch set to {value}", techniques=("D4", "D5"),
                acts=[{"at": "loss", "do": "target", "op": "put", "index": index, "by": value}],
            )  # fmt: skip


def _inputs(scene: Scene) -> Iterator[Hypothesis]:
    """What a model is given, other than what the batch says."""
    leaves = scene.facts.get("leaves") or ()
    floating = [place for place, (_, is_float) in enumerate(leaves) if is_float]
    whole = [place for place, (_, is_float) in enumerate(leaves) if not is_float]
    for leaf in floating[:2]:
        at = {"at": "enter", "do": "args", "leaf": leaf}
        yield Hypothesis(
            kind="inputs scaled", words="inputs times {x}", rows=scene.row("raw"), techniques=("D4",),
            scalar=_times(lambda x, at=at: [{**at, "op": "scale", "by": x}]),  # type: ignore[misc]
        )  # fmt: skip
        for act in ({"op": "zero"}, {"op": "negate"}, {"op": "flip"}, {"op": "roll", "by": 1},
                    {"op": "flip", "dim": -1}, {"op": "round", "dtype": "bfloat16"},
                    {"op": "older", "back": 1}):  # fmt: skip
            yield Hypothesis(kind="inputs changed", words=f"inputs: {_op_in_words(act)}", acts=[{**at, **act}],
                             techniques=("D4",))  # fmt: skip
    for leaf in whole[:2]:
        for act in ({"op": "zero"}, {"op": "flip"}, {"op": "roll", "by": 1}, {"op": "roll", "by": -1},
                    {"op": "roll", "by": 1, "dim": -1}, {"op": "flip", "dim": -1},
                    {"op": "older", "back": 1}):  # fmt: skip
            yield Hypothesis(kind="inputs changed", words=f"inputs: {_op_in_words(act)}", techniques=("D4",),
                             acts=[{"at": "enter", "do": "args", "leaf": leaf, **act}])  # fmt: skip


def _forward(scene: Scene) -> Iterator[Hypothesis]:
    """The model computed otherwise: precision, dropout that is not what its module says."""
    for dtype in ("bfloat16", "float16"):
        yield Hypothesis(kind="precision", words=f"forward in {dtype}", techniques=("C8",),
                         acts=[{"at": "forward", "do": "autocast", "dtype": dtype}])  # fmt: skip
    for name, value in (("matmul", "medium"), ("matmul", "high"), ("mkldnn", False), ("denormal", True)):
        yield Hypothesis(kind="precision flag", words=f"numeric setting {name} set to {value}", techniques=("C8",),
                         acts=[{"at": "now", "do": "flag", "name": name, "value": value}])  # fmt: skip
    yield from _hidden_dropout(scene)


def _hidden_dropout(scene: Scene) -> Iterator[Hypothesis]:
    for rate in (None, 0.5, 0.0, 0.1, 0.2, 0.05, 0.3, 0.25, 0.15, 0.4, 0.6, 0.7, 0.8, 0.9, 0.01, 0.02):
        yield Hypothesis(
            kind="dropout", words="dropout left out" if rate is None else f"dropout with rate {rate}",
            acts=[{"at": "now", "do": "dropout", "rate": rate}], techniques=("C11",),
        )  # fmt: skip
    yield Hypothesis(kind="mode", words="model put into evaluation mode", techniques=("C11",),
                     acts=[{"at": "enter", "do": "mode", "training": False}])  # fmt: skip


def _permuted(scene: Scene) -> Iterator[Hypothesis]:
    """Weights in another order: a sum does not see that, the gradient that follows does."""
    for act in ({"op": "flip"}, {"op": "roll", "by": 1}, {"op": "roll", "by": -1}):
        for place in range(min(len(scene.names), PERMUTED_LIMIT)):
            yield Hypothesis(
                kind="weights permuted", words=f"weights of {scene.names[place]}: {_op_in_words(act)}",
                techniques=("E4",), acts=[{"at": "now", "do": "weights", "only": [place], "opt": scene.run.opt, **act}],
            )  # fmt: skip


def _no_step(scene: Scene) -> Iterator[Hypothesis]:
    yield Hypothesis(
        kind="update skipped", words="step() did nothing and was not seen", techniques=("C9",),
        acts=[{"at": "now", "do": "no step", "opt": scene.run.opt}],
    )  # fmt: skip


# -- clip, gradient, update ------------------------------------------------------------------------------------------


def _clip(scene: Scene) -> Iterator[Hypothesis]:
    def clip(**how: Any) -> list[Act]:
        return [{"at": "clip", "do": "clip", **how}]

    rows = scene.row("used")
    yield Hypothesis(kind="clip", words="gradients not clipped", acts=clip(op="off"), techniques=("C2",))
    for factor in (0.1, 0.5, 2.0, 10.0, 100.0, 0.01, 0.25, 5.0):
        yield Hypothesis(kind="clip", words=f"clipping limit times {factor}", acts=clip(op="times", by=factor),
                         techniques=("C2",))  # fmt: skip
    yield Hypothesis(
        kind="clip", words="clipping limit times {x}", rows=rows, techniques=("C2",),
        scalar=Scalar(make=lambda x: clip(op="times", by=x), probes=(0.5, 0.25), low=0.0),
    )  # fmt: skip
    for norm in (1.0, float("inf"), 3.0):
        shown = "inf" if norm == float("inf") else norm
        yield Hypothesis(kind="clip", words=f"clipped by norm {shown}", acts=clip(op="norm", by=str(norm)),
                         techniques=("C2",))  # fmt: skip
    yield Hypothesis(kind="clip", words="clipped twice", acts=clip(op="again"), techniques=("C2",))


def _used(scene: Scene) -> Iterator[Hypothesis]:
    yield from _operations(scene, "used", "grads", ("backward", "front"))


def _inner_gradients(scene: Scene) -> Iterator[Hypothesis]:
    """The gradient that the update was made with is not the one it was given."""
    link = scene.first
    yield from _operations(scene, link, "grads", ("inner",))


def _update(scene: Scene) -> Iterator[Hypothesis]:
    only, of = scene.only("weights"), scene.tensors("weights")
    for op, words in (("undo", "not made"), ("skip", "not kept in the weights"), ("again", "made twice")):
        yield Hypothesis(
            kind="update skipped" if op != "again" else "update repeated", words=f"update {of} {words}",
            acts=[{"at": "end", "do": "update", "op": op, **only}],
            techniques=("C5", "C9") if "only" in only else ("C9",),
        )  # fmt: skip


def _update_operations(scene: Scene) -> Iterator[Hypothesis]:
    if scene.first == "weights":
        yield from _operations(scene, "weights", "update", ("end",))
        yield from _operations(scene, "weights", "weights", ("end",))


def _state_edits(scene: Scene) -> Iterator[Hypothesis]:
    known = next((each for each in scene.settings if each["opt"] == scene.run.opt), None)
    keys = [key for key in (known["state"] if known else ()) if f"state:{key}" in scene.run.lanes]
    for key in (None, *keys):
        yield from _operations(scene, "state", "state", ("inner", "end"), key=key)


Source = Callable[[Scene], Iterator[Hypothesis]]
ORDER: Mapping[str, tuple[Source, ...]] = {
    "modes": (_modes,),
    "rng": (_streams, _batches, _hidden_dropout, _no_step),
    "before": (_edited, _no_step),
    "raw": (
        _loss, _smoothing, _batches, _labels, _hook_gradients, _forward, _inputs, _each_backward, _one_label, _permuted,
        _no_step,
    ),
    "used": (_clip, _used),
    "groups": (_named_settings, _no_step),
    "state": (_update, _hidden_settings, _inner_gradients, _state_edits),
    "weights": (_update, _hidden_settings, _update_operations, _inner_gradients),
}  # fmt: skip
"""Link at which a cause entered → where hypotheses come from, in this order."""


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
