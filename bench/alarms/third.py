"""The third held-out set: files that libraries really write, none of which had been scanned when it was written.

One function per library; each fills a folder by running the library, as its own documentation shows. A name that ends
in `_objects` holds whole pickled objects and is scanned with `--tier framework`; all others with the default tier.
"""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any


def _rows() -> tuple[Any, Any]:
    import numpy

    state = numpy.random.RandomState(5)
    x = state.rand(90, 6)
    return x, (x[:, 0] + x[:, 1] > x[:, 2]).astype(int)


def _net(width: int = 5) -> Any:
    import torch

    torch.manual_seed(2)
    return torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.GELU(), torch.nn.Linear(width, 2))


def _dump(path: Path, **objects: Any) -> None:
    for name, value in objects.items():
        (path / f"{name}.pkl").write_bytes(pickle.dumps(value))


# what training runs write ---------------------------------------------------------------------------------------------


def torch_resume(path: Path) -> None:
    """The loop everybody writes: model, optimizer, scheduler, scaler, all generators, history, arguments."""
    import argparse

    import numpy
    import torch

    model = _net()
    made = {
        "adam_fused_off": torch.optim.Adam(model.parameters(), lr=0.1, amsgrad=True, fused=False),
        "sgd_nesterov": torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        "adagrad": torch.optim.Adagrad(model.parameters(), lr_decay=0.1),
        "lbfgs": torch.optim.LBFGS(model.parameters(), history_size=3),
        "rmsprop": torch.optim.RMSprop(model.parameters(), centered=True, momentum=0.5),
        "asgd": torch.optim.ASGD(model.parameters()),
        "rprop": torch.optim.Rprop(model.parameters()),
        "adafactor": torch.optim.Adafactor(model.parameters()),
    }
    for name, optimizer in made.items():

        def closure(optimizer: Any = optimizer) -> Any:
            optimizer.zero_grad()
            loss = model(torch.ones(3, 5)).pow(2).sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
        plateau.step(1.0)
        torch.save(
            {
                "epoch": 3,
                "model_state_dict": model.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                "scheduler": plateau.state_dict(),
                "warm": torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 3).state_dict(),
                "torch_rng": torch.get_rng_state(),
                "numpy_rng": numpy.random.RandomState(3).get_state(),
                "numpy_generator": numpy.random.default_rng(3).bit_generator.state,
                "python_rng": random.Random(3).getstate(),
                "history": {"loss": [numpy.float32(0.5), numpy.float64(0.25)], "best": numpy.int64(3)},
                "args": argparse.Namespace(lr=0.1, out=path.parent.name, layers=[5, 2], resume=None),
            },
            path / f"{name}.pth",
        )


def torch_objects(path: Path) -> None:
    """torch.save(model) and friends, modules no earlier set had."""
    import torch

    nn = torch.nn
    for name, module in {
        "mha": nn.MultiheadAttention(4, 2, batch_first=True),
        "encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 4, batch_first=True), 2),
        "gru": nn.GRU(3, 4, 2, bidirectional=True),
        "conv": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        "transposed": nn.Sequential(nn.ConvTranspose1d(1, 2, 2), nn.InstanceNorm1d(2), nn.Upsample(scale_factor=2)),
        "embedding": nn.ModuleDict({"a": nn.EmbeddingBag(5, 2), "b": nn.Embedding(4, 2, padding_idx=0)}),
        "norms": nn.Sequential(nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.RMSNorm(2), nn.LocalResponseNorm(2)),
        "bilinear": nn.Bilinear(2, 2, 1),
        "parameters": nn.ParameterDict({"w": nn.Parameter(torch.ones(2))}),
        "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)).state_dict(),
        "losses": [
            nn.CrossEntropyLoss(label_smoothing=0.1),
            nn.NLLLoss(),
            nn.TripletMarginLoss(),
            nn.GaussianNLLLoss(),
        ],
        "dataset": torch.utils.data.TensorDataset(torch.ones(3, 2)),
        "subset": torch.utils.data.Subset(torch.utils.data.TensorDataset(torch.ones(3, 2)), [0, 2]),
        "distribution": torch.distributions.Normal(torch.zeros(2), torch.ones(2)),
        "optimizer": torch.optim.AdamW(_net().parameters()),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(_net().parameters(), lr=0.1), 5),
        "device": {"device": torch.device("cpu"), "dtype": torch.float16, "size": torch.Size([2, 3])},
        "generator": torch.Generator().manual_seed(2).get_state(),
    }.items():
        torch.save(module, path / f"{name}.pt")


