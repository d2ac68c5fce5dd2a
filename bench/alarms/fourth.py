"""The fourth held-out set, written after every list was frozen and never used to change one.

As third.py: one function per library or kind; `_objects` are whole pickled objects, for `--tier framework`.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any


def _rows() -> tuple[Any, Any]:
    import numpy

    state = numpy.random.RandomState(11)
    x = state.rand(70, 5)
    return x, (x[:, 1] > x[:, 3]).astype(int)


def _model() -> Any:
    import torch

    torch.manual_seed(4)
    return torch.nn.Sequential(torch.nn.Conv1d(2, 3, 2), torch.nn.PReLU(), torch.nn.Flatten(), torch.nn.Linear(9, 2))


def gan_state(path: Path) -> None:
    """Two models, two optimizers, warm-up by hand, best-so-far copies, as GAN scripts save them every epoch."""
    import copy

    import torch

    for epoch in range(3):
        parts: dict[str, Any] = {"epoch": epoch, "losses": {"g": [0.1] * epoch, "d": torch.ones(epoch)}}
        for name in ("generator", "discriminator"):
            model = _model()
            optimizer = torch.optim.Adam(model.parameters(), betas=(0.5, 0.999))
            model(torch.ones(1, 2, 4)).sum().backward()
            optimizer.step()
            warm = torch.optim.lr_scheduler.LinearLR(optimizer)
            parts |= {name: model.state_dict(), f"{name}_opt": optimizer.state_dict(), f"{name}_lr": warm.state_dict()}
            parts[f"best_{name}"] = copy.deepcopy(model).half().state_dict()
        torch.save(parts, path / f"epoch_{epoch}.tar")
    torch.save(parts["generator"], path / "old_format.pth", _use_new_zipfile_serialization=False)
    torch.save((parts["losses"], [torch.get_rng_state()]), path / "history.bin", pickle_protocol=4)


def random_state(path: Path) -> None:
    """Generators of numpy's every kind, Python's and torch's, by pickle, by torch and by numpy."""
    import random

    import numpy
    import torch

    for kind in ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"):
        made = numpy.random.Generator(getattr(numpy.random, kind)(3))
        (path / f"{kind}.pkl").write_bytes(pickle.dumps(made))
        torch.save({"state": made.bit_generator.state, "draws": made.random(3)}, path / f"{kind}.pt")
    seeds = numpy.random.SeedSequence(5).spawn(2)
    states = {"python": random.Random(1).getstate(), "torch": torch.get_rng_state(), "legacy": numpy.random.get_state()}
    torch.save(states, path / "rng_state_0.pth")
    (path / "seeds.pkl").write_bytes(pickle.dumps([seed.entropy for seed in seeds]))


def module_objects(path: Path) -> None:
    """Whole modules, optimizers and schedulers by torch.save, in nests no earlier set had."""
    import torch

    nn = torch.nn

    for name, made in {
        "unet": nn.ModuleDict(
            {"down": nn.Sequential(nn.Conv3d(1, 2, 1), nn.MaxPool3d(2)), "up": nn.ConvTranspose3d(2, 1, 2)}
        ),
        "heads": nn.ModuleList([nn.Linear(2, 2), nn.Identity(), nn.Softmax(-1), nn.Hardsigmoid()]),
        "transformer": nn.Transformer(4, 2, 1, 1, 4, batch_first=True, activation="gelu"),
        "cells": nn.Sequential(nn.GRUCell(2, 2), nn.RNNCell(2, 2)),
        "pools": nn.Sequential(
            nn.LPPool1d(2, 2), nn.FractionalMaxPool2d(2, 2), nn.AdaptiveMaxPool1d(2), nn.AvgPool3d(2)
        ),
        "shapes": nn.Sequential(
            nn.Unflatten(1, (1, 2)), nn.ChannelShuffle(1), nn.PixelUnshuffle(1), nn.CosineSimilarity()
        ),
        "criteria": [
            nn.SmoothL1Loss(),
            nn.PoissonNLLLoss(),
            nn.CosineEmbeddingLoss(),
            nn.MultiMarginLoss(),
            nn.SoftMarginLoss(),
        ],
        "frozen": nn.Linear(2, 2).requires_grad_(False).eval(),
        "double": nn.Linear(2, 2).double(),
        "adagrad": torch.optim.Adagrad(_model().parameters()),
        "sgd_groups": torch.optim.SGD([{"params": list(_model().parameters()), "lr": 0.1, "tag": "a"}], momentum=0.1),
        "multistep": torch.optim.lr_scheduler.MultiStepLR(torch.optim.Adam(_model().parameters()), [1, 2]),
        "concat": torch.utils.data.ConcatDataset([torch.utils.data.TensorDataset(torch.ones(2))]),
    }.items():
        torch.save(made, path / f"{name}.pt")


