"""Generate the allowlists of `trainguard scan` from the source of installed libraries. Imports none of them.

    python tools/scan_lists.py            # write src/trainguard/scan/lists/{training,framework}_<library>.json
    python tools/scan_lists.py --check    # exit 1 when a list differs from what the installed release gives

For every module-level class of a library the syntax tree is read, its bases are resolved through imports to the end,
and the methods of the whole chain are looked at. A class is listed only when making an instance without its constructor
and filling its `__dict__` can run nothing of its own: no `__new__`, `__setstate__`, `__reduce__`, `__getattr__`,
`__del__`, `__setattr__`, no item setter anywhere in the chain, except the ones in REVIEWED, each read by a person. The
result holds exact names, the version they come from and a digest over every source file read.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LISTS = Path(__file__).resolve().parent.parent / "src" / "trainguard" / "scan" / "lists"

RUN_WHEN_LOADED = frozenset(
    {"__new__", "__setstate__", "__reduce__", "__reduce_ex__", "__getattr__", "__getattribute__", "__del__"}
    | {"__setattr__", "__delattr__", "__getnewargs__", "__getnewargs_ex__", "__getinitargs__", "__set_name__"}
)
RUN_WHEN_FILLED = frozenset({"__setitem__", "append", "extend", "add", "update", "__init__"})
RUN_WHEN_LOOKED_UP = frozenset(
    {"__new__", "_missing_", "__reduce__", "__reduce_ex__", "__setattr__", "__getattr__", "__init__"}
)

REVIEWED = {
    "torch.nn.modules.module.Module": {
        "__setstate__": "updates __dict__ and adds empty hook dicts",
        "__getattr__": "looks names up in _parameters, _buffers, _modules",
        "__setattr__": "not used by unpickling a __dict__; registers parameters",
        "__delattr__": "not used by unpickling",
    },
    "torch.nn.modules.activation.MultiheadAttention": {"__setstate__": "adds one flag, then Module's"},
    "torch.nn.modules.activation.Softplus": {},
    "torch.nn.modules.batchnorm._NormBase": {"__setstate__": "not defined; listed for its loader hook"},
    "torch.nn.modules.conv._ConvNd": {"__setstate__": "adds padding_mode, then Module's"},
    "torch.nn.modules.rnn.RNNBase": {
        "__setstate__": "rebuilds the list of weak references to its own weights",
        "__setattr__": "keeps the list of flat weights in step",
    },
    "torch.nn.modules.transformer.TransformerEncoderLayer": {"__setstate__": "adds the activation, then Module's"},
    "torch.nn.modules.transformer.TransformerDecoderLayer": {"__setstate__": "adds the activation, then Module's"},
    "torch.nn.modules.upsampling.Upsample": {"__setstate__": "adds one flag, then Module's"},
    "torch.nn.modules.activation.GELU": {},
    "torch.nn.modules.activation.Hardtanh": {},
    "torch.nn.modules.activation.SiLU": {"__setstate__": "adds one flag, then Module's"},
    "torch.nn.modules.pooling.MaxPool2d": {},
    "torch.nn.modules.pooling.AvgPool2d": {"__setstate__": "adds flags, then Module's"},
    "torch.nn.modules.pooling.AvgPool3d": {"__setstate__": "adds flags, then Module's"},
    "torch.optim.optimizer.Optimizer": {
        "__setstate__": "updates __dict__, adds empty hook dicts, patches step of its own class for profiling",
    },
    **{
        f"torch.optim.{module}.{name}": {"__setstate__": "adds missing defaults to param_groups, then Optimizer's"}
        for module, name in (
            *(("adam", "Adam"), ("adamw", "AdamW"), ("sgd", "SGD"), ("adagrad", "Adagrad"), ("adadelta", "Adadelta")),
            *(("adamax", "Adamax"), ("asgd", "ASGD"), ("nadam", "NAdam"), ("radam", "RAdam"), ("rmsprop", "RMSprop")),
            *(("rprop", "Rprop"), ("_adafactor", "Adafactor"), ("sparse_adam", "SparseAdam"), ("_muon", "Muon")),
        )
    },
    "torch.distributed.checkpoint.metadata.TensorProperties": {
        "__setstate__": "turns its own enum of memory formats into a torch memory format; the state is a tuple",
        "kind": "instance_state",
    },
    "torch.distributed.device_mesh.DeviceMesh": {
        "__setstate__": "updates __dict__ and looks process groups up by name in torch's own table",
        "__getattr__": "an attribute of the root mesh",
    },
    "torch.distributed.tensor._dtensor_spec.DTensorSpec": {"__setattr__": "checks the shard order, resets the hash"},
    "accelerate.state.PartialState": {"__getattr__": "raises AttributeError"},
    "accelerate.state.AcceleratorState": {"__getattr__": "raises AttributeError"},
    **{
        f"torch.nn.modules.activation.{name}": {"__setstate__": "Module's, then a missing dim"}
        for name in ("Softmax", "Softmin", "LogSoftmax")
    },
    "transformers.configuration_utils.PreTrainedConfig": {
        "__getattribute__": "renames by the class's own attribute_map before state is there; BUILD happens once",
        "__setattr__": "the same renaming; not used by unpickling a __dict__",
    },
    "transformers.integrations.heterogeneity.configuration_utils.HeterogeneousConfigMixin": {
        "__getattribute__": "warns or raises for per-layer names",
    },
    "torchmetrics.metric.Metric": {
        "__setstate__": "updates __dict__, wraps its own update and compute",
        "__setattr__": "refuses some names; not used by unpickling a __dict__",
        "__getnewargs__": "constants that __new__ ignores",
        "kind": "instance_constants",
    },
    "transformers.utils.generic.ExplicitEnum": {"_missing_": "raises ValueError"},
    "accelerate.utils.dataclasses.BaseEnum": {},
    "accelerate.utils.dataclasses.EnumWithContains": {},
    "lightning.fabric.utilities.data.AttributeDict": {
        "__getattr__": "an item",
        "__setattr__": "an item",
        "__delattr__": "an item",
    },
    "sklearn.base.BaseEstimator": {"__setstate__": "warns when the version differs, then updates __dict__"},
    "sklearn.utils._bunch.Bunch": {
        "__getattr__": "an item",
        "__setattr__": "an item",
        "__setstate__": "does nothing",
        "__init__": "only on call",
        "__getitem__": "an item, with a warning",
    },
    "sklearn.isotonic.IsotonicRegression": {"__setstate__": "BaseEstimator's, then interpolates its own thresholds"},
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor": {
        "__setstate__": "updates __dict__, casts its nodes"
    },
    "sklearn.utils._metadata_requests._MetadataRequester": {"__init_subclass__": "at class definition"},
}
"""Class → its methods that were read and found to do nothing but what is said. Anything else excludes the class.

