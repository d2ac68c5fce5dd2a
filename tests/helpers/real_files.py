"""Real benign files, made by really running the libraries. One function per file or folder; `make_all` makes a set.

WEIGHTS, TRAINING, SLOW and FRAMEWORK files were at hand when the lists were written. LATER ones were made next,
measured once (1 of 32, 3 of 25, 6 of 40 alarms) and then used to correct the generator. HELD_OUT ones were chosen after
the lists were frozen and are never used to change them: their alarm rate is the honest one (docs/checks/scan.md).
"""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import pickle
import random
import types
import warnings
from collections.abc import Callable
from pathlib import Path

Maker = Callable[[Path], None]


def _model(seed: int = 0):
    import torch

    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 4), torch.nn.LayerNorm(4)
    )


def _trained(factory):
    import torch

    model = _model()
    optimizer = factory(model.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 8)).sum().backward()
        optimizer.step(lambda: torch.tensor(0.0)) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()
    return model, optimizer


# weights ---------------------------------------------------------------------------------------------------------


def weights_of_every_dtype(path: Path) -> None:
    import torch

    names = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint16 uint32 uint64"
    )
    for name in [*names.split(), "float8_e4m3fn", "float8_e5m2"]:
        tensor = torch.zeros(4, 6, dtype=torch.float32).to(getattr(torch, name))
        torch.save({"w": tensor, "view": tensor[1:3, ::2], "empty": tensor[:0]}, path / f"{name}.pt")
        if "uint" not in name[:4] and "float8" not in name:
            torch.save({"w": tensor}, path / f"{name}.legacy.pth", _use_new_zipfile_serialization=False)


def weights_of_every_protocol(path: Path) -> None:
    import torch

    for protocol in (2, 3, 4, 5):
        torch.save(_model().state_dict(), path / f"model_protocol{protocol}.bin", pickle_protocol=protocol)


def special_tensors(path: Path) -> None:
    import torch

    dense = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    torch.save({"coo": dense.to_sparse(), "csr": dense.to_sparse_csr()}, path / "sparse_weights.pt")
    torch.save(torch.quantize_per_tensor(dense, 0.1, 2, torch.qint8), path / "quantised_weights.pt")
    torch.save(torch.quantize_per_channel(dense, torch.ones(2), torch.zeros(2), 0, torch.qint8), path / "channel.pt")
    torch.save(torch.nn.Parameter(dense), path / "parameter.pt")
    marked = torch.nn.Parameter(dense)
    marked.tag = "embedding"
    torch.save({"p": marked}, path / "parameter_with_state.pt")
    torch.save(torch.empty(3, 3, device="meta"), path / "meta.pt")
    torch.save(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), path / "nested.pt")
    torch.save(
        {"shared": [dense, dense.t(), dense[0]], "conj": torch.ones(2, dtype=torch.cfloat).conj()}, path / "views.pt"
    )
    torch.save([torch.Size([1, 2]), torch.device("cpu"), torch.float16, torch.strided], path / "words.pt")
    torch.save(collections.OrderedDict(a=dense, b=(1, 2.5, None, True, {1, 2}, "x", b"y")), path / "mixed.pt")


def safetensors_weights(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file(_model().state_dict(), path / "model.safetensors", metadata={"format": "pt"})
    save_file({"empty": torch.zeros(0), "half": torch.ones(3, dtype=torch.bfloat16)}, path / "odd.safetensors")


# training state --------------------------------------------------------------------------------------------------


def optimizers(path: Path) -> None:
    import torch

    names = "SGD Adam AdamW Adagrad Adadelta Adamax ASGD NAdam RAdam RMSprop Rprop LBFGS Adafactor"
    for name in names.split():
        model, optimizer = _trained(lambda parameters, name=name: getattr(torch.optim, name)(parameters, lr=0.01))
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "loss": 0.25}
        torch.save(state, path / f"checkpoint_{name}.pt")