def trainer_run(path: Path) -> None:
    """HF Trainer again: a token classifier and a small seq2seq, with evaluation, labels and a collator."""
    import torch
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        RobertaConfig,
        RobertaForTokenClassification,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        Trainer,
        TrainingArguments,
    )

    torch.manual_seed(2)
    small = RobertaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=20)
    small.id2label = {0: "O", 1: "B", 2: "I"}
    rows = [{"input_ids": torch.arange(2, 7), "labels": torch.zeros(5, dtype=torch.long)} for _ in range(4)]
    settings: dict[str, Any] = {
        "max_steps": 2, "save_steps": 1, "report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1,
    }  # fmt: skip
    Trainer(
        model=RobertaForTokenClassification(small),
        args=TrainingArguments(output_dir=str(path / "ner"), optim="adamw_torch", save_only_model=False, **settings),
        train_dataset=rows,
    ).train()
    bart = BartConfig(
        d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=20, max_position_embeddings=16,
    )  # fmt: skip
    Seq2SeqTrainer(
        model=BartForConditionalGeneration(bart),
        args=Seq2SeqTrainingArguments(output_dir=str(path / "sum"), predict_with_generate=True, **settings),
        train_dataset=rows,
    ).train()


def lightning_run(path: Path) -> None:
    """Lightning with two loaders, metrics as attributes, a TensorBoard-less logger, several checkpoints."""
    import lightning as pl
    import torch
    import torchmetrics
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Net(pl.LightningModule):
        def __init__(self, lr: float = 0.1, dims: dict[str, int] | None = None, name: str | None = None) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.body = _model()
            self.score = torchmetrics.MeanMetric()

        def training_step(self, batch: Any, _: int) -> Any:
            loss = self.body(batch[0]).sum()
            self.score(loss)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.RAdam(self.parameters(), lr=self.hparams.lr)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 2, 4)), batch_size=2)
    keep = ModelCheckpoint(path, "{epoch}-{loss:.1f}", save_top_k=-1, every_n_epochs=1, monitor="loss")
    pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, callbacks=[keep], enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(Net(dims={"a": 1}), data)  # fmt: skip