def hf_trainer(path: Path) -> None:
    """A classifier with the Trainer: bf16 off, gradient checkpointing, warm-up, safetensors off for the optimizer."""
    import torch
    from transformers import DistilBertConfig, DistilBertForSequenceClassification, Trainer, TrainingArguments

    torch.manual_seed(1)
    config = DistilBertConfig(dim=8, hidden_dim=8, n_layers=1, n_heads=2, vocab_size=20, num_labels=3)
    rows = [{"input_ids": torch.arange(5), "attention_mask": torch.ones(5), "labels": n % 3} for n in range(6)]
    for optimizer, schedule in (
        ("adamw_torch", "polynomial"),
        ("sgd", "constant_with_warmup"),
        ("rmsprop", "inverse_sqrt"),
    ):
        settings = TrainingArguments(
            output_dir=str(path / optimizer),
            max_steps=2,
            save_steps=2,
            logging_steps=1,
            warmup_steps=1,
            optim=optimizer,
            lr_scheduler_type=schedule,
            max_grad_norm=0.5,
            neftune_noise_alpha=0.1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_total_limit=1,
            label_names=["labels"],
            run_name="a run",
        )
        trainer = Trainer(model=DistilBertForSequenceClassification(config), args=settings, train_dataset=rows)
        trainer.train()
        trainer.save_model(str(path / optimizer / "final"))
        trainer.save_state()


def hf_models(path: Path) -> None:
    """save_pretrained of other families, processors and tokenizers with their side files."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    small = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 9,
    }
    for kind in ("Albert", "GPTNeoX", "Falcon", "Qwen3", "Gemma2", "Phi3", "Llama"):
        config = getattr(transformers, f"{kind}Config")(**small)
        transformers.AutoModel.from_config(config).save_pretrained(path / kind)
    byte_level = Tokenizer(models.BPE())
    byte_level.normalizer = normalizers.NFKC()
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel()
    byte_level.decoder = decoders.ByteLevel()
    byte_level.post_processor = processors.ByteLevel()
    byte_level.train_from_iterator(["ein Satz", "zwei Sätze"] * 9, trainers.BpeTrainer(vocab_size=300))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level, bos_token="<s>", model_max_length=16)
    fast.chat_template = "{%- for m in messages %}{{ '<|' + m.role + '|>' + m.content | trim }}{% endfor %}"
    fast.save_pretrained(path / "tokenizer")
    unigram = Tokenizer(models.Unigram())
    unigram.train_from_iterator(["a b c d"] * 20, trainers.UnigramTrainer(vocab_size=12, special_tokens=["<unk>"]))
    unigram.save(str(path / "unigram.json"))
    transformers.ViTImageProcessor().save_pretrained(path / "image")
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(path / "audio")


def lightning(path: Path) -> None:
    """Lightning with callbacks, loggers, a scheduler by step, hyperparameters of many kinds, resumed once."""
    import lightning as pl
    import torch
    from lightning.pytorch import callbacks, loggers

    class Net(pl.LightningModule):
        def __init__(self, hidden: int = 4, layers: tuple[int, ...] = (1, 2), activation: str = "gelu") -> None:
            super().__init__()
            self.save_hyperparameters()
            self.layer = torch.nn.Linear(5, hidden)
            self.extra = torch.zeros(3)

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.layer(batch[0]).pow(2).mean()
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", self.layer(batch[0]).mean())

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.NAdam(self.parameters())
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["vocabulary"] = {"a": 0, "b": 1}

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 5)), batch_size=2)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=path,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.5,
        accumulate_grad_batches=2,
        logger=loggers.CSVLogger(path, name="log"),
        callbacks=[
            callbacks.ModelCheckpoint(path / "best", monitor="val_loss", save_top_k=2, save_last=True),
            callbacks.EarlyStopping("val_loss", patience=5),
            callbacks.LearningRateMonitor("step"),
            callbacks.Timer(duration="00:01:00:00"),
            callbacks.LambdaCallback(),
        ],
    )
    trainer.fit(Net(), data, data)
    trainer.save_checkpoint(path / "weights_only.ckpt", weights_only=True)


def accelerate_state(path: Path) -> None:
    """accelerate.save_state with a scheduler, a sampler and a registered object; save_model in shards."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, project_dir=str(path))
    model = _net(64)
    optimizer = torch.optim.Adamax(model.parameters())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 5)), batch_size=2, shuffle=True)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    model, optimizer, data, schedule = accelerator.prepare(model, optimizer, data, schedule)
    counter = torch.optim.swa_utils.AveragedModel(_net())
    accelerator.register_for_checkpointing(counter)
    for (batch,) in data:
        accelerator.backward(model(batch).sum())
        optimizer.step()
        schedule.step()
    accelerator.save_state(str(path / "state"))
    accelerator.save_state(str(path / "unsafe"), safe_serialization=False)
    accelerator.save_model(model, str(path / "model"), max_shard_size="1KB")


