"""A second held-out set of real benign files, chosen after the first had been measured.

Boosted trees, other schedulers and optimizers, averaged weights, other dtypes and layouts, other HF and Lightning runs,
distributed checkpoints with nested state, numpy, pandas and standard library objects, the third of scikit-learn's
estimators that no earlier set had. Its alarm rate before any list was touched for it stands in docs/checks/scan.md.
"""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import functools
import io
import ipaddress
import json
import pathlib
import pickle
import re
import uuid
import warnings
import zoneinfo
from collections.abc import Callable
from pathlib import Path

Maker = Callable[[Path], None]


def _model(seed: int = 1):
    import torch

    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))


def _stepped(optimizer, model):
    import torch

    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    return optimizer


# boosted trees ---------------------------------------------------------------------------------------------------


def _table():
    import numpy

    state = numpy.random.RandomState(3)
    x = state.rand(80, 5)
    return x, (x[:, 0] + x[:, 1] > 1).astype(int), x[:, 0] * 3 + x[:, 2]


def xgboost_native(path: Path) -> None:
    """XGBoost's own formats: JSON and UBJSON, of every booster, with categories, and a saved configuration."""
    import numpy
    import xgboost

    x, y, _ = _table()
    data = xgboost.DMatrix(x, label=y, feature_names=list("abcde"))
    for booster, objective in (
        ("gbtree", "binary:logistic"),
        ("gblinear", "reg:squarederror"),
        ("dart", "rank:pairwise"),
    ):
        if objective == "rank:pairwise":
            data.set_group([40, 40])
        made = xgboost.train({"booster": booster, "objective": objective, "nthread": 1}, data, 4)
        made.set_attr(best_score="0.5")
        made.save_model(path / f"{booster}.json")
        made.save_model(path / f"{booster}.ubj")
    (path / "config.json").write_text(made.save_config())
    (path / "raw.bin").write_bytes(bytes(made.save_raw("ubj")))
    many = xgboost.XGBClassifier(n_estimators=3, n_jobs=1).fit(x, numpy.arange(80) % 4)
    many.save_model(path / "classes.ubj")
    made.dump_model(path / "dump.txt")
    made.dump_model(path / "dump.json", dump_format="json")


def xgboost_objects(path: Path) -> None:
    """XGBoost estimators and boosters by pickle and joblib."""
    import joblib
    import xgboost

    x, y, z = _table()
    for kind, target in (
        (xgboost.XGBClassifier, y),
        (xgboost.XGBRegressor, z),
        (xgboost.XGBRFClassifier, y),
        (xgboost.XGBRFRegressor, z),
    ):
        made = kind(n_estimators=3, n_jobs=1).fit(x, target)
        (path / f"{kind.__name__}.pkl").write_bytes(pickle.dumps(made))
        joblib.dump(made, path / f"{kind.__name__}.joblib")
    ranker = xgboost.XGBRanker(n_estimators=2, n_jobs=1).fit(x, y, group=[40, 40])
    (path / "XGBRanker.pkl").write_bytes(pickle.dumps(ranker))
    (path / "Booster.pkl").write_bytes(pickle.dumps(made.get_booster()))


def lightgbm_native(path: Path) -> None:
    """LightGBM's text format and its JSON dump."""
    import lightgbm
    import numpy

    x, y, z = _table()
    quiet = {"verbose": -1, "num_threads": 1, "min_data_in_leaf": 3}
    for objective, target in (("binary", y), ("regression", z), ("multiclass", numpy.arange(80) % 3)):
        settings = quiet | {"objective": objective} | ({"num_class": 3} if objective == "multiclass" else {})
        made = lightgbm.train(settings, lightgbm.Dataset(x, target, feature_name=list("abcde")), 4)
        made.save_model(path / f"{objective}.txt")
        made.save_model(path / f"{objective}_model.bin")
        (path / f"{objective}.json").write_text(json.dumps(made.dump_model()))
    x[:, 4] = (x[:, 4] * 4).astype(int)
    lightgbm.train(
        quiet | {"objective": "binary", "linear_tree": True, "boosting": "dart"},
        lightgbm.Dataset(x, y, categorical_feature=[4], params={"min_data_per_group": 2, "linear_tree": True}),
        3,
    ).save_model(path / "categories.txt")