def sharded_run(path: Path) -> None:
    """DCP of FSDP2 with an SGD momentum, a schedule and RNG state beside; a second save over another layout."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(_model(), mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(torch.ones(1, 2, 4)).sum().backward()
        optimizer.step()
        weights, state = get_state_dict(model, optimizer)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1).state_dict()
        extra = {
            "rng": torch.get_rng_state(),
            "tokens": 12345,
            "schedule": schedule,
            "config": {"name": "x", "dims": [1, 2]},
        }
        dcp.save({"app": {"model": weights, "optim": state}, **extra}, checkpoint_id=path / "step-1")
        dcp.save({"weights": weights}, checkpoint_id=path / "weights")
    finally:
        dist.destroy_process_group()


def estimator_objects(path: Path) -> None:
    """scikit-learn, XGBoost and LightGBM as they are deployed: pipelines, searches, early stopping, categories."""
    import joblib
    import lightgbm
    import numpy
    import xgboost
    from sklearn import (
        calibration,
        cluster,
        compose,
        decomposition,
        ensemble,
        feature_extraction,
        feature_selection,
        linear_model,
        manifold,
        model_selection,
        naive_bayes,
        neighbors,
        pipeline,
        preprocessing,
        svm,
        tree,
    )

    x, y = _rows()
    make = pipeline.make_pipeline
    words = ["one two", "three", "two three one"] * 20
    made = {
        "polynomial": make(preprocessing.PolynomialFeatures(2), linear_model.LassoCV(cv=2)).fit(x, y),
        "power": make(preprocessing.PowerTransformer(), svm.SVR()).fit(x, y),
        "chars": make(feature_extraction.text.TfidfVectorizer(analyzer="char"), linear_model.RidgeClassifier()).fit(
            words, y[:60]
        ),
        "topics": make(feature_extraction.text.CountVectorizer(), decomposition.LatentDirichletAllocation(2)).fit(
            words
        ),
        "dicts": feature_extraction.DictVectorizer().fit([{"a": 1, "b": "x"}]),
        "rfe": feature_selection.RFE(linear_model.LogisticRegression(), n_features_to_select=2).fit(x, y),
        "model_based": make(
            feature_selection.SelectFromModel(tree.ExtraTreeClassifier()), naive_bayes.BernoulliNB()
        ).fit(x, y),
        "discretised": make(preprocessing.KBinsDiscretizer(3), linear_model.SGDRegressor()).fit(x, y),
        "ada": ensemble.AdaBoostClassifier(n_estimators=3).fit(x, y),
        "trees": ensemble.RandomTreesEmbedding(3).fit(x),
        "regression": ensemble.HistGradientBoostingRegressor(max_iter=3, loss="poisson").fit(x, y),
        "soft": ensemble.VotingRegressor([("a", linear_model.Ridge()), ("b", tree.DecisionTreeRegressor())]).fit(x, y),
        "calibrated": calibration.CalibratedClassifierCV(svm.LinearSVC(), method="isotonic", cv=2).fit(x, y),
        "search": model_selection.GridSearchCV(
            make(preprocessing.MaxAbsScaler(), neighbors.KNeighborsRegressor()),
            {"kneighborsregressor__n_neighbors": [1, 2]},
            cv=2,
        ).fit(x, y),
        "density": cluster.HDBSCAN(min_cluster_size=3).fit(x),
        "spectral": cluster.SpectralClustering(2, assign_labels="discretize").fit(x),
        "outliers": neighbors.LocalOutlierFactor(novelty=True).fit(x),
        "map": manifold.Isomap(n_components=2).fit(x),
        "columns": compose.make_column_transformer(
            (preprocessing.StandardScaler(), [0, 1]), remainder="passthrough"
        ).fit(x),
        "xgb": make(preprocessing.StandardScaler(), xgboost.XGBClassifier(n_estimators=3, n_jobs=1)).fit(x, y),
        "lgbm": make(preprocessing.StandardScaler(), lightgbm.LGBMRegressor(n_estimators=3, verbose=-1, n_jobs=1)).fit(
            x, y
        ),
        "quantiles": linear_model.QuantileRegressor().fit(x, y),
        "robust": linear_model.RANSACRegressor(random_state=1).fit(x, y),
        "labels": preprocessing.LabelBinarizer().fit(["a", "b"]),
        "scores": numpy.array([0.1, 0.2]),
    }
    for name, value in made.items():
        joblib.dump(value, path / f"{name}.joblib")


def segmentation(path: Path) -> None:
    """segmentation_models_pytorch and monai: save_pretrained and state."""
    import segmentation_models_pytorch as smp
    import torch

    model = smp.Unet("resnet18", encoder_weights=None, in_channels=1, decoder_channels=(8, 8, 8, 8, 8))
    torch.save({"model": model.state_dict(), "epoch": 1}, path / "unet.pth")


def contrastive(path: Path) -> None:
    """open_clip: a model's state and its configuration."""
    import json

    import open_clip
    import torch

    tower = {"layers": 1, "width": 8, "patch_size": 8, "image_size": 16, "head_width": 4}
    words = {"context_length": 4, "vocab_size": 10, "width": 8, "heads": 2, "layers": 1}
    config = {"embed_dim": 4, "vision_cfg": tower, "text_cfg": words}
    torch.save({"state_dict": open_clip.CLIP(**config).state_dict(), "name": "x", "epoch": 2}, path / "epoch_2.pt")
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))