def distributed(path: Path) -> None:
    """DCP with its metadata, FSDP2 with mixed precision, DTensor shards, full state by the state_dict API, async."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("replicate", "shard"))
        model = _net(16)
        for layer in (model[0], model[2]):
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        weights, state = get_state_dict(model, optimizer)
        whole = {"model": weights, "optimizer": state, "step": 3, "loader": {"epoch": 1, "seen": [1, 2]}}
        dcp.save(whole, checkpoint_id=path / "fsdp2")
        full = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        torch.save({"model": full[0], "optim": full[1]}, path / "full.pt")
        torch.save(weights, path / "sharded_state.pt")
        flat = init_device_mesh("cpu", (1,))
        both = [distribute_tensor(torch.ones(4, 2), flat, [kind]) for kind in (Shard(0), Replicate())]
        torch.save(both, path / "dtensors.pt")
        dcp.async_save({"w": torch.ones(3), "note": "text"}, checkpoint_id=path / "async").result()
        dcp_to_torch_save(path / "async", path / "converted.pt")
    finally:
        dist.destroy_process_group()


def timm_models(path: Path) -> None:
    """timm: a model's state, its EMA, its CheckpointSaver's files."""
    import argparse

    import timm
    import torch
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler
    from timm.utils import CheckpointSaver, ModelEmaV3

    model = timm.create_model("test_vit", num_classes=3)
    ema = ModelEmaV3(model)
    for name in ("lamb", "adan", "lion", "nadamw", "adopt", "muon"):
        optimizer = create_optimizer_v2(model, opt=name, lr=0.01, weight_decay=0.1)
        model(torch.ones(1, 3, 160, 160)).sum().backward()
        optimizer.step()
        folder = path / name
        folder.mkdir()
        saver = CheckpointSaver(
            model, optimizer, args=argparse.Namespace(model="test_vit", lr=0.01, opt=name), model_ema=ema,
            checkpoint_dir=str(folder), recovery_dir=str(folder),
        )  # fmt: skip
        saver.save_checkpoint(1, metric=0.5)
        saver.save_recovery(1, 2)
        torch.save(CosineLRScheduler(optimizer, 10).state_dict(), folder / "schedule.pt")


def peft_adapters(path: Path) -> None:
    """peft: LoRA, IA3 and prompt adapters as folders, and their merged state."""
    import peft
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    for name, config in {
        "lora": peft.LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
        "dora": peft.LoraConfig(r=2, target_modules=["c_attn"], use_dora=True, fan_in_fan_out=True),
        "ia3": peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[]),
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }.items():
        base = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8))
        model = peft.get_peft_model(base, config)
        model.save_pretrained(path / name)
        model.save_pretrained(path / f"{name}_bin", safe_serialization=False)
        torch.save(peft.get_peft_model_state_dict(model), path / f"{name}.pt")


def ignite_state(path: Path) -> None:
    """pytorch-ignite's Checkpoint with trainer, model, optimizer and early stopping."""
    import torch
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver, EarlyStopping, ModelCheckpoint
    from ignite.handlers.param_scheduler import LinearCyclicalScheduler

    model = _net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, torch.nn.CrossEntropyLoss())
    schedule = LinearCyclicalScheduler(optimizer, "lr", 0.1, 0.5, 4)
    stop = EarlyStopping(2, lambda engine: 1.0, trainer)
    parts = {"trainer": trainer, "model": model, "optimizer": optimizer, "schedule": schedule, "stop": stop}
    keep = Checkpoint(parts, DiskSaver(str(path / "disk"), create_dir=True), n_saved=2)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, keep)
    best = ModelCheckpoint(path / "best", "net", n_saved=1, create_dir=True, require_empty=False)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, best, {"model": model})
    trainer.run([(torch.ones(2, 5), torch.tensor([0, 1]))] * 3, max_epochs=3)