def schedulers(path: Path) -> None:
    import torch

    _, optimizer = _trained(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    made = torch.optim.lr_scheduler
    for scheduler in (
        made.StepLR(optimizer, 3),
        made.MultiStepLR(optimizer, [2, 5]),
        made.ExponentialLR(optimizer, 0.9),
        made.CosineAnnealingLR(optimizer, 10),
        made.CosineAnnealingWarmRestarts(optimizer, 5),
        made.OneCycleLR(optimizer, 0.1, 20),
        made.ReduceLROnPlateau(optimizer),
        made.LinearLR(optimizer),
        made.LambdaLR(optimizer, lambda epoch: 1.0),
    ):
        torch.save(scheduler.state_dict(), path / f"scheduler_{type(scheduler).__name__}.pt")


def random_states(path: Path) -> None:
    import numpy
    import torch

    states = {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "cpu": torch.random.get_rng_state(),
        "cuda": [torch.random.get_rng_state()],
    }
    torch.save(states, path / "rng_state.pth")
    generators = {
        "randomstate": numpy.random.RandomState(3),
        "generator": numpy.random.default_rng(3),
        "pcg": numpy.random.PCG64(3),
        "mt": numpy.random.MT19937(3),
        "philox": numpy.random.Philox(3),
        "sfc": numpy.random.SFC64(3),
        "seed": numpy.random.SeedSequence(3),
        "legacy": numpy.random.get_state(legacy=False),
    }
    for name, value in generators.items():
        torch.save(value, path / f"rng_{name}.pth")
    (path / "random.pkl").write_bytes(pickle.dumps(random.Random(3)))
    for protocol in range(6):
        (path / f"states{protocol}.pkl").write_bytes(pickle.dumps(states["numpy"], protocol=protocol))


def arguments(path: Path) -> None:
    import torch

    plain = {
        "namespace": argparse.Namespace(lr=0.1, betas=(0.9, 0.95), out=Path("runs/1"), dtype=torch.bfloat16),
        "simple": types.SimpleNamespace(a=1, b=[1, 2]),
        "when": datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC),
        "took": datetime.timedelta(seconds=4),
        "counts": collections.Counter("abca"),
        "default": collections.defaultdict(list, {1: [2]}),
        "window": collections.deque([1, 2, 3], maxlen=5),
        "slice": slice(1, 2),
        "range": range(3),
        "complex": 1 + 2j,
        "version": torch.__version__,
    }
    torch.save(plain, path / "args.pt")
    for protocol in range(6):
        (path / f"args{protocol}.pkl").write_bytes(pickle.dumps(plain, protocol=protocol))


def numpy_files(path: Path) -> None:
    import numpy

    arrays = {
        "float": numpy.arange(12.0).reshape(3, 4),
        "fortran": numpy.asfortranarray(numpy.ones((3, 4), dtype=numpy.int16)),
        "text": numpy.array(["a", "bcd"]),
        "bytes": numpy.array([b"a", b"bcd"]),
        "bool": numpy.array([True, False]),
        "when": numpy.array(["2026-01-01"], dtype="datetime64[D]"),
        "record": numpy.array([(1, 2.0, "x")], dtype=[("i", "i4"), ("f", "f8"), ("s", "U3")]),
        "empty": numpy.zeros((0, 3)),
        "objects": numpy.array([{"a": 1}, None, "text"], dtype=object),
        "complex": numpy.ones(2, dtype=numpy.complex128),
        "big": numpy.arange(3, dtype=">i4"),
    }
    for name, array in arrays.items():
        numpy.save(path / f"{name}.npy", array, allow_pickle=True)
        for protocol in (0, 2, 4, 5):
            (path / f"{name}{protocol}.pkl").write_bytes(
                pickle.dumps({"a": array, "s": array.dtype}, protocol=protocol)
            )
    numpy.savez(path / "many.npz", **arrays)
    numpy.savez_compressed(path / "packed.npz", **{k: v for k, v in arrays.items() if k != "objects"})
    scalars = [numpy.float64(1.5), numpy.int64(3), numpy.float32(2), numpy.bool_(True)]
    (path / "scalars.pkl").write_bytes(pickle.dumps(scalars))
    masked = numpy.ma.masked_array([1.0, 2.0], mask=[True, False])
    (path / "masked.pkl").write_bytes(pickle.dumps(masked))


def joblib_files(path: Path) -> None:
    import joblib
    import numpy

    value = {
        "a": numpy.arange(1000.0),
        "f": numpy.asfortranarray(numpy.ones((5, 7))),
        "o": numpy.array([1, "x"], dtype=object),
    }
    for name, compress in {
        "plain": 0,
        "zlib": 3,
        "gz": ("gzip", 3),
        "bz2": ("bz2", 3),
        "xz": ("xz", 3),
        "lzma": ("lzma", 3),
    }.items():
        joblib.dump(value, path / f"arrays_{name}.joblib", compress=compress)


def whole_storages(path: Path) -> None:
    import torch

    (path / "tensor.pkl").write_bytes(pickle.dumps(torch.arange(6.0)))
    (path / "state.pkl").write_bytes(pickle.dumps(_model().state_dict()))