`kind` says which rule its state needs, where that is not a dict of attributes.
"""

HARMLESS_BASES = {
    "object": "instance",
    **{
        f"torch._C._distributed.{name}": "instance"
        for name in ("Placement", "Shard", "StridedShard", "Replicate", "Partial")
    },
    "abc.ABC": "instance",
    **{f"typing.{name}": "instance" for name in ("Generic", "Iterable", "Iterator", "Mapping", "Sequence", "Callable")},
    "typing.Protocol": "instance",
    "typing_extensions.Protocol": "instance",
    **{
        f"collections.abc.{name}": "instance" for name in ("Mapping", "MutableMapping", "Sequence", "Iterable", "Sized")
    },
    **{
        f"collections.abc.{name}": "instance"
        for name in ("Collection", "Container", "Hashable", "Callable", "Iterator")
    },
    "dict": "dict",
    "collections.OrderedDict": "dict",
    "collections.UserDict": "instance",
    "list": "list",
    "tuple": "none",
    "typing.NamedTuple": "named_tuple",
    "enum.Enum": "enum",
    "enum.IntEnum": "enum",
    "enum.StrEnum": "enum",
    "enum.Flag": "enum",
    "enum.IntFlag": "enum",
    "str": "text",
    "int": "text",
    "float": "text",
}
"""Bases outside the libraries, and the kind they make of a class."""


@dataclass(frozen=True, kw_only=True)
class Library:
    """What is generated for one library."""

    name: str
    package: str
    distributions: tuple[str, ...] = ()
    """Distributions that bring the package, first installed first; its own name where there are none."""
    uses: tuple[str, ...] = ()
    """Packages whose classes may be bases."""
    training: tuple[str, ...] = ()
    """Modules whose classes real training state holds; these go into the training tier."""
    framework: tuple[str, ...] = ()
    """Packages whose classes go into the framework tier."""
    named: tuple[str, ...] = ()
    """Packages of these whose classes training state may name (an activation among hyper-parameters), not make."""
    skip: tuple[str, ...] = (
        "test",
        "tests",
        "testing",
        "_inductor",
        "_dynamo",
        "_export",
        "conftest",
        "cli",
        "commands",
    )
    extra: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)
    """tier → kind → names added by hand: compiled classes and functions, which have no syntax tree."""


TREES = tuple(
    (tree, name + bits)
    for tree, name in (("kd_tree", "KDTree"), ("ball_tree", "BallTree"))
    for bits in ("", "32", "64")
)
DISTANCES = (
    *("BrayCurtis", "Canberra", "Chebyshev", "Dice", "Euclidean", "Hamming", "Haversine", "Jaccard", "Kulsinski"),
    *("Mahalanobis", "Manhattan", "Matching", "Minkowski", "RogersTanimoto", "RussellRao", "SEuclidean"),
    *("SokalMichener", "SokalSneath"),
)
"""sklearn's compiled distances, without the one that holds a Python function."""

