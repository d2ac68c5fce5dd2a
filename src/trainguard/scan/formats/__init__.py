"""Formats: how each kind of file is recognised and judged. One file per format; `FORMATS` is the order of asking."""

from trainguard.scan.formats.compressed import COMPRESSED
from trainguard.scan.formats.gguf import GGUF
from trainguard.scan.formats.hdf5 import HDF5
from trainguard.scan.formats.inert import EVENTS, IMAGE
from trainguard.scan.formats.interface import Format
from trainguard.scan.formats.native import ARCHIVE_FORMAT, CODE_FORMAT
from trainguard.scan.formats.npy import NPY
from trainguard.scan.formats.onnx import ONNX, SENTENCEPIECE
from trainguard.scan.formats.pickles import PICKLE_FORMAT
from trainguard.scan.formats.safetensors import SAFETENSORS
from trainguard.scan.formats.tables import ARROW, CATBOOST, MATLAB, PARQUET
from trainguard.scan.formats.tar import TAR
from trainguard.scan.formats.ubjson import UBJSON
from trainguard.scan.formats.zips import ZIP

STRONG: tuple[Format, ...] = (
    SAFETENSORS,  # before pickle: one header length in a few hundred looks like a PROTO opcode
    PICKLE_FORMAT,
    *(ZIP, NPY, HDF5, GGUF, UBJSON, ARCHIVE_FORMAT),
    *COMPRESSED[:5],
    *(IMAGE, CODE_FORMAT, PARQUET, ARROW, MATLAB, CATBOOST),
)
"""Formats with a magic, asked first."""
SHAPED: tuple[Format, ...] = (TAR, EVENTS, *COMPRESSED[5:], ONNX, SENTENCEPIECE)
"""Formats known by a checksum or their whole shape; asked of what is not text."""

__all__ = ["SHAPED", "STRONG", "Format"]