def reinforcement(path: Path) -> None:
    """stable-baselines3: a model's zip, its replay buffer, normalisation; gymnasium spaces beside."""
    import gymnasium
    from stable_baselines3 import DQN, PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

    env = VecNormalize(DummyVecEnv([lambda: gymnasium.make("CartPole-v1")]))
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=8, n_epochs=1, device="cpu")
    model.learn(16)
    model.save(path / "ppo")
    env.save(str(path / "vecnormalize.pkl"))
    off = DQN("MlpPolicy", gymnasium.make("CartPole-v1"), buffer_size=50, learning_starts=5, device="cpu")
    off.learn(10)
    off.save_replay_buffer(path / "buffer.pkl")


def gym_objects(path: Path) -> None:
    """Observation and action spaces, as people store them beside a policy."""
    import numpy
    from gymnasium import spaces

    _dump(
        path,
        box=spaces.Box(-1, 1, (3,), numpy.float32),
        both=spaces.Dict({"a": spaces.Discrete(3), "b": spaces.MultiBinary(2)}),
        pair=spaces.Tuple((spaces.MultiDiscrete([2, 3]), spaces.Text(4))),
    )


def datasets_disk(path: Path) -> None:
    """datasets.save_to_disk, its Arrow, Parquet, JSON and CSV, and features with class labels."""
    import datasets

    table = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [0, 1, 0], "ids": [[1, 2], [3], []]},
        features=datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["no", "yes"]),
                "ids": datasets.List(datasets.Value("int32"))
                if hasattr(datasets, "List")
                else [datasets.Value("int32")],
            }
        ),
    )
    table.set_format("torch", columns=["label"])
    table.save_to_disk(str(path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(str(path / "dict"))
    table.reset_format()
    table.to_parquet(str(path / "t.parquet"))
    table.to_json(str(path / "t.jsonl"))
    table.to_csv(str(path / "t.csv"))


def other_optimizers(path: Path) -> None:
    """lion, schedulefree, ema-pytorch: state as it is saved for resuming."""
    import torch
    from ema_pytorch import EMA
    from lion_pytorch import Lion
    from schedulefree import AdamWScheduleFree, SGDScheduleFree

    model = _net()
    for kind in (Lion, AdamWScheduleFree, SGDScheduleFree):
        optimizer = kind(model.parameters(), lr=0.01)
        if hasattr(optimizer, "train"):
            optimizer.train()
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path / f"{kind.__name__}.pt")
    ema = EMA(model, beta=0.9)
    ema.update()
    torch.save(ema.state_dict(), path / "ema.pt")


def diffusion(path: Path) -> None:
    """A diffusers pipeline's folder: model_index.json, schedulers, U-Net and VAE in safetensors and in .bin."""
    from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, EulerDiscreteScheduler, UNet2DModel
    from diffusers.training_utils import EMAModel

    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    DDPMPipeline(unet, DDIMScheduler()).save_pretrained(path / "pipeline")
    unet.save_pretrained(path / "unet_bin", safe_serialization=False)
    EulerDiscreteScheduler().save_pretrained(path / "euler")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(path / "vae")
    EMAModel(unet.parameters(), model_cls=UNet2DModel, model_config=unet.config).save_pretrained(str(path / "ema"))


def sentences(path: Path) -> None:
    """sentence-transformers: a folder of modules, pooling and a dense layer, with its README."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    base = path.parent / "sentences_base"
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(base)
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=4)
    BertModel(config).save_pretrained(base)
    word = parts.Transformer(str(base))
    dense = parts.Dense(8, 4, activation_function=torch.nn.Tanh())
    model = SentenceTransformer(modules=[word, parts.Pooling(8), dense, parts.Normalize()], device="cpu")
    model.save(str(path / "model"))


def configured(path: Path) -> None:
    """OmegaConf in a checkpoint, as Hydra and NeMo users have it, its YAML, and plain YAML beside."""
    import torch
    from omegaconf import OmegaConf

    config = OmegaConf.create({"lr": 0.1, "model": {"layers": [1, 2], "name": "${name}"}, "name": "net"})
    torch.save({"state_dict": _net().state_dict(), "config": config}, path / "omega.ckpt")
    torch.save({"state_dict": _net().state_dict(), "config": OmegaConf.to_container(config)}, path / "plain.ckpt")
    OmegaConf.save(config, path / "config.yaml")


def gaussian(path: Path) -> None:
    """gpytorch: state of an exact model and its likelihood."""
    import gpytorch
    import torch

    class Model(gpytorch.models.ExactGP):
        def __init__(self, x: Any, y: Any, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean = gpytorch.means.ConstantMean()
            self.cov = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2))

        def forward(self, x: Any) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(x), self.cov(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Model(torch.ones(3, 2), torch.ones(3), likelihood)
    torch.save({"model": model.state_dict(), "likelihood": likelihood.state_dict()}, path / "gp.pt")


def tuned(path: Path) -> None:
    """optuna: trials as frames' CSV and JSON, the sampler and the study pickled, as its FAQ shows."""
    import joblib
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1) ** 2, n_trials=3)
    (path / "best.json").write_text(json.dumps(study.best_params))
    joblib.dump(study, path / "study.pkl")
    (path / "sampler.pkl").write_bytes(pickle.dumps(study.sampler))