def grad_scaler(path: Path) -> None:
    import torch

    torch.save({"scaler": torch.amp.GradScaler("cpu").state_dict()}, path / "scaler.pt")


def distributed_checkpoint(path: Path) -> None:
    import torch
    import torch.distributed.checkpoint as dcp

    model, optimizer = _trained(lambda parameters: torch.optim.AdamW(parameters))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(
            {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": 7, "rng": torch.get_rng_state()},
            checkpoint_id=path / "step-7",
        )


def distributed_tensors(path: Path) -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        state = {
            "w": distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]),
            "b": distribute_tensor(torch.ones(4), mesh, [Replicate()]),
        }
        torch.save(state, path / "model_rank0.pt")
    finally:
        dist.destroy_process_group()


def hf_trainer(path: Path) -> None:
    """The folder a real Trainer run leaves: weights, optimizer, scheduler, RNG, arguments, configs."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32)
    model = BertForSequenceClassification(config)
    rows = [{"input_ids": torch.arange(4), "labels": torch.tensor(index % 2)} for index in range(8)]
    settings = TrainingArguments(
        output_dir=str(path / "out"),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(model=model, args=settings, train_dataset=rows)
        trainer.train()
    torch.save(model.state_dict(), path / "out" / "pytorch_model.bin")


def lightning_checkpoint(path: Path) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning

        class Plain(lightning.LightningModule):
            def __init__(self, lr: float = 0.1, betas: tuple[float, float] = (0.9, 0.95), name: str = "a") -> None:
                super().__init__()
                self.save_hyperparameters()
                self.layer = torch.nn.Linear(4, 2)

            def training_step(self, batch, index):
                return self.layer(batch[0]).sum()

            def configure_optimizers(self):
                optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
                return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 4)), batch_size=2)
        callbacks = [lightning.pytorch.callbacks.ModelCheckpoint(dirpath=path, save_last=True)]
        trainer = lightning.Trainer(
            max_epochs=1,
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=False,
            accelerator="cpu",
            enable_model_summary=False,
        )
        trainer.fit(Plain(), data)


# framework objects -----------------------------------------------------------------------------------------------


def whole_modules(path: Path) -> None:
    import torch

    torch.save(_model(), path / "model_whole.pt")
    torch.save(torch.nn.TransformerEncoderLayer(16, 2), path / "encoder.pt")
    torch.save(torch.nn.LSTM(4, 4, 2), path / "lstm.pt")
    torch.save(torch.nn.Conv2d(1, 2, 3), path / "conv.pt")
    torch.save(_trained(lambda parameters: torch.optim.Adam(parameters))[1], path / "optimizer_whole.pt")


def fitted_estimators(path: Path) -> None:
    import joblib
    import numpy
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    x = numpy.random.RandomState(0).rand(40, 3)
    y = (x[:, 0] > 0.5).astype(int)
    for name, estimator in {
        "linear": LinearRegression(),
        "logistic": LogisticRegression(),
        "forest": RandomForestClassifier(5, random_state=0),
        "pipeline": make_pipeline(StandardScaler(), LogisticRegression()),
    }.items():
        estimator.fit(x, y)
        joblib.dump(estimator, path / f"{name}.joblib")
        (path / f"{name}.pkl").write_bytes(pickle.dumps(estimator))


# later ----------------------------------------------------------------------------------------------------------


def later_training(path: Path) -> None:
    """Weights and training state in shapes that were not looked at when the lists were made."""
    import decimal
    import fractions
    import uuid

    import numpy
    import torch

    model, optimizer = _trained(lambda parameters: torch.optim.AdamW(parameters, amsgrad=True, foreach=False))
    gpt = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": 2, "bias": False},
    }
    torch.save(gpt | {"iter_num": 10, "best_val_loss": torch.tensor(1.5), "config": {"lr": 6e-4}}, path / "ckpt.pt")
    averaged = torch.optim.swa_utils.AveragedModel(model)
    torch.save(averaged.state_dict(), path / "ema.pt")
    lora = {f"base.layers.{n}.lora_{part}": torch.zeros(4, 2).half() for n in range(3) for part in "AB"}
    torch.save(lora, path / "adapter_model.bin")
    torch.save({"replay": collections.deque([torch.ones(2), torch.zeros(2)], maxlen=9)}, path / "buffer.pt")
    torch.save({"generator": torch.Generator().get_state(), "np": numpy.random.default_rng(1)}, path / "sampler.pt")
    torch.save(
        {"price": decimal.Decimal("1.5"), "part": fractions.Fraction(1, 3), "id": uuid.uuid4()}, path / "meta.pt"
    )
    torch.save(
        {"day": datetime.date(2026, 1, 1), "path": Path("a/b"), "args": vars(argparse.Namespace(a=1))}, path / "run.pt"
    )
    torch.save(
        [numpy.float32(1), numpy.array(["a"], dtype=object), numpy.zeros((2, 2), dtype="f4,i8")], path / "mixed.pt"
    )
    torch.save(
        {"losses": [0.5, float("nan"), float("inf")], "big": 1 << 200, "neg": -5, 3: ("t",)}, path / "history.pt"
    )
    torch.save(torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2))]).state_dict(), path / "list.pt")
    torch.save({"frozen": frozenset({1, 2}), "bytes": bytearray(b"abc"), "set": {"a"}}, path / "sets.pt")
    torch.save(model.state_dict(), path / "old.pth", _use_new_zipfile_serialization=False, pickle_protocol=4)
    sequential = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [torch.optim.lr_scheduler.ConstantLR(optimizer), torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)],
        [2],
    )
    torch.save(sequential.state_dict(), path / "scheduler.pt")
    metric = {"confusion": numpy.eye(3, dtype=numpy.int64), "f1": numpy.float64(0.5)}
    (path / "metrics.pkl").write_bytes(pickle.dumps(metric))
    numpy.savez(path / "stats.npz", mean=numpy.zeros(3), names=numpy.array(["a", "b"]))
    (path / "config.yaml").write_text("model:\n  name: gpt\nlr: 0.1\n")
    (path / "log.csv").write_text("step,loss\n1,0.5\n2,0.25\n")
    (path / "README.md").write_text("# Model\n\nCreated by training.\n")
    (path / "vocab.txt").write_text("cat\ndog\nbird\n")
    (path / "merges.txt").write_text("#version: 0.2\nh e\nhe l\n")
    (path / "events.jsonl").write_text('{"step": 1}\n{"step": 2}\n')


def later_accelerate(path: Path) -> None:
    """accelerate's save_state of a small run."""
    import accelerate
    import torch

    runner = accelerate.Accelerator(cpu=True)
    _, optimizer = runner.prepare(*_trained(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)))
    scheduler = runner.prepare(torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1))
    runner.register_for_checkpointing(scheduler)
    runner.save_state(str(path / "state"), safe_serialization=False)