def lightgbm_objects(path: Path) -> None:
    """LightGBM estimators and boosters by pickle and joblib."""
    import joblib
    import lightgbm

    x, y, z = _table()
    for kind, target in ((lightgbm.LGBMClassifier, y), (lightgbm.LGBMRegressor, z)):
        made = kind(n_estimators=3, n_jobs=1, verbose=-1).fit(x, target)
        (path / f"{kind.__name__}.pkl").write_bytes(pickle.dumps(made))
        joblib.dump(made, path / f"{kind.__name__}.joblib", compress=3)
    ranker = lightgbm.LGBMRanker(n_estimators=2, n_jobs=1, verbose=-1, min_child_samples=2).fit(x, y, group=[40, 40])
    (path / "LGBMRanker.pkl").write_bytes(pickle.dumps(ranker))
    (path / "Booster.pkl").write_bytes(pickle.dumps(made.booster_))


# torch training state --------------------------------------------------------------------------------------------


def more_schedulers(path: Path) -> None:
    """The schedulers and averaging the earlier sets did not have, as resumable state."""
    import torch

    model = _model()
    optimizer = _stepped(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
    made = torch.optim.lr_scheduler
    chain = [made.ConstantLR(optimizer), made.PolynomialLR(optimizer), made.ExponentialLR(optimizer, 0.9)]
    for scheduler in (
        *chain,
        made.SequentialLR(optimizer, [made.LinearLR(optimizer), made.CosineAnnealingLR(optimizer, 5)], [2]),
        made.ChainedScheduler(chain),
        made.CyclicLR(optimizer, 0.01, 0.1),
        made.MultiplicativeLR(optimizer, lambda epoch: 0.9),
        torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.05),
    ):
        state = {"scheduler": scheduler.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 2}
        torch.save(state, path / f"{type(scheduler).__name__}.pt")