def networks(path: Path) -> None:
    """onnx files, with external data and functions; keras files and weights."""
    import numpy
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(numpy.ones((4, 4), numpy.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [weight],
    )
    model = helper.make_model(graph)
    onnx.save(model, path / "net.onnx")
    onnx.save(model, path / "outside.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)


def keras_files(path: Path) -> None:
    """keras with the torch backend: .keras, .weights.h5, JSON."""
    import os

    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import numpy

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="relu"), keras.layers.Dropout(0.1)])
    model.add(keras.layers.LayerNormalization())
    model.compile(optimizer="adam", loss="mse", metrics=["mae"])
    model.fit(numpy.ones((8, 4)), numpy.ones((8, 3)), verbose=0)
    model.save(path / "model.keras")
    model.save_weights(path / "model.weights.h5")
    model.save(path / "old.h5")
    (path / "model.json").write_text(model.to_json())
    inputs = keras.Input((6, 3))
    outputs = keras.layers.Dense(1)(keras.layers.GlobalAveragePooling1D()(keras.layers.Conv1D(4, 2)(inputs)))
    keras.Model(inputs, outputs).save(path / "functional.keras")


def tables(path: Path) -> None:
    """polars, pyarrow and pandas files that are no pickles; scipy's and numpy's."""
    import numpy
    import pandas
    import polars
    import scipy.io
    import scipy.sparse

    frame = polars.DataFrame({"a": [1, 2], "b": ["x", None], "c": [[1.0], []]})
    frame.write_parquet(path / "p.parquet")
    frame.write_ipc(path / "p.arrow")
    frame.write_ndjson(path / "p.ndjson")
    table = pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]})
    table.to_parquet(path / "q.parquet")
    table.to_feather(path / "q.feather")
    table.to_csv(path / "q.csv")
    table.to_json(path / "q.json")
    for kind in ("csr", "csc", "coo", "bsr", "dia"):
        scipy.sparse.save_npz(path / f"{kind}.npz", scipy.sparse.eye(5, format=kind))
    scipy.io.savemat(path / "m.mat", {"x": numpy.eye(2)})
    numpy.savez_compressed(path / "many.npz", a=numpy.arange(3), b=numpy.array(["x", "yy"]), c=numpy.ones((2, 0)))
    numpy.save(path / "strings.npy", numpy.array(["a", None, 1.5], dtype=object), allow_pickle=True)
    numpy.save(path / "dates.npy", numpy.array(["2026-01-01"], dtype="datetime64[D]"))