TORCH_FUNCTIONS = (
    *(f"torch.nn.functional.{name}" for name in ("relu", "gelu", "silu", "elu", "leaky_relu", "relu6", "mish")),
    *(f"torch.nn.functional.{name}" for name in ("softplus", "tanh", "sigmoid", "hardswish", "dropout")),
    *(f"torch.{name}" for name in ("relu", "tanh", "sigmoid")),
    *(f"torch._C._nn.{name}" for name in ("gelu", "relu6", "silu", "mish", "hardswish")),
)
"""Activations, which modules hold and configs name: they compute and nothing else."""

LIBRARIES = (
    Library(
        name="torch",
        package="torch",
        training=(
            "torch.distributed.checkpoint.metadata",
            "torch.distributed.checkpoint.filesystem",
            "torch.distributed.checkpoint.planner",
            "torch.distributed.tensor.placement_types",
            "torch.distributed.tensor._dtensor_spec",
            "torch.distributed.device_mesh",
            "torch.distributed._mesh_layout",
            "torch.distributed.fsdp.api",
            "torch.distributed.fsdp.sharded_grad_scaler",
            "torch.amp.grad_scaler",
        ),
        framework=(
            "torch.nn",
            "torch.optim",
            "torch.ao.nn",
            "torch.distributions",
            "torch.utils.data",
            "torch.fx.immutable_collections",
        ),
        named=("torch.nn.modules", "torch.optim"),
        extra={
            "training": {
                "torch_tensor_class": ("torch.distributed.tensor.DTensor", "torch.distributed.tensor._api.DTensor"),
                "text": ("torch.torch_version.TorchVersion",),
                "function": TORCH_FUNCTIONS,
            },
        },
    ),
    Library(
        name="transformers",
        package="transformers",
        uses=("torch",),
        training=(
            "transformers.training_args",
            "transformers.training_args_seq2seq",
            "transformers.trainer_utils",
            "transformers.trainer_pt_utils",
            "transformers.trainer_callback",
            "transformers.debug_utils",
            "transformers.generation.configuration_utils",
            "transformers.utils.generic",
        ),
        framework=("transformers",),
    ),
    Library(
        name="accelerate",
        package="accelerate",
        uses=("torch", "transformers"),
        training=("accelerate.utils.dataclasses", "accelerate.state", "accelerate.utils.other"),
        framework=("accelerate",),
    ),
    Library(
        name="lightning",
        package="lightning",
        uses=("torch", "torchmetrics", "lightning_utilities"),
        training=(
            "lightning.fabric.utilities.data",
            "lightning.pytorch.utilities.parsing",
            "lightning.fabric.utilities.types",
        ),
        framework=("lightning.pytorch", "lightning.fabric"),
        extra={
            "training": {
                "dict_instance": (
                    "lightning_fabric.utilities.data.AttributeDict",
                    "pytorch_lightning.utilities.parsing.AttributeDict",
                )
            }
        },
    ),
    Library(
        name="torchmetrics",
        package="torchmetrics",
        uses=("torch", "lightning_utilities"),
        framework=("torchmetrics",),
        extra={
            "framework": {
                "function": (
                    *(f"torchmetrics.utilities.data.dim_zero_{how}" for how in ("cat", "sum", "mean", "max", "min")),
                    "torchmetrics.metric.jit_distributed_available",
                )
            }
        },
    ),
    Library(
        name="xgboost",
        package="xgboost",
        distributions=("xgboost-cpu", "xgboost"),
        uses=("sklearn",),
        framework=("xgboost.sklearn",),
        extra={"framework": {"xgboost_booster": ("xgboost.core.Booster",)}},
    ),
    Library(
        name="lightgbm",
        package="lightgbm",
        uses=("sklearn",),
        framework=("lightgbm.sklearn", "lightgbm.compat"),
        extra={"framework": {"lightgbm_booster": ("lightgbm.basic.Booster",)}},
    ),
    Library(
        name="scipy",
        package="scipy",
        # Not scipy.sparse: its native code writes through the indexes a matrix brings. These only read theirs.
        framework=("scipy.interpolate",),
        extra={"framework": {"function": ("scipy._lib.array_api_compat.numpy._aliases.asarray",)}},
        skip=("test", "tests", "conftest", "_lib", "datasets"),
    ),
    Library(
        name="sklearn",
        package="sklearn",
        distributions=("scikit-learn",),
        framework=("sklearn",),
        skip=("test", "tests", "conftest", "datasets", "_build_utils", "externals"),
        extra={
            "framework": {
                "sklearn_tree": ("sklearn.tree._tree.Tree",),
                "sklearn_pairs": (
                    "sklearn.neighbors._kd_tree.newObj",
                    "sklearn.neighbors._ball_tree.newObj",
                    "sklearn.metrics._dist_metrics.newObj",
                ),
                "sklearn_state": (
                    *(f"sklearn.neighbors._{tree}.{name}" for tree, name in TREES),
                    *(
                        f"sklearn.metrics._dist_metrics.{name}Distance{bits}"
                        for name in DISTANCES
                        for bits in ("32", "64", "")
                    ),
                ),
                "function": tuple(
                    f"sklearn.feature_selection.{module}.{name}"
                    for module, names in (
                        ("_univariate_selection", ("f_classif", "f_oneway", "f_regression", "chi2", "r_regression")),
                        ("_mutual_info", ("mutual_info_classif", "mutual_info_regression")),
                    )
                    for name in names
                ),
                "constant": (
                    "sklearn.cluster._kmeans._kmeans_single_lloyd",
                    "sklearn.cluster._kmeans._kmeans_single_elkan",
                    "sklearn.cluster._k_means_lloyd.lloyd_iter_chunked_dense",
                ),
                "constants": tuple(
                    f"sklearn._loss._loss.Cy{name}"
                    for name in (
                        *(
                            "AbsoluteError",
                            "ExponentialLoss",
                            "HalfBinomialLoss",
                            "HalfGammaLoss",
                            "HalfMultinomialLoss",
                        ),
                        *("HalfPoissonLoss", "HalfSquaredError", "HalfTweedieLoss", "HalfTweedieLossIdentity"),
                        *("HuberLoss", "PinballLoss"),
                    )
                )
                + tuple(
                    f"sklearn.linear_model._sgd_fast.{name}"
                    for name in (
                        *("Hinge", "SquaredHinge", "ModifiedHuber", "EpsilonInsensitive", "SquaredEpsilonInsensitive"),
                        *("Huber", "Log", "SquaredLoss"),
                    )
                ),
                "dict_instance": ("sklearn.utils._bunch.Bunch", "sklearn.utils.Bunch"),
            }
        },
    ),
)