def later_pretrained(path: Path) -> None:
    """save_pretrained of another architecture, with its tokenizer and generation config."""
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32, n_positions=16))
    model.save_pretrained(path / "gpt2")
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] | trim }}"
        "{% if loop.last and add_generation_prompt %}{{ raise_exception('x') if false else 'assistant' }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer.save_pretrained(path / "gpt2")


def later_framework(path: Path) -> None:
    """Whole modules, optimizers, schedulers and models of libraries."""
    import torch
    from transformers import DistilBertConfig, DistilBertModel, LlamaConfig, LlamaForCausalLM

    nn = torch.nn
    modules = {
        "gru": nn.GRU(3, 3),
        "mha": nn.MultiheadAttention(4, 2),
        "embedding": nn.EmbeddingBag(4, 2),
        "deconv": nn.ConvTranspose1d(1, 1, 2),
        "dict": nn.ModuleDict({"a": nn.Linear(1, 1), "b": nn.Identity()}),
        "pool": nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "norms": nn.ModuleList([nn.GroupNorm(1, 2), nn.InstanceNorm1d(2), nn.RMSNorm(2), nn.LocalResponseNorm(2)]),
        "activations": nn.Sequential(nn.GELU(), nn.SiLU(), nn.PReLU(), nn.Hardtanh(), nn.Softmax(1), nn.Softplus()),
        "transformer": nn.Transformer(8, 2, 1, 1, 8),
        "loss": nn.CrossEntropyLoss(),
        "upsample": nn.Upsample(scale_factor=2),
        "bilinear": nn.Bilinear(1, 1, 1),
        "parameters": nn.ParameterDict({"a": nn.Parameter(torch.ones(1))}),
        "distilbert": DistilBertModel(DistilBertConfig(dim=8, hidden_dim=8, n_layers=1, n_heads=2, vocab_size=16)),
        "llama": LlamaForCausalLM(
            LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
        ),
    }
    for name, module in modules.items():
        torch.save(module, path / f"{name}.pt")
    for name in ("SGD", "RMSprop", "NAdam", "Adagrad", "LBFGS"):
        optimizer = _trained(lambda parameters, name=name: getattr(torch.optim, name)(parameters, lr=0.1))[1]
        torch.save(optimizer, path / f"optimizer_{name}.pt")
        torch.save(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5), path / f"scheduler_{name}.pt")