def pandas_objects(path: Path) -> None:
    """Frames and series by to_pickle, as people keep predictions and folds."""
    import numpy
    import pandas

    frame = pandas.DataFrame({"a": [1, 2], "b": ["x", None], "c": [1.5, numpy.nan]})
    frame.to_pickle(path / "frame.pkl")
    frame.set_index("b").to_pickle(path / "indexed.pkl")
    frame["a"].to_pickle(path / "series.pkl")
    frame.astype({"b": "category"}).to_pickle(path / "category.pkl")
    frame.assign(t=pandas.date_range("2026-01-01", periods=2)).to_pickle(path / "dated.pkl")
    frame.assign(t=pandas.date_range("2026-01-01", periods=2, tz="UTC")).to_pickle(path / "zoned.pkl")
    frame.convert_dtypes().to_pickle(path / "nullable.pkl")
    pandas.MultiIndex.from_product([[1, 2], ["a"]]).to_frame().to_pickle(path / "multi.pkl")
    frame.to_pickle(path / "frame.pkl.gz")
    _dump(
        path,
        interval=pandas.cut(pandas.Series([1, 2, 3]), 2),
        stamp=pandas.Timestamp("2026-01-01"),
        period=pandas.Period("2026-01"),
    )


def scipy_objects(path: Path) -> None:
    """Sparse matrices, interpolators, trees, frozen distributions, optimisation results."""
    import numpy
    import scipy.interpolate
    import scipy.optimize
    import scipy.sparse
    import scipy.spatial
    import scipy.stats

    x = numpy.linspace(0, 1, 8)
    _dump(
        path,
        csr=scipy.sparse.csr_matrix(numpy.eye(3)),
        array=scipy.sparse.csr_array(numpy.eye(3)),
        lil=scipy.sparse.lil_matrix(numpy.eye(3)),
        dok=scipy.sparse.dok_matrix(numpy.eye(3)),
        coo=scipy.sparse.coo_matrix(numpy.eye(3)),
        spline=scipy.interpolate.BSpline(x, x[:5], 2),
        cubic=scipy.interpolate.CubicSpline(x, x**2),
        result=scipy.optimize.minimize(lambda v: (v**2).sum(), numpy.ones(2)),
        tree=scipy.spatial.cKDTree(numpy.random.RandomState(1).rand(9, 2)),
        rotation=scipy.spatial.transform.Rotation.identity(),
        kde=scipy.stats.gaussian_kde(x),
    )


def polars_objects(path: Path) -> None:
    """polars frames by pickle."""
    import polars

    _dump(path, frame=polars.DataFrame({"a": [1, 2]}), series=polars.Series("a", [1.0]))


