"""One function for each loader a scan can name: held bytes and the exact names in, the loaded value out.

torch files go through `torch.load(weights_only=True)` with exactly the vetted names added; where torch's own restricted
unpickler does not know an opcode or a class (it refuses 30 of 93 real training files), through CPython's, which is
given nothing but those names either. What was never vetted cannot be reached by either.
"""

from __future__ import annotations

import io
import json
import pickle
import types
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from trainguard.errors import Unavailable
from trainguard.loading.hold import Held
from trainguard.loading.names import find, unpickle, unpickler_of
from trainguard.loading.refusals import LoadRefused
from trainguard.scan.verdict import TORCH_OWN

Loader = Callable[[Held, Mapping[str, Any], Any], Any]
"""(bytes, vetted names → objects, map_location) → value"""


def load_torch(held: Held, allowed: Mapping[str, Any], map_location: Any) -> Any:
    """A torch zip or a file in torch's older format."""
    with held.open() as file:
        return load_torch_stream(file, allowed, map_location)


def load_torch_stream(file: Any, allowed: Mapping[str, Any], map_location: Any) -> Any:
    """As load_torch, for a seekable file."""
    import torch

    more = [(value, name) for name, value in allowed.items() if name not in TORCH_OWN]
    start = file.tell()
    try:
        with torch.serialization.safe_globals(more), warnings.catch_warnings():
            # torch warns of every pickle protocol but 2; what it then cannot read is read below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(file, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, AttributeError, TypeError) as error:
        file.seek(start)
        try:
            return torch.load(file, map_location=map_location, weights_only=False, pickle_module=_exact(allowed))
        except pickle.UnpicklingError:
            raise LoadRefused(f"torch cannot read it: {str(error).splitlines()[0][:200]}") from error


def _exact(allowed: Mapping[str, Any]) -> Any:
    """What torch.load wants of a pickle module, with nothing in it but the vetted names."""

    def load(file: BinaryIO, **options: Any) -> Any:
        return unpickler_of(allowed)(file, **options).load()

    return types.SimpleNamespace(
        __name__="trainguard.loading",
        Unpickler=unpickler_of(allowed),
        load=load,
        UnpicklingError=pickle.UnpicklingError,
    )


def load_pickle(held: Held, allowed: Mapping[str, Any], map_location: Any) -> Any:
    """A pickle; a list of values where several follow each other."""
    values = []
    with held.open() as file:
        while file.tell() < held.size:
            values.append(unpickle(file, allowed))
    return values[0] if len(values) == 1 else values


def load_safetensors(held: Held, allowed: Mapping[str, Any], map_location: Any) -> Any:
    """Tensors by name."""
    try:
        from safetensors.torch import load
    except ImportError as error:
        raise Unavailable("safetensors is not installed", next_step="pip install safetensors") from error
    tensors = load(held.read())
    return tensors if map_location is None else {name: tensor.to(map_location) for name, tensor in tensors.items()}


def load_numpy(held: Held, allowed: Mapping[str, Any], map_location: Any) -> Any:
    """The array of an .npy file (a list where several follow each other), or the arrays of an .npz by name."""
    with held.open() as file:
        if file.read(2) == b"PK":
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
                return {name.removesuffix(".npy"): _array(io.BytesIO(archive.read(name)), allowed) for name in names}
        file.seek(0)
        arrays = []
        while file.tell() < held.size:
            arrays.append(_array(file, allowed))
        return arrays[0] if len(arrays) == 1 else arrays


def _array(file: Any, allowed: Mapping[str, Any]) -> Any:
    """One array; the pickle of an object array is read with the vetted names only."""
    import numpy
    from numpy.lib import format as npy

    start = file.tell()
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if not dtype.hasobject:
        file.seek(start)
        return npy.read_array(file, allow_pickle=False)
    array = numpy.asarray(unpickle(file, allowed))
    if fortran:
        return array.reshape(shape[::-1]).transpose()
    return array.reshape(shape)


def load_joblib(held: Held, allowed: Mapping[str, Any], map_location: Any) -> Any:
    """A joblib stream. The pickles of object arrays inside it were vetted with it; joblib reads them itself."""
    try:
        from joblib.numpy_pickle import NumpyUnpickler  # type: ignore[import-untyped]
    except ImportError as error:
        raise Unavailable("joblib is not installed", next_step="pip install joblib") from error

    class Exact(NumpyUnpickler):  # type: ignore[misc]
        def find_class(self, module: str, name: str) -> Any:
            return find(allowed, module, name)

    with held.open() as file:
        return Exact("", file, ensure_native_byte_order=True).load()


def load_json(held: Held, allowed: Mapping[str, Any], map_location: Any) -> Any:
    """A JSON document, or a list of them where there is one a line."""
    text = held.read().decode("utf-8-sig")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]


LOADERS: dict[tuple[str, str], Loader] = {
    ("torch-zip", "torch"): load_torch,
    ("torch-legacy", "torch"): load_torch,
    ("pickle", "pickle"): load_pickle,
    ("safetensors", "safetensors"): load_safetensors,
    ("npy", "numpy"): load_numpy,
    ("npz", "numpy"): load_numpy,
    ("joblib", "joblib"): load_joblib,
    ("json", "json"): load_json,
    ("jsonl", "json"): load_json,
}
"""(format, loader) as scan names them → how it is loaded."""