def more_optimizers(path: Path) -> None:
    """Muon, named parameters, complex and half parameters, tensor rates, param groups with odd entries."""
    import torch

    model = _model()
    torch.save(
        _stepped(torch.optim.AdamW(model.named_parameters(), lr=torch.tensor(0.01)), model).state_dict(),
        path / "named.pt",
    )
    weights = [p for p in model.parameters() if p.dim() == 2]
    torch.save(_stepped(torch.optim.Muon(weights, lr=0.01), model).state_dict(), path / "muon.pt")
    for dtype in (torch.bfloat16, torch.float16, torch.complex64, torch.float64):
        parameter = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        optimizer = torch.optim.Adam([{"params": [parameter], "name": "head", "initial_lr": 0.1, "schedule": (1, 2)}])
        (parameter * parameter).abs().sum().backward()
        optimizer.step()
        torch.save({"p": parameter, "opt": optimizer.state_dict()}, path / f"{str(dtype)[6:]}.pt")
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    average.update_parameters(model)
    torch.save(
        {"ema": average.state_dict(), "shadow": [p.detach().clone() for p in average.parameters()]}, path / "ema.pt"
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    torch.save({"scaler": scaler.state_dict(), "steps": torch.tensor([1, 2]), "best": float("inf")}, path / "scaler.pt")


def more_tensors(path: Path) -> None:
    """Layouts and dtypes of tensors, quantized modules' state, masked weights, storages, views across storages."""
    import torch

    dense = torch.arange(16.0).reshape(4, 4)
    torch.save(
        {"csc": dense.to_sparse_csc(), "bsr": dense.to_sparse_bsr((2, 2)), "bsc": dense.to_sparse_bsc((2, 2))},
        path / "sparse.pt",
    )
    torch.save(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), path / "jagged.pt")
    torch.save({"conj": (dense + 1j).conj(), "neg": (dense + 1j).conj().imag, "h": dense.cfloat().mH}, path / "lazy.pt")
    torch.save(
        {
            f"{kind}": torch.zeros(2, 2).to(kind)
            for kind in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu)
        },
        path / "fp8.pt",
    )
    torch.save(
        {"half": torch.ones(2, dtype=torch.complex32), "q32": torch.quantize_per_tensor(dense, 0.5, 0, torch.qint32)},
        path / "rare.pt",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = torch.ao.quantization.quantize_dynamic(_model(), {torch.nn.Linear}, torch.qint8)
    torch.save(dynamic.state_dict(), path / "quantized_linear.pt")
    from torch.nn.utils import prune

    pruned = torch.nn.Linear(3, 3)
    prune.l1_unstructured(pruned, "weight", 0.5)
    torch.save(pruned.state_dict(), path / "pruned.pt")
    torch.save(dense.untyped_storage(), path / "untyped.pt")
    torch.save({"lazy": torch.nn.LazyLinear(2).state_dict(), "buffer": torch.nn.Buffer(dense)}, path / "lazy_module.pt")
    torch.save(
        [
            torch.finfo(torch.float16).max,
            torch.iinfo(torch.int8).min,
            torch.memory_format and dense.to(memory_format=torch.contiguous_format),
        ],
        path / "info.pt",
    )
    torch.save(
        {"model": _model().state_dict(), "views": [dense[1:], dense[::2], dense.expand(2, 4, 4), dense[:0]]},
        path / "old.pth",
        _use_new_zipfile_serialization=False,
    )
    torch.save(_model().half().state_dict(), path / "half_protocol5.pt", pickle_protocol=5)


def odd_containers(path: Path) -> None:
    """What people put beside weights: enums of libraries, partials, paths, dates, decimals, patterns, user strings."""
    import array

    import torch

    values = {
        "when": (
            datetime.date(2026, 1, 2),
            datetime.time(3, 4),
            datetime.datetime(2026, 1, 2, tzinfo=zoneinfo.ZoneInfo("UTC")),
        ),
        "decimal": (decimal.Decimal("0.1"), fractions.Fraction(1, 3)),
        "id": uuid.UUID(int=5),
        "address": ipaddress.ip_address("10.0.0.1"),
        "path": (pathlib.PurePosixPath("a/b"), Path("out")),
        "pattern": re.compile("layer[.](\\d+)"),
        "array": array.array("f", [1.0, 2.0]),
        "map": collections.ChainMap({"a": 1}, {"b": 2}),
        "frozen": frozenset({1, 2}),
        "bytes": bytearray(b"abc"),
        "dots": [..., NotImplemented, range(2, 9, 3), slice(None, None, -1), 1j],
        "user": collections.UserDict(a=1),
        "nested": collections.defaultdict(int, a=1),
        "lists": collections.defaultdict(functools.partial(collections.defaultdict, list)),
        "partial": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
        "kinds": [torch.nn.GELU, torch.optim.AdamW, int, float, str],
        "flag": re.IGNORECASE,
        "code": http_status(),
    }
    for name, value in values.items():
        torch.save({"step": 3, name: value}, path / f"{name}.pt")
    torch.save({"seed": 3, **{f"key{n}": [None, True, "x" * n, -(2**70)] for n in range(20)}}, path / "plain.pt")


def http_status() -> enum.IntEnum:
    """A member of an enum of the standard library."""
    import http

    return http.HTTPStatus.OK


def data_pipeline(path: Path) -> None:
    """Datasets, samplers, splits and tokenized rows, as state and as objects."""
    import torch

    data = torch.utils.data.TensorDataset(torch.ones(6, 2), torch.arange(6))
    sampler = torch.utils.data.RandomSampler(data, generator=torch.Generator().manual_seed(1))
    torch.save({"indices": list(sampler), "generator": sampler.generator.get_state()}, path / "sampler_state.pt")
    train, test = torch.utils.data.random_split(data, [4, 2])
    torch.save({"train": train.indices, "test": test.indices}, path / "split.pt")
    torch.save({"input_ids": [torch.arange(5, dtype=torch.int32)] * 3, "lengths": [5, 5, 5]}, path / "rows.pt")


# HF, Lightning, accelerate, distributed --------------------------------------------------------------------------


def other_trainer(path: Path) -> None:
    """Another model type, evaluation, early stopping, a scheduler with arguments, a tokenizer."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {word: number for number, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "a", "b", "c"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}{% endfor %}"
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
        )
    )
    model.generation_config.max_length = 9
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)} for _ in range(4)]
    settings = transformers.TrainingArguments(
        output_dir=str(path / "llama"),
        max_steps=2,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=7,
        weight_decay=0.1,
        gradient_accumulation_steps=2,
    )
    trainer = transformers.Trainer(
        model=model,
        args=settings,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        callbacks=[transformers.EarlyStoppingCallback(2)],
    )
    trainer.train()
    trainer.save_metrics("train", {"loss": 1.0})
    trainer.save_state()
    model.save_pretrained(path / "sharded", max_shard_size="1KB")


def other_configs(path: Path) -> None:
    """Configs and weights of other model types, built from nothing, and their processors' files."""
    import torch
    import transformers

    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    for kind in (
        "Mistral",
        "Roberta",
        "Electra",
        "Qwen2",
        "Gemma",
        "Mixtral",
        "Phi",
        "OPT",
        "Whisper",
        "CLIPText",
        "Mamba",
    ):
        config = getattr(transformers, f"{kind}Config")(**(tiny if kind not in ("OPT", "Whisper", "Mamba") else {}))
        config.save_pretrained(path / kind)
        torch.save(config.to_dict(), path / kind / "config.pt")
    transformers.GenerationConfig(temperature=0.5, top_p=0.9, do_sample=True).save_pretrained(path)
    transformers.WhisperFeatureExtractor().save_pretrained(path / "whisper_features")


def other_lightning(path: Path) -> None:
    """Callbacks with state, stochastic and exponential averaging, two optimizers by hand, a data module, loggers."""
    import lightning
    import torch
    from lightning.pytorch import callbacks

    class Both(lightning.LightningModule):
        def __init__(
            self, width: int = 4, where: Path = Path("out"), options: dict | None = None, dtype=torch.float32
        ) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)
            self.automatic_optimization = False

        def training_step(self, batch, index):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.second(self.first(batch[0])).sum())
                optimizer.step()
            self.log("loss", 1.0)

        def configure_optimizers(self):
            return torch.optim.SGD(self.first.parameters(), lr=0.1), torch.optim.RAdam(self.second.parameters())

    class One(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 2)

        def training_step(self, batch, index):
            loss = self.layer(batch[0]).sum()
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters())
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "loss"},
            }

    class Data(lightning.LightningDataModule):
        def __init__(self, batch: int = 2, split: tuple = (0.5, 0.5)) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 4)), batch_size=2)

        def state_dict(self):
            return {"seen": 4, "order": [1, 2]}

    def fit(module, name: str, *more, **options) -> None:
        saver = callbacks.ModelCheckpoint(
            dirpath=path / name, monitor="loss", save_top_k=2, save_last=True, every_n_train_steps=1
        )
        lightning.Trainer(
            max_epochs=2,
            logger=lightning.pytorch.loggers.CSVLogger(path / name),
            callbacks=[saver, *more],
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=1,
            **options,
        ).fit(module, datamodule=Data())

    fit(Both(options={"depth": [1, 2], "act": torch.nn.GELU}), "manual")
    fit(
        One(),
        "plateau",
        callbacks.EarlyStopping("loss"),
        callbacks.LearningRateMonitor(),
        callbacks.Timer("00:00:10:00"),
    )
    fit(
        One(),
        "ema",
        callbacks.WeightAveraging() if not hasattr(callbacks, "EMAWeightAveraging") else callbacks.EMAWeightAveraging(),
    )
    fit(One(), "swa", callbacks.GradientAccumulationScheduler({0: 1}), gradient_clip_val=1.0)