def sklearn_objects(path: Path) -> None:
    """Pipelines on frames, text and sparse input, searches, multi-output, custom losses: no bare default estimators."""
    import joblib
    import numpy
    import pandas
    from sklearn import (
        cluster,
        compose,
        covariance,
        cross_decomposition,
        decomposition,
        ensemble,
        feature_extraction,
        feature_selection,
        impute,
        isotonic,
        kernel_approximation,
        linear_model,
        mixture,
        model_selection,
        multioutput,
        naive_bayes,
        neighbors,
        neural_network,
        pipeline,
        preprocessing,
        svm,
    )

    x, y = _rows()
    frame = pandas.DataFrame(x, columns=list("abcdef")).assign(kind=["u", "v", "w"] * 30)
    words = ["red green", "blue", "green blue red"] * 30
    columns = compose.ColumnTransformer(
        [
            ("number", pipeline.make_pipeline(impute.SimpleImputer(), preprocessing.StandardScaler()), list("abc")),
            ("kind", preprocessing.OneHotEncoder(handle_unknown="ignore"), ["kind"]),
            ("ordinal", preprocessing.OrdinalEncoder(), ["kind"]),
        ],
        remainder="drop",
    )
    make, text = pipeline.make_pipeline, feature_extraction.text
    made = {
        "frame": make(columns, ensemble.HistGradientBoostingClassifier(max_iter=3)).fit(frame, y),
        "forest": make(columns, ensemble.ExtraTreesClassifier(n_estimators=3)).fit(frame, y),
        "tfidf": make(text.TfidfVectorizer(ngram_range=(1, 2)), linear_model.SGDClassifier()).fit(words, y),
        "counts": make(text.CountVectorizer(), naive_bayes.ComplementNB()).fit(words, y),
        "hashing": make(text.HashingVectorizer(n_features=16), svm.LinearSVC()).fit(words, y),
        "random": model_selection.RandomizedSearchCV(
            linear_model.LogisticRegression(), {"C": numpy.logspace(-1, 1, 5)}, n_iter=2, cv=2, random_state=1
        ).fit(x, y),
        "halving": model_selection.GridSearchCV(
            make(preprocessing.RobustScaler(), svm.SVC(probability=False)), {"svc__C": [1, 2]}, cv=2
        ).fit(x, y),
        "multi": multioutput.MultiOutputRegressor(linear_model.Ridge()).fit(x, numpy.c_[y, y]),
        "chain": multioutput.ClassifierChain(linear_model.LogisticRegression()).fit(x, numpy.c_[y, 1 - y]),
        "mlp": neural_network.MLPClassifier((4,), max_iter=3).fit(x, y),
        "neighbours": neighbors.KNeighborsClassifier(algorithm="ball_tree").fit(x, y),
        "selected": make(feature_selection.SelectKBest(feature_selection.f_classif, k=2), naive_bayes.GaussianNB()).fit(
            x, y
        ),
        "boosted": ensemble.GradientBoostingRegressor(n_estimators=3, loss="quantile").fit(x, y),
        "stacked": ensemble.StackingRegressor(
            [("r", linear_model.Ridge())], ensemble.RandomForestRegressor(n_estimators=3)
        ).fit(x, y),
        "bagged": ensemble.BaggingClassifier(svm.SVC(), n_estimators=3).fit(x, y),
        "isolation": ensemble.IsolationForest(n_estimators=3).fit(x),
        "target": compose.TransformedTargetRegressor(
            linear_model.LinearRegression(), transformer=preprocessing.QuantileTransformer(n_quantiles=9)
        ).fit(x, x[:, 0]),
        "kmeans": make(decomposition.TruncatedSVD(n_components=2), cluster.MiniBatchKMeans(n_clusters=2)).fit(x),
        "mixture": mixture.BayesianGaussianMixture(n_components=2).fit(x),
        "isotonic": isotonic.IsotonicRegression().fit(x[:, 0], y),
        "nystroem": make(kernel_approximation.Nystroem(n_components=5), linear_model.Perceptron()).fit(x, y),
        "pls": cross_decomposition.PLSRegression(n_components=2).fit(x, y),
        "elliptic": covariance.EllipticEnvelope().fit(x),
        "labels": preprocessing.LabelEncoder().fit(["a", "b"]),
        "binarizer": preprocessing.MultiLabelBinarizer().fit([["a"], ["b", "c"]]),
        "splines": make(preprocessing.SplineTransformer(n_knots=3), linear_model.HuberRegressor()).fit(x, y),
        "knn_impute": impute.KNNImputer().fit(x),
        "folds": list(model_selection.StratifiedKFold(3).split(x, y)),
        "splitter": model_selection.TimeSeriesSplit(3),
    }
    for name, value in made.items():
        joblib.dump(value, path / f"{name}.joblib", compress=len(name) % 3)
        (path / f"{name}.pkl").write_bytes(pickle.dumps(value))


def imbalanced_objects(path: Path) -> None:
    """imbalanced-learn's samplers in a pipeline."""
    import joblib
    from imblearn.over_sampling import SMOTE
    from imblearn.pipeline import make_pipeline
    from sklearn.linear_model import LogisticRegression

    x, y = _rows()
    joblib.dump(make_pipeline(SMOTE(k_neighbors=2), LogisticRegression()).fit(x, y), path / "pipeline.joblib")


def encoder_objects(path: Path) -> None:
    """category_encoders."""
    import category_encoders
    import joblib
    import pandas

    frame = pandas.DataFrame({"a": ["x", "y", "x"], "b": [1, 2, 3]})
    joblib.dump(category_encoders.TargetEncoder().fit(frame, [0, 1, 0]), path / "target.joblib")


