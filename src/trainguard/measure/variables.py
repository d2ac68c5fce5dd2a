"""Which environment variables decide what a job does, and how their values are written down.

Default deny: a variable that matches nothing here is not recorded, so that secrets and noise stay out. Values of names
that look secret are recorded by digest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from trainguard.measure.interpreter import boot_folder

MATTERS = re.compile(
    r"(PYTHON|LD_|GLIBC_|MALLOC_|TORCH|PYTORCH|ATEN_|AOT_|INDUCTOR|TRITON|NCCL|RCCL|UCX_|GLOO_|CUDA|CUDNN|CUBLAS|NVIDIA_|NVTE_"
    r"|NVTX_|CUPTI|HIP_|HSA_|ROCR_|MIOPEN_|OMP_|KMP_|GOMP_|MKL|OPENBLAS|BLIS_|VECLIB|ONEDNN|DNNL|TBB_|XLA_|JAX_|PJRT_|TF_(?:FORCE|ENABLE|XLA|CUDNN|DETERMINISTIC|NUM)"
    r"|HF_|TRANSFORMERS_|ACCELERATE_|DEEPSPEED|DS_|FSDP_|FLASH|XFORMERS|BITSANDBYTES|BNB_|PL_|LIGHTNING|NUMEXPR|NPY_|NUMPY_"
    r"|DEBUG_|BASH_ENV$|ENV$|FAKETIME|TZ$|SOURCE_DATE_EPOCH$|WORLD_SIZE$)\w*"
)

IGNORED = re.compile(
    r"(PYTHONUNBUFFERED|PYTHONDONTWRITEBYTECODE|PYTHONIOENCODING|PYTHONUTF8|PYTHONCOERCECLOCALE|PYTHONFAULTHANDLER"
    r"|CUDA_VISIBLE_DEVICES|HIP_VISIBLE_DEVICES|ROCR_VISIBLE_DEVICES|CUDA_DEVICE_ORDER|CUDA_VERSION|CUDA_HOME|CUDA_PATH"
    r"|NVIDIA_VISIBLE_DEVICES|NVIDIA_DRIVER_CAPABILITIES|NVIDIA_REQUIRE_\w+|NVIDIA_PRODUCT_NAME|NCCL_VERSION"
    r"|CUDA_MODULE_LOADING|TORCHELASTIC_\w+|TORCH_NCCL_ASYNC_ERROR_HANDLING|TORCH_CUDA_ARCH_LIST|TF_CPP_MIN_LOG_LEVEL"
    r"|HF_TOKEN\w*|HF_HUB_DISABLE_\w+|HF_HUB_ENABLE_HF_TRANSFER|TRANSFORMERS_VERBOSITY|LS_COLORS|LD_LIBRARY_PATH_ORIG"
    r"|PYTHON_VERSION|PYTHON_SHA256|PYTHON_PIP_VERSION|PYTHON_SETUPTOOLS_VERSION|PYTHON_GET_PIP_\w+)"
)
"""Of these, none changes what is computed or which code runs: output, credentials, which devices, image build notes."""

SECRET = re.compile(r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|API[-_]?KEY|ACCESS[-_]?KEY|PRIVATE", re.IGNORECASE)
VALUE_LIMIT = 4096


def relevant(env: Mapping[str, str]) -> dict[str, str]:
    """The variables of `env` that matter, sorted by name; our own start-up folder taken out of PYTHONPATH."""
    kept = {}
    for name in sorted(env):
        if not MATTERS.fullmatch(name) or IGNORED.fullmatch(name):
            continue
        value = env[name]
        if name == "PYTHONPATH":
            value = ":".join(entry for entry in value.split(":") if entry != boot_folder())
            if not value:
                continue
        kept[name] = _written(name, value)
    return kept


def _written(name: str, value: str) -> str:
    if SECRET.search(name) or len(value) > VALUE_LIMIT:
        return hidden(value)
    return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def hidden(value: str) -> str:
    """How a value that looks secret is written: equal values still compare equal."""
    return "sha256:" + hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()