def later_sklearn(path: Path) -> None:
    """Forty fitted estimators, by joblib and by pickle in turns."""
    import joblib
    import numpy
    from sklearn.utils import all_estimators

    random_state = numpy.random.RandomState(1)
    x, y = random_state.rand(60, 4), random_state.randint(0, 2, 60)
    tuned = {"LinearRegression", "LogisticRegression", "RandomForestClassifier", "StandardScaler", "Pipeline"}
    count = 0
    for name, kind in all_estimators():
        if count == 40:
            return
        if name in tuned or len(name) % 3 or "CV" in name:
            continue
        try:
            estimator = kind()
            estimator.fit(x, y)
        except Exception:
            continue
        count += 1
        if count % 2:
            joblib.dump(estimator, path / f"{name}.joblib")
        else:
            (path / f"{name}.pkl").write_bytes(pickle.dumps(estimator))


# held out --------------------------------------------------------------------------------------------------------


def held_out_training(path: Path) -> None:
    """Training state in further shapes."""
    import joblib
    import numpy
    import torch

    for name, extra in {
        "AdamW": {"fused": True},
        "SGD": {"nesterov": True, "momentum": 0.9},
        "Adam": {"capturable": False},
    }.items():
        model, optimizer = _trained(lambda p, name=name, extra=extra: getattr(torch.optim, name)(p, lr=0.1, **extra))
        torch.save((model.state_dict(), optimizer.state_dict(), {"step": 1}), path / f"step_{name}.pt")
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    sparse = torch.optim.SparseAdam(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    sparse.step()
    torch.save({"optimizer": sparse.state_dict(), "grad": embedding.weight.grad}, path / "sparse_optimizer.pt")
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.1, "tag": "a"}, {"params": [], "weight_decay": 0}]
    torch.save(torch.optim.AdamW(groups).state_dict(), path / "groups.pt")
    torch.save(
        {"rng": random.Random(5), "state": random.getstate(), "np": numpy.random.RandomState(1)},
        path / "rng_state_0.pth",
    )
    torch.save({"loader": {"epoch": 1, "perm": torch.randperm(5), "idx": numpy.arange(5)}}, path / "dataloader.pt")
    torch.save(torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2)).state_dict(), path / "wn.bin")
    torch.save(torch.ao.quantization.MinMaxObserver().state_dict(), path / "observer.pt")
    torch.save(
        {"bits": torch.arange(4).to(torch.uint8), "nan": float("nan"), 1.5: "x", None: 0, (1, 2): b""}, path / "odd.pt"
    )
    torch.save(numpy.memmap(path / "raw.tmp", dtype="f4", mode="w+", shape=(2,)), path / "memmap.pt")
    (path / "raw.tmp").unlink()
    for protocol in (0, 1):
        (path / f"old{protocol}.pkl").write_bytes(pickle.dumps({"a": [1, 2.5], "b": numpy.ones(3)}, protocol=protocol))
    joblib.dump([numpy.zeros((3, 3), dtype="i2"), {"x": 1}], path / "cache.joblib", compress=("zlib", 9))
    joblib.dump(numpy.array(["a", None], dtype=object), path / "names.joblib")
    numpy.save(path / "tokens.npy", numpy.arange(10, dtype=numpy.uint16))
    (path / "trainer_state.json").write_text('{"global_step": 1, "log_history": [{"loss": NaN}]}')
    (path / "tokenizer_config.json").write_text(
        '{"chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"}'
    )
    (path / "latest").write_text("global_step1")
    (path / "notes.rst").write_text("Notes\n=====\n")


def held_out_trainer(path: Path) -> None:
    """Seq2Seq arguments and a causal model through the Trainer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Seq2SeqTrainingArguments, Trainer

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8))
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)} for _ in range(4)]
    settings = Seq2SeqTrainingArguments(
        output_dir=str(path / "run"),
        max_steps=2,
        save_steps=1,
        lr_scheduler_type="cosine",
        optim="adafactor",
        label_smoothing_factor=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model=model, args=settings, train_dataset=rows).train()


def held_out_sharded(path: Path) -> None:
    """FSDP2 and its distributed checkpoint, on one rank."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(_model(), mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(3, 8)).sum().backward()
        optimizer.step()
        dcp.save({"model": model.state_dict(), "optim": optimizer.state_dict()}, checkpoint_id=path / "sharded")
        torch.save(optimizer.state_dict(), path / "optimizer_rank0.pt")
    finally:
        dist.destroy_process_group()