def skorch_state(path: Path) -> None:
    """skorch's save_params: torch and safetensors, with history."""
    import numpy
    import torch
    from skorch import NeuralNetClassifier

    x, y = _rows()
    net = NeuralNetClassifier(torch.nn.Sequential(torch.nn.Linear(6, 2), torch.nn.Softmax(1)), max_epochs=2, verbose=0)
    net.fit(x.astype(numpy.float32), y.astype(numpy.int64))
    net.save_params(
        f_params=path / "p.pt", f_optimizer=path / "o.pt", f_history=path / "h.json", f_criterion=path / "c.pt"
    )
    net.save_params(f_params=path / "p.safetensors", use_safetensors=True)


def statistics_objects(path: Path) -> None:
    """statsmodels results."""
    import statsmodels.api as sm

    x, y = _rows()
    sm.OLS(y, sm.add_constant(x)).fit().save(str(path / "ols.pkl"))
    sm.GLM(y, x, family=sm.families.Binomial()).fit().save(str(path / "glm.pkl"))


def catboost_files(path: Path) -> None:
    """catboost's own formats and its pickles."""
    import catboost

    x, y = _rows()
    model = catboost.CatBoostClassifier(iterations=3, verbose=0, allow_writing_files=False, thread_count=1).fit(x, y)
    model.save_model(str(path / "m.cbm"))
    model.save_model(str(path / "m.json"), format="json")
    model.save_model(str(path / "m.onnx"), format="onnx")


def catboost_objects(path: Path) -> None:
    """catboost by pickle."""
    import catboost

    x, y = _rows()
    model = catboost.CatBoostRegressor(iterations=3, verbose=0, allow_writing_files=False, thread_count=1).fit(x, y)
    _dump(path, model=model)


def graph_objects(path: Path) -> None:
    """torch_geometric: a graph, a batch, a layer's state."""
    import torch
    from torch_geometric.data import Batch, Data, HeteroData
    from torch_geometric.nn import GCNConv

    data = Data(x=torch.ones(3, 2), edge_index=torch.tensor([[0, 1], [1, 2]]), y=torch.tensor([1]))
    torch.save(data, path / "data.pt")
    torch.save(Batch.from_data_list([data, data]), path / "batch.pt")
    torch.save(data.to_dict(), path / "dict.pt")
    mixed = HeteroData()
    mixed["a"].x = torch.ones(2, 2)
    torch.save(mixed, path / "hetero.pt")
    torch.save(GCNConv(2, 2).state_dict(), path / "conv.pt")


def metric_objects(path: Path) -> None:
    """torchmetrics: collections and states."""
    import torch
    import torchmetrics as tm

    metrics = tm.MetricCollection({"f1": tm.F1Score("multiclass", num_classes=3), "auc": tm.AUROC("binary")})
    torch.save(metrics.state_dict(), path / "state.pt")
    for name, metric in {
        "collection": metrics,
        "bleu": tm.text.BLEUScore(),
        "ssim": tm.image.StructuralSimilarityIndexMeasure(),
        "mse": tm.MeanSquaredError(),
        "confusion": tm.ConfusionMatrix("multiclass", num_classes=3),
        "perplexity": tm.text.Perplexity(),
    }.items():
        torch.save(metric, path / f"{name}.pt")


def joblib_state(path: Path) -> None:
    """Plain state by joblib and pickle, of every protocol and compressor: arrays, strings, nested containers."""
    import joblib
    import numpy

    values = {
        "mean": numpy.ones(4),
        "names": numpy.array(["a", "bb"], dtype=object),
        "text": numpy.array(["a", "bb"]),
        "table": numpy.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        "masked": numpy.ma.masked_array([1, 2], [True, False]),
        "fortran": numpy.asfortranarray(numpy.ones((3, 2))),
        "scalar": numpy.float16(1.5),
        "when": numpy.datetime64("2026-01-01"),
        "nested": {"a": [(1, {2}), frozenset("x")], "b": b"\x00" * 300},
    }
    for compress in (0, "zlib", "gzip", "bz2", "xz", "lzma", ("zlib", 9)):
        joblib.dump(
            values,
            path / f"{compress if isinstance(compress, str) else str(compress)[:4].strip('( ,')}.joblib",
            compress=compress,
        )
    for protocol in range(6):
        (path / f"protocol{protocol}.pkl").write_bytes(pickle.dumps(values, protocol))
    numpy.savez(
        path / "values.npz", **{name: value for name, value in values.items() if isinstance(value, numpy.ndarray)}
    )
