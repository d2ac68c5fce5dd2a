"""JSON beside a model: configs that name code (Hugging Face and friends), and JSON that names none.

Loaders turn these texts into imports:

  auto_map, custom_pipelines, custom_generate      transformers: Python files of the folder or of another repository
  attn_implementation, _attn_implementation…       transformers: "owner/kernel" downloads and imports (CVE-2026-4372)
  auto_mapping.parent_library                      peft: importlib.import_module
  _target_                                         hydra, OmegaConf, torchtune: any callable
  modules.json `type`, model_index.json            sentence-transformers, diffusers: classes by name
  {class_name, config}                             Keras: model_from_json, and a .keras archive's config
  py/object, py/function …                         jsonpickle
  weight_map, modules.json `path`                  files to load: only of this folder
  chat_template and other templates, prompts       Jinja, see templates.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from trainguard.scan.formats import jsons, keras, templates
from trainguard.scan.formats.interface import Job
from trainguard.scan.rules.plain import leads_out
from trainguard.scan.verdict import Verdict

CODE_KEYS = frozenset(("auto_map", "custom_pipelines", "custom_generate", "custom_pipeline", "trust_remote_code"))
JSONPICKLE = tuple(
    f"py/{kind}" for kind in ("object", "reduce", "type", "function", "repr", "newargs", "newargsex", "mod")
)
TARGET_KEYS = frozenset(("_target_", "_partial_target_", "__target__", "class_path", "py_class", *JSONPICKLE))
ATTENTION_KEYS = frozenset(("attn_implementation", "_attn_implementation", "_attn_implementation_internal"))
TEMPLATE_WORDS = ("template", "prompt")
"""Keys that hold one of these words hold programs, wherever braces stand in their text."""
INTERESTING = CODE_KEYS | TARGET_KEYS | ATTENTION_KEYS | {"parent_library"}
LIBRARIES = frozenset(
    f"transformers.models.{name}.modeling_{name}"
    for name in ("bert", "roberta", "llama", "mistral", "qwen2", "gpt2", "t5", "vit", "clip", "whisper", "gemma", "phi")
)
PIPELINE_LIBRARIES = frozenset(("diffusers", "transformers", "stable_diffusion", "onnxruntime.training"))
SENTENCE_MODULES = {
    "Transformer": "transformer",
    "Pooling": "pooling",
    "Normalize": "normalize",
    "Dense": "dense",
    "Dropout": "dropout",
    "LayerNorm": "layer_norm",
    "CNN": "cnn",
    "LSTM": "lstm",
    "BoW": "bow",
    "WordEmbeddings": "word_embeddings",
    "WeightedLayerPooling": "weighted_layer_pooling",
}
"""Class → the file it lies in; newer releases name both."""
SENTENCE_TYPES = frozenset(
    f"sentence_transformers.{path}.{name}"
    for path in ("models", "sentence_transformer.modules", "base.modules")
    for cls, module in SENTENCE_MODULES.items()
    for name in (cls, f"{module}.{cls}", f"{cls}.{cls}")
)
PIPELINE_INDEX = "model_index.json"
"""Where diffusers looks for [library, class] pairs, which it imports; elsewhere two words in a list are two words."""


def judge(job: Job, data: bytes | None) -> tuple[str, str]:
    """Judge JSON text; None when it is too long to hold, then only its keys are read."""
    try:
        value = jsons.parse(data, job.policy) if data is not None else None
    except jsons.TooBig:
        value = None
    except jsons.BadJson as error:
        job.unsafe("json", str(error))
        return "json", "json"
    if value is None:
        _judge_keys(job)
    else:
        _judge_value(job, value)
    return "json", "json"


def _judge_keys(job: Job) -> None:
    if job.source.size > 2 * job.policy.json_bytes:
        job.unknown("json", f"{job.source.size} bytes of JSON, limit {2 * job.policy.json_bytes}")
        return
    try:
        jsons.check_brackets(job.source)
    except jsons.BadJson as error:
        job.unsafe("json", str(error))
        return
    for key in jsons.keys(job.source):
        if key in INTERESTING:
            job.unknown("config", f"{key!a}: names code, in a file too large to read whole")
            return
        job.meter.check_time()


def _judge_value(job: Job, value: Any) -> None:
    for key, inner in jsons.walk(value):
        if key in CODE_KEYS and inner not in (None, False, [], {}, ""):
            _code(job, key, inner)
        elif key in TARGET_KEYS and (text := ".".join(_texts(inner))):
            job.note(
                Verdict.UNKNOWN, "config", f"{key}: names {text[:120]!a} to be called", global_name=text, use="call"
            )
        elif key in ATTENTION_KEYS and (
            kernel := next((text for text in _texts(inner) if set(text) & set("/:")), None)
        ):
            job.unsafe("config", f"{key}: {kernel[:120]!a} downloads and imports code")
        elif key == "parent_library" and isinstance(inner, str) and inner not in LIBRARIES:
            job.note(Verdict.UNKNOWN, "config", f"{key}: imports {inner[:120]!a}", global_name=inner, use="value")
        elif key == "weight_map" and isinstance(inner, dict):
            _places(job, key, inner.values())
        elif any(word in key.lower() for word in TEMPLATE_WORDS):
            _templates(job, key, inner)
    if isinstance(value, dict) and {"cells", "nbformat"} <= set(value):
        job.unknown("source", "a notebook: code beside a model; read it, or leave it out")
    if any(_is_keras(item) for item in _dicts(value)):
        keras.judge_config(job, value)
    _class_tables(job, value)


def _dicts(value: Any) -> Iterator[dict[str, Any]]:
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield item
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _is_keras(item: dict[str, Any]) -> bool:
    """A class to be made from a config, as Keras writes it."""
    return "class_name" in item and isinstance(item.get("config"), dict | list)


def _places(job: Job, key: str, places: Iterable[Any]) -> None:
    """Files a loader joins to this folder: one that leads elsewhere was never vetted."""
    for place in places:
        text = place if isinstance(place, str) else ""
        if leads_out(text):
            job.unsafe("config", f"{key}: {text[:120]!a} leads out of the folder")
            return


def _code(job: Job, key: str, inner: Any) -> None:
    """A config that names Python files: theirs must be known, a repository elsewhere is unsafe."""
    if key == "trust_remote_code":
        job.unsafe("config", "trust_remote_code is set in the file: it would switch the loader's own check off")
        return
    names = sorted({text for text in _texts(inner) if text})
    for name in names[:8]:
        if "--" in name or "/" in name:
            job.unsafe("config", f"{key}: {name[:120]!a} is code from another repository")
        else:
            job.note(
                Verdict.UNKNOWN,
                "config",
                f"{key}: names {name[:120]!a}, a file to import",
                global_name=name,
                use="value",
            )


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


def _templates(job: Job, key: str, inner: Any) -> None:
    for text in _texts(inner):
        why = templates.problem(text)
        if why:
            job.unsafe("template", f"{key}: {why}")


def _class_tables(job: Job, value: Any) -> None:
    """modules.json, router_config.json and model_index.json, known by their shape."""
    if isinstance(value, dict) and {"types", "structure"} <= set(value):
        for name in _texts(value["types"]):
            if name not in SENTENCE_TYPES:
                job.note(Verdict.UNKNOWN, "config", f"types: imports {name[:120]!a}", global_name=name, use="call")
    if isinstance(value, list):
        for item in value:
            kind = item.get("type") if isinstance(item, dict) and {"idx", "name", "path"} <= set(item) else None
            if kind is not None:
                _places(job, "path", [item["path"]])
            if isinstance(kind, str) and kind not in SENTENCE_TYPES:
                job.note(Verdict.UNKNOWN, "config", f"type: imports {kind[:120]!a}", global_name=kind, use="call")
    elif isinstance(value, dict) and job.name.lower() in (PIPELINE_INDEX, "") and "_class_name" in value:
        for key, pair in value.items():
            if _is_class(pair) and pair[0] not in PIPELINE_LIBRARIES:
                name = f"{pair[0]}.{pair[1]}"
                job.note(Verdict.UNKNOWN, "config", f"{key}: imports {name[:120]!a}", global_name=name, use="call")


def _is_class(value: Any) -> bool:
    """A [library, class] pair of a pipeline index."""
    return isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value)