def vision(path: Path) -> None:
    """kornia's and torch_optimizer's state."""
    import kornia
    import torch
    import torch_optimizer

    model = _model()
    for kind in ("AdaBound", "Yogi", "DiffGrad", "RangerVA"):
        optimizer = getattr(torch_optimizer, kind)(model.parameters(), lr=0.01)
        model(torch.ones(1, 2, 4)).sum().backward()
        optimizer.step()
        torch.save({"optimizer": optimizer.state_dict(), "net": model.state_dict()}, path / f"{kind}.pt")
    torch.save(kornia.feature.HardNet(False).state_dict(), path / "hardnet.pth")


def probabilistic(path: Path) -> None:
    """pyro's parameter store, saved as its tutorials do."""
    import pyro
    import torch

    pyro.clear_param_store()
    pyro.param("loc", torch.zeros(2))
    pyro.param("scale", torch.ones(2), constraint=torch.distributions.constraints.positive)
    torch.save({name: value.detach() for name, value in pyro.get_param_store().items()}, path / "params.pt")
    pyro.get_param_store().save(str(path / "store.pyro"))


def metric_learning(path: Path) -> None:
    """pytorch-metric-learning: trunk, embedder and loss, by state."""
    import torch
    from pytorch_metric_learning import losses

    loss = losses.ArcFaceLoss(3, 4)
    torch.save({"trunk": _model().state_dict(), "loss": loss.state_dict()}, path / "best.pth")


def word_vectors(path: Path) -> None:
    """gensim: vectors in word2vec's own formats."""
    from gensim.models import Word2Vec

    model = Word2Vec([["a", "b", "c"]] * 5, vector_size=4, min_count=1, workers=1)
    model.wv.save_word2vec_format(str(path / "v.txt"))
    model.wv.save_word2vec_format(str(path / "v.bin"), binary=True)


def word_objects(path: Path) -> None:
    """gensim by its own save, which pickles."""
    from gensim.models import Word2Vec

    Word2Vec([["a", "b", "c"]] * 5, vector_size=4, min_count=1, workers=1).save(str(path / "w2v.model"))


def survival_objects(path: Path) -> None:
    """lifelines and hmmlearn, pickled."""
    from hmmlearn.hmm import GaussianHMM
    from lifelines import KaplanMeierFitter

    x, y = _rows()
    (path / "km.pkl").write_bytes(pickle.dumps(KaplanMeierFitter().fit(x[:, 0], y)))
    (path / "hmm.pkl").write_bytes(pickle.dumps(GaussianHMM(2, n_iter=3).fit(x)))


def array_files(path: Path) -> None:
    """xarray and h5py files, without pickles."""
    import h5py
    import numpy

    with h5py.File(path / "data.h5", "w") as file:
        file["x"] = numpy.ones((3, 2))
        file["x"].attrs["unit"] = "m"
    numpy.savez(path / "fold.npz", train=numpy.arange(5), test=numpy.arange(2), names=numpy.array(["a", "b"]))
    numpy.save(path / "embedding.npy", numpy.ones((4, 3), numpy.float16))