@dataclass
class ClassShape:
    """What the syntax tree says about one class."""

    name: str
    bases: list[str]
    methods: set[str]
    slots: bool
    dataclass_slots: bool


class Sources:
    """The classes and imports of whole packages, by module."""

    def __init__(self) -> None:
        self.classes: dict[str, ClassShape] = {}
        self.names: dict[str, dict[str, str]] = {}
        """module → name in it → what it was imported as, qualified."""
        self.stars: dict[str, list[str]] = {}
        self.renamed: dict[str, str] = {}
        """Class → the name it is pickled by, where its module sets `Class.__module__`."""
        self.digests: dict[str, str] = {}
        self._chains: dict[str, list[ClassShape | str]] = {}

    def read_package(self, package: str) -> None:
        """Read every .py file of `package`; a file that does not parse is left out."""
        if package in self.digests:
            return
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{package}: not installed")
        root = Path(next(iter(spec.submodule_search_locations)))
        digest = hashlib.sha256()
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            data = path.read_bytes()
            digest.update(module.encode() + b"\0" + hashlib.sha256(data).digest())
            try:
                tree = ast.parse(data)
            except (SyntaxError, ValueError):
                continue
            self._module(module, tree, is_package=parts[-1] == "__init__")
        self.digests[package] = digest.hexdigest()

    def _module(self, module: str, tree: ast.Module, *, is_package: bool) -> None:
        names = self.names.setdefault(module, {})
        for node in top_level(tree.body):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    names[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
            elif isinstance(node, ast.ImportFrom):
                source = relative(module, node, is_package)
                for alias in node.names:
                    if alias.name == "*":
                        self.stars.setdefault(module, []).append(source)
                    else:
                        names[alias.asname or alias.name] = f"{source}.{alias.name}"
            elif isinstance(node, ast.Assign) and (moved := moved_to(node)) is not None:
                self.renamed[f"{module}.{moved[0]}"] = f"{moved[1]}.{moved[0]}"
            elif isinstance(node, ast.ClassDef):
                full = f"{module}.{node.name}"
                names[node.name] = full
                self.classes[full] = shape_of(full, node)

    def resolve(self, module: str, dotted: str, seen: frozenset[str] = frozenset()) -> str:
        """The qualified name of `dotted` as written in `module`, followed through re-exports."""
        head, _, rest = dotted.partition(".")
        target = self.names.get(module, {}).get(head)
        if target is None:
            for star in self.stars.get(module, []):
                if head in self.names.get(star, {}) and star not in seen:
                    return self.resolve(star, dotted, seen | {module})
            return dotted
        full = f"{target}.{rest}" if rest else target
        return self.final(full, seen)

    def final(self, full: str, seen: frozenset[str]) -> str:
        """`full`, or what it is an alias of."""
        if full in self.classes or full in seen:
            return full
        module, _, name = full.rpartition(".")
        while module and module not in self.names:
            module, _, more = module.rpartition(".")
            name = f"{more}.{name}"
        if not module:
            return full
        found = self.resolve(module, name, seen | {full})
        return full if found == name else found

    def chain(self, name: str, seen: tuple[str, ...] = ()) -> list[ClassShape | str]:
        """Every class above `name` and itself; a str for one without a syntax tree."""
        known = self._chains.get(name)
        if known is not None:
            return known
        shape = self.classes.get(name)
        if shape is None or name in seen:
            return [name]
        module = name.rpartition(".")[0]
        made: list[ClassShape | str] = [shape]
        for base in shape.bases:
            made += self.chain(self.resolve(module, base), (*seen, name))
        self._chains[name] = made
        return made


def moved_to(node: ast.Assign) -> tuple[str, str] | None:
    """(class, module) of a statement `Class.__module__ = "module"`, or None."""
    target = node.targets[0]
    if not isinstance(target, ast.Attribute) or target.attr != "__module__" or not isinstance(target.value, ast.Name):
        return None
    value = node.value.value if isinstance(node.value, ast.Constant) else None
    return (target.value.id, value) if isinstance(value, str) else None


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, also inside if, try and with at its top level."""
    for node in body:
        yield node
        for name in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from top_level(getattr(node, name, []))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from top_level(handler.body)


def relative(module: str, node: ast.ImportFrom, is_package: bool) -> str:
    """The absolute name of the module an ImportFrom reads."""
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*parts, node.module] if node.module else parts)


def dotted_name(node: ast.expr) -> str:
    """`a.b.c` of a base expression; `a.b.c[…]` counts as its value; anything else is '?'."""
    if isinstance(node, ast.Subscript):
        return dotted_name(node.value)
    if isinstance(node, ast.Attribute):
        return f"{dotted_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def shape_of(full: str, node: ast.ClassDef) -> ClassShape:
    """The shape of one class definition."""
    methods: set[str] = set()
    slots = False
    for item in top_level(node.body):
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef):
            methods.add(item.name)
        elif isinstance(item, ast.Assign | ast.AnnAssign):
            targets = item.targets if isinstance(item, ast.Assign) else [item.target]
            methods |= {target.id for target in targets if isinstance(target, ast.Name) and item.value is not None}
            slots = slots or any(isinstance(target, ast.Name) and target.id == "__slots__" for target in targets)
    return ClassShape(full, [dotted_name(base) for base in node.bases], methods, slots, has_slots_option(node))


def has_slots_option(node: ast.ClassDef) -> bool:
    """Whether a dataclass decorator says slots=True."""
    return any(
        isinstance(decorator, ast.Call)
        and dotted_name(decorator.func).endswith("dataclass")
        and any(word.arg == "slots" for word in decorator.keywords)
        for decorator in node.decorator_list
    )


def kind_of(sources: Sources, name: str) -> str | None:
    """The kind a class gets, or None when its chain does something we did not review or ends outside."""
    kinds: set[str] = set()
    shapes: list[ClassShape] = []
    for step in sources.chain(name):
        if isinstance(step, str):
            kind = HARMLESS_BASES.get(
                step.removeprefix("builtins.").replace("typing.OrderedDict", "collections.OrderedDict")
            )
            if step in ("typing.Dict", "Dict"):
                kind = "dict"
            if kind is None:
                return None
            kinds.add(kind)
        else:
            shapes.append(step)
    if "enum" in kinds:
        return "enum" if clean(shapes, RUN_WHEN_LOOKED_UP - {"__init__"}) else None
    if "none" in kinds or "text" in kinds or not clean(shapes, RUN_WHEN_LOADED):
        return None
    if "named_tuple" in kinds:
        return "named_tuple"
    if "dict" in kinds or "list" in kinds:
        if not clean(shapes, RUN_WHEN_FILLED - {"__init__"}):
            return None
        return f"{'dict' if 'dict' in kinds else 'list'}_instance"
    reviewed = next((REVIEWED[shape.name]["kind"] for shape in shapes if "kind" in REVIEWED.get(shape.name, {})), None)
    if reviewed:
        return reviewed
    return "instance_slots" if any(shape.slots or shape.dataclass_slots for shape in shapes) else "instance"


def clean(shapes: list[ClassShape], forbidden: frozenset[str]) -> bool:
    """Whether no class of the chain has a forbidden method that was not reviewed."""
    return not any(shape.methods & forbidden - set(REVIEWED.get(shape.name, {})) for shape in shapes)


def generate(library: Library) -> dict[str, dict[str, Any]]:
    """tier → the list's JSON value."""
    sources = Sources()
    for package in (*library.uses, library.package):
        sources.read_package(package)
    tiers: dict[str, dict[str, set[str]]] = {"training": {}, "framework": {}}
    renamed = {sources.final(name, frozenset()): new for name, new in sources.renamed.items()}
    for name in sources.classes:
        module = name.rpartition(".")[0]
        tier = tier_for(library, module)
        kind = kind_of(sources, name) if tier else None
        if tier and kind:
            names = {name} | ({renamed[name]} if name in renamed else set())
            tiers[tier].setdefault(kind, set()).update(names)
            if tier == "framework" and within(module, library.named):
                tiers["training"].setdefault("named", set()).update(names)
    for tier, kinds in library.extra.items():
        for kind, names in kinds.items():
            if names:
                tiers[tier].setdefault(kind, set()).update(names)
    version = version_of(library)
    return {
        tier: {
            "library": library.name,
            "versions": {library.name: version_range(version)},
            "provenance": {
                "tool": "tools/scan_lists.py",
                "version": version,
                "sources": {package: sources.digests[package] for package in (*library.uses, library.package)},
            },
            "tiers": {tier: {kind: sorted(names) for kind, names in sorted(kinds.items())}},
        }
        for tier, kinds in tiers.items()
        if kinds
    }


def version_of(library: Library) -> str:
    """The installed release of a library."""
    for distribution in library.distributions or (library.name,):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    raise SystemExit(f"{library.name}: not installed")


def tier_for(library: Library, module: str) -> str | None:
    """The tier the classes of a module belong to, or None."""
    if module in library.training:
        return "training"
    if set(module.split(".")) & set(library.skip):
        return None
    return "framework" if within(module, library.framework) else None


def within(module: str, packages: tuple[str, ...]) -> bool:
    """Whether `module` is one of `packages` or lies in one."""
    return any(module == package or module.startswith(package + ".") for package in packages)


def version_range(version: str) -> str:
    """The releases a list was made from: this minor one."""
    major, minor = version.split(".")[:2]
    return f">={major}.{minor},<{major}.{int(minor) + 1}"


def main() -> int:
    """Write the lists, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("libraries", nargs="*")
    options = parser.parse_args()
    differing = []
    for library in LIBRARIES:
        if options.libraries and library.name not in options.libraries:
            continue
        for tier, value in generate(library).items():
            path = LISTS / f"{tier}_{library.name}.json"
            text = json.dumps(value, indent=1) + "\n"
            if options.check and (not path.exists() or path.read_text() != text):
                differing.append(path.name)
            elif not options.check:
                path.write_text(text)
                print(path.name, {kind: len(names) for kind, names in value["tiers"][tier].items()})
    for name in differing:
        print(f"{name}: differs from what the installed release gives", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