def fabric_and_accelerate(path: Path) -> None:
    """Fabric's save and accelerate's folder with a scheduler and an object of the user's registered."""
    import accelerate
    import lightning
    import torch

    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    model = _model()
    optimizer = torch.optim.Adamax(model.parameters())
    wrapped, wrapped_optimizer = fabric.setup(model, optimizer)
    wrapped(torch.ones(1, 6)).sum().backward()
    wrapped_optimizer.step()
    fabric.save(path / "fabric.ckpt", {"model": wrapped, "optimizer": wrapped_optimizer, "iteration": 1})
    helper = accelerate.Accelerator(cpu=True)
    model = _model()
    optimizer = torch.optim.NAdam(model.parameters())
    loader = torch.utils.data.DataLoader(torch.ones(4, 6), batch_size=2)
    model, optimizer, loader, scheduler = helper.prepare(
        model, optimizer, loader, torch.optim.lr_scheduler.StepLR(optimizer, 1)
    )
    helper.register_for_checkpointing(torch.nn.Linear(1, 1))
    for batch in loader:
        helper.backward(model(batch).sum())
        optimizer.step()
        scheduler.step()
    helper.save_state(str(path / "accelerate"))


def nested_distributed(path: Path) -> None:
    """Distributed checkpoints: nested containers, stateful objects, one file per item, HF layout, converted ones."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import filesystem, format_utils
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    class Progress:
        def state_dict(self):
            return {"tokens": torch.tensor(7), "files": ["a", "b"], "mix": {"web": 0.5, "code": (1, 2)}}

        def load_state_dict(self, state):
            pass

    model = _model()
    nested = {
        "model": model.state_dict(),
        "progress": Progress(),
        "extra": {"list": [torch.ones(2), {"deep": [1, None, "x", b"y"]}], "rng": torch.get_rng_state(), "lr": 0.1},
        "half": torch.ones(3, dtype=torch.bfloat16),
        "when": datetime.datetime(2026, 1, 1),
    }
    dcp.save(nested, checkpoint_id=path / "nested")
    writer = filesystem.FileSystemWriter(path / "items", single_file_per_rank=False, thread_count=2)
    dcp.save(nested, storage_writer=writer)
    format_utils.dcp_to_torch_save(str(path / "nested"), str(path / "converted.pt"))
    format_utils.torch_save_to_dcp(str(path / "converted.pt"), str(path / "back"))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = _model()
        fully_shard(
            sharded, mesh=init_device_mesh("cpu", (1,)), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        )
        optimizer = torch.optim.AdamW(sharded.parameters(), foreach=False)
        sharded(torch.ones(2, 6)).sum().backward()
        optimizer.step()
        weights, state = get_state_dict(sharded, optimizer)
        dcp.save({"model": weights, "optim": state, "step": 3}, checkpoint_id=path / "fsdp2")
        torch.save({"model": sharded.state_dict(), "optim": state}, path / "rank0.pt")
    finally:
        dist.destroy_process_group()


# numpy and pandas ------------------------------------------------------------------------------------------------


def more_numpy(path: Path) -> None:
    """Rare numpy objects, by pickle of several protocols, npy and npz."""
    import numpy

    values = {
        "strings": numpy.array(["a", "bc"], dtype=numpy.dtypes.StringDType()),
        "long": numpy.ones(2, dtype=numpy.longdouble),
        "delta": numpy.array([1, 2], dtype="timedelta64[s]"),
        "nested": numpy.zeros(2, dtype=[("a", "f4", (2, 2)), ("b", [("c", "i2"), ("d", "U4")])]),
        "rec": numpy.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        "void": numpy.zeros(1, dtype=[("a", "i4")])[0],
        "date": numpy.datetime64("2026-01-01"),
        "poly": numpy.poly1d([1, 2]),
        "chars": numpy.char.array(["a", "b"]),
        "ragged": numpy.array([numpy.ones(2), numpy.ones(3)], dtype=object),
        "masked": numpy.ma.masked_array([1, 2], mask=[0, 1], fill_value=-1),
        "scalars": [numpy.float16(1), numpy.uint8(2), numpy.complex64(1j), numpy.str_("x"), numpy.bytes_(b"y")],
        "view": numpy.arange(24).reshape(2, 3, 4)[:, ::2].T,
        "zero": numpy.array(3.0),
        "generators": [numpy.random.Generator(numpy.random.MT19937(1)), numpy.random.SeedSequence(1).spawn(1)[0]],
        "dtypes": [numpy.dtype("f4"), numpy.float32, numpy.dtype([("x", "i1")])],
    }
    for number, (name, value) in enumerate(values.items()):
        (path / f"{name}.pkl").write_bytes(pickle.dumps(value, protocol=2 + number % 4))
    numpy.savez(path / "set.npz", strings=values["rec"], masks=values["view"], scalar=values["zero"])
    numpy.save(path / "ragged.npy", values["ragged"], allow_pickle=True)
    numpy.lib.format.open_memmap(path / "map.npy", mode="w+", dtype="f4", shape=(3, 2)).flush()


def pandas_objects(path: Path) -> None:
    """Frames and series of metrics, as training scripts pickle them, alone and in a checkpoint."""
    import numpy
    import pandas
    import torch

    frame = pandas.DataFrame({"step": [1, 2], "loss": [0.5, 0.25], "split": ["train", "eval"]})
    values = {
        "frame": frame,
        "series": frame["loss"],
        "indexed": frame.set_index("step"),
        "multi": frame.set_index(["split", "step"]),
        "times": pandas.DataFrame({"v": [1.0, 2.0]}, index=pandas.date_range("2026-01-01", periods=2)),
        "category": frame.assign(split=frame["split"].astype("category")),
        "nullable": frame.assign(step=frame["step"].astype("Int64")),
        "objects": pandas.Series(["a", None, 3], dtype=object),
        "stamp": pandas.Timestamp("2026-01-01"),
    }
    for name, value in values.items():
        value.to_pickle(path / f"{name}.pkl") if hasattr(value, "to_pickle") else (path / f"{name}.pkl").write_bytes(
            pickle.dumps(value)
        )
    torch.save({"history": frame, "best": numpy.float64(0.25)}, path / "with_history.pt")
    frame.to_csv(path / "metrics.csv")
    frame.to_json(path / "metrics.json")
    frame.to_json(path / "metrics.jsonl", orient="records", lines=True)


def text_files(path: Path) -> None:
    """Logs, READMEs, vocabularies and settings as they lie beside checkpoints."""
    (path / "README.md").write_text(
        "---\nlicense: mit\ntags:\n- text\n---\n# Model\n\n```python\nfrom x import y\n```\n"
    )
    (path / "merges.txt").write_text("#version: 0.2\nĠ t\nĠ a\nh e\n")
    (path / "vocab.txt").write_text("[PAD]\n[UNK]\n.\nthe\n##s\n(\n")
    (path / "train.log").write_text("2026-01-01 12:00:00 INFO step 1 loss 0.5\n\x1b[32mgreen\x1b[0m\n")
    (path / "settings.toml").write_text("[train]\nlr = 0.1\n")
    (path / "settings.yaml").write_text("train:\n  lr: 0.1\n  betas: [0.9, 0.95]\n")
    (path / "latest").write_text("checkpoint-2\n")
    (path / "model.safetensors.index.json").write_text(
        '{"metadata": {"total_size": 8}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}'
    )
    (path / "events.csv").write_text("step,loss\n1,0.5\n")
    (path / ".gitattributes").write_text("*.bin filter=lfs diff=lfs merge=lfs -text\n")
    (path / "empty.txt").write_text("")


# objects for the framework tier ----------------------------------------------------------------------------------


def more_framework(path: Path) -> None:
    """Optimizers, schedulers, datasets, samplers, distributions and modules as whole objects."""
    import torch
    import torchmetrics
    import transformers

    model = _model()
    optimizer = _stepped(torch.optim.Adagrad(model.parameters()), model)
    made = torch.optim.lr_scheduler
    data = torch.utils.data.TensorDataset(torch.ones(6, 2))
    nn = torch.nn
    values = {
        "sequential": made.SequentialLR(
            optimizer, [made.LinearLR(optimizer), made.CosineAnnealingLR(optimizer, 5)], [2]
        ),
        "chained": made.ChainedScheduler([made.ConstantLR(optimizer), made.PolynomialLR(optimizer)]),
        "plateau": made.ReduceLROnPlateau(optimizer),
        "warm": made.CosineAnnealingWarmRestarts(optimizer, 5),
        "muon": torch.optim.Muon([p for p in model.parameters() if p.dim() == 2]),
        "dataset": torch.utils.data.ConcatDataset([data, torch.utils.data.Subset(data, [1, 2])]),
        "loader": torch.utils.data.DataLoader(data, batch_size=2),
        "normal": torch.distributions.Normal(torch.zeros(2), torch.ones(2)),
        "mixture": torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(torch.ones(2)), torch.distributions.Normal(torch.zeros(2), torch.ones(2))
        ),
        "gru": nn.GRU(2, 2, bidirectional=True),
        "transformer": nn.Transformer(4, 1, 1, 1, 4),
        "attention": nn.MultiheadAttention(4, 2),
        "norms": nn.ModuleDict(
            {"g": nn.GroupNorm(2, 4), "r": nn.RMSNorm(4), "i": nn.InstanceNorm1d(4), "l": nn.LocalResponseNorm(2)}
        ),
        "pools": nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.LPPool2d(2, 2), nn.FractionalMaxPool2d(2, output_size=1), nn.MaxUnpool1d(2)
        ),
        "embed": nn.Sequential(nn.EmbeddingBag(4, 2), nn.Bilinear(2, 2, 2)),
        "parameters": nn.ParameterDict(
            {"a": nn.Parameter(torch.ones(1)), "b": nn.ParameterList([nn.Parameter(torch.ones(1))])}
        ),
        "upsample": nn.Sequential(nn.Upsample(scale_factor=2), nn.ConvTranspose2d(1, 1, 2), nn.PixelUnshuffle(2)),
        "losses": [
            nn.CrossEntropyLoss(),
            nn.TripletMarginLoss(),
            nn.GaussianNLLLoss(),
            nn.SmoothL1Loss(),
            nn.NLLLoss(),
        ],
        "f1": torchmetrics.classification.BinaryF1Score(),
        "regression": torchmetrics.MetricCollection([torchmetrics.MeanSquaredError(), torchmetrics.R2Score()]),
        "llama": transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=8
            )
        ),
        "electra": transformers.ElectraModel(
            transformers.ElectraConfig(
                hidden_size=8,
                embedding_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=8,
                vocab_size=8,
            )
        ),
        "config": transformers.MistralConfig(),
    }
    for name, value in values.items():
        torch.save(value, path / f"{name}.pt")


def remaining_sklearn(path: Path) -> None:
    """The estimators no earlier set had, and searches, pipelines, calibration around them."""
    import joblib
    import numpy
    from sklearn import (
        calibration,
        compose,
        decomposition,
        ensemble,
        linear_model,
        model_selection,
        pipeline,
        preprocessing,
        tree,
    )
    from sklearn.utils import all_estimators

    random_state = numpy.random.RandomState(4)
    x, y = random_state.rand(60, 4), random_state.randint(0, 2, 60)
    for name, kind in all_estimators():
        if len(name) % 3 != 2 and "CV" not in name:
            continue
        try:
            made = kind().fit(x, y)
        except Exception:
            continue
        joblib.dump(made, path / f"{name}.joblib") if len(name) % 2 else (path / f"{name}.pkl").write_bytes(
            pickle.dumps(made)
        )
    columns = compose.ColumnTransformer(
        [("scale", preprocessing.StandardScaler(), [0, 1]), ("keep", "passthrough", [2])]
    )
    joined = pipeline.Pipeline(
        [("columns", columns), ("pca", decomposition.PCA(2)), ("tree", tree.DecisionTreeClassifier())]
    )
    for name, made in {
        "grid": model_selection.GridSearchCV(tree.DecisionTreeClassifier(), {"max_depth": [1, 2]}, cv=2),
        "calibrated": calibration.CalibratedClassifierCV(linear_model.LogisticRegression(), cv=2),
        "voting": ensemble.VotingClassifier(
            [("a", tree.DecisionTreeClassifier()), ("b", linear_model.LogisticRegression())]
        ),
        "stacking": ensemble.StackingClassifier([("a", tree.DecisionTreeClassifier())], cv=2),
        "joined": joined,
        "union": pipeline.FeatureUnion([("pca", decomposition.PCA(1)), ("scale", preprocessing.MinMaxScaler())]),
        "function": preprocessing.FunctionTransformer(numpy.log1p),
        "gaussian": __import__("sklearn.gaussian_process", fromlist=["x"]).GaussianProcessRegressor(),
    }.items():
        joblib.dump(made.fit(x, y), path / f"{name}.joblib", compress=1)


NATIVE: tuple[Maker, ...] = (xgboost_native, lightgbm_native)
BOOSTED: tuple[Maker, ...] = (xgboost_objects, lightgbm_objects)
STATE: tuple[Maker, ...] = (
    more_schedulers,
    more_optimizers,
    more_tensors,
    odd_containers,
    data_pipeline,
    nested_distributed,
    more_numpy,
    text_files,
)
RUNS: tuple[Maker, ...] = (other_trainer, other_configs, other_lightning, fabric_and_accelerate)
TABLES: tuple[Maker, ...] = (pandas_objects,)
OBJECTS: tuple[Maker, ...] = (more_framework,)
ESTIMATORS: tuple[Maker, ...] = (remaining_sklearn,)


def in_memory(value: object) -> bytes:
    """`pickle.dumps` by another way, so that a file object's path is not the only one tried."""
    buffer = io.BytesIO()
    pickle.Pickler(buffer, protocol=4).dump(value)
    return buffer.getvalue()