def held_out_framework(path: Path) -> None:
    """Other modules, other models, metrics."""
    import torch
    import torchmetrics
    from transformers import BertConfig, BertModel, T5Config, T5Model, ViTConfig, ViTModel

    nn = torch.nn
    modules = {
        "rnn": nn.RNN(2, 2),
        "cell": nn.LSTMCell(2, 2),
        "decoder": nn.TransformerDecoderLayer(4, 1, 4),
        "conv3d": nn.Conv3d(1, 1, 1),
        "padding": nn.Sequential(nn.ReflectionPad2d(1), nn.ZeroPad2d(1), nn.PixelShuffle(2)),
        "dropouts": nn.Sequential(nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()),
        "losses": nn.ModuleList([nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.KLDivLoss(), nn.HuberLoss(), nn.CTCLoss()]),
        "more": nn.Sequential(nn.ELU(), nn.CELU(), nn.SELU(), nn.GLU(), nn.Mish(), nn.Tanhshrink(), nn.LogSoftmax(1)),
        "sync": nn.SyncBatchNorm(2),
        "unfold": nn.Sequential(nn.Unfold(2), nn.Fold((2, 2), 1)),
        "bert": BertModel(
            BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8)
        ),
        "t5": T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=8)),
        "vit": ViTModel(
            ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=16)
        ),
        "accuracy": torchmetrics.classification.MulticlassAccuracy(3),
        "mean": torchmetrics.MeanMetric(),
        "averaged": torch.optim.swa_utils.AveragedModel(nn.Linear(1, 1)),
    }
    for name, module in modules.items():
        torch.save(module, path / f"{name}.pt")
    for name in ("AdamW", "RAdam", "NAdam", "Adamax"):
        optimizer = _trained(lambda parameters, name=name: getattr(torch.optim, name)(parameters, lr=0.1))[1]
        torch.save(optimizer, path / f"optimizer_{name}.pt")
        torch.save(torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 5), path / f"scheduler_{name}.pt")


def held_out_sklearn(path: Path) -> None:
    """Forty other fitted estimators."""
    import joblib
    import numpy
    from sklearn.utils import all_estimators

    random_state = numpy.random.RandomState(2)
    x, y = random_state.rand(60, 4), random_state.randint(0, 2, 60)
    count = 0
    for name, kind in all_estimators():
        if count == 40:
            return
        if (
            len(name) % 3 != 1
            or "CV" in name
            or name in ("RandomForestClassifier", "LinearRegression", "StandardScaler")
        ):
            continue
        try:
            estimator = kind()
            estimator.fit(x, y)
        except Exception:
            continue
        count += 1
        joblib.dump(estimator, path / f"{name}.joblib", compress=count % 3)


WEIGHTS: tuple[Maker, ...] = (weights_of_every_dtype, weights_of_every_protocol, special_tensors, safetensors_weights)
TRAINING: tuple[Maker, ...] = (
    optimizers,
    schedulers,
    random_states,
    arguments,
    numpy_files,
    joblib_files,
    whole_storages,
    grad_scaler,
    distributed_checkpoint,
    distributed_tensors,
)
SLOW: tuple[Maker, ...] = (hf_trainer, lightning_checkpoint)
FRAMEWORK: tuple[Maker, ...] = (whole_modules, fitted_estimators)
LATER_TRAINING: tuple[Maker, ...] = (later_training, later_accelerate, later_pretrained)
LATER_FRAMEWORK: tuple[Maker, ...] = (later_framework,)
LATER_SKLEARN: tuple[Maker, ...] = (later_sklearn,)


def make_all(folder: Path, makers: tuple[Maker, ...]) -> Path:
    """Run every maker in its own folder below `folder`; returns `folder`."""
    for maker in makers:
        place = folder / maker.__name__
        place.mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            maker(place)
    return folder


def buffer_of(value: object) -> bytes:
    """`torch.save` to memory."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


HELD_OUT_TRAINING: tuple[Maker, ...] = (held_out_training, held_out_trainer, held_out_sharded)
HELD_OUT_FRAMEWORK: tuple[Maker, ...] = (held_out_framework,)
HELD_OUT_SKLEARN: tuple[Maker, ...] = (held_out_sklearn,)
