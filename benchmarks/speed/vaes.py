"""VAEs: a perceptron with one hidden layer each way, and convolutional ones of 28x28 and 64x64."""

from __future__ import annotations

import functools
import logging
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.harness import Contender, Subject, Workload, peer_module
from benchmarks.speed.ours import contenders, subject, trainable
from benchmarks.speed.package import Rescale, compile_blocks
from musigma import (
    VAE,
    Chain,
    Dataset,
    Format,
    GaussianHead,
    Prior,
    StandardNormal,
    TrainConfig,
    architecture,
    build,
    fit,
    likelihood,
)
from musigma.zoo import ARCHITECTURES

__all__ = ["WORKLOADS"]

HIDDEN, LATENTS, BATCH, EXAMPLES, LR = 400, 20, 128, 60_000, 1e-3


@functools.lru_cache(maxsize=1)
def images(n: int = EXAMPLES) -> np.ndarray:
    """Random bytes in the shape of MNIST; no time here depends on the content of the images."""
    return np.random.default_rng(0).integers(0, 256, (n, 1, 28, 28), dtype=np.uint8)


def grays(n: int) -> Tensor:
    """The first n images as gray values in [0, 1]."""
    return torch.from_numpy(images()[:n]).float().div(255).to(torch.get_default_device())


# --- one hidden layer each way -----------------------------------------------------------------


def mlp_model() -> VAE:
    """musigma's model; the Bernoulli accepts gray values as well as zeros and ones."""
    model = build("mlp_vae", (1, 28, 28), bits=1, hidden=HIDDEN, latents=LATENTS)
    assert isinstance(model, VAE)
    return model


def gray_vae(shape: Sequence[int], *, bits: int = 8) -> Chain:
    """The same model of bytes; the loss differs by a constant."""
    return Chain([Rescale(1 / (2**bits - 1))], mlp_model())


gray_architecture = architecture(gray_vae)
ARCHITECTURES.pop("gray_vae")  # `fit` can save the model, but the zoo does not list it


def mlp_ours(*, fast: bool = False) -> Subject:
    """A step, and an epoch of `fit`, which evaluates on one example and saves at the end."""
    result = subject(mlp_model(), grays(BATCH), lr=LR, fast=fast)
    data, model = Dataset(images()), gray_architecture((1, 28, 28))
    if fast:
        compile_blocks(model)  # once, as in a run of many epochs
    config = TrainConfig(
        epochs=1,
        batch_size=BATCH,
        optimizer="adam",
        lr=LR,
        warmup=0,
        schedule="constant",
        ema=0.0,
        evaluations=1,
        evaluate_on=1,
        precision="bf16" if fast else "fp32",
    )

    device = str(torch.get_default_device())

    def epoch() -> None:
        with tempfile.TemporaryDirectory() as folder:
            fit(model, data, data.subset([0]), config, Path(folder) / "run", device=device)

    result.calls = {**result.calls, "epoch": epoch}
    return result


class PlainVAE(nn.Module):
    """An encoder, two linear heads, and a decoder that emits probabilities, as in many examples.

    Args:
        encoder: Emits `features`.
        features: Inputs of the heads.
        decoder: From `latents` to the image.
        latents: Dimensions of z.
        distortion: Function of a reconstruction and x, summed over all elements.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        decoder: nn.Module,
        latents: int,
        distortion: Callable[..., Tensor],
    ):
        super().__init__()
        self.encoder, self.decoder, self.distortion = encoder, decoder, distortion
        self.mean, self.log_var = nn.Linear(features, latents), nn.Linear(features, latents)

    def forward(self, x: Tensor) -> Tensor:
        """The loss, in nats per example."""
        h = self.encoder(x)
        mean, log_var = self.mean(h), self.log_var(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_var)
        kl = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
        return (self.distortion(self.decoder(z), x, reduction="sum") + kl) / len(x)


def plain_subject(model: nn.Module, loss_of: Callable[[Tensor], Tensor], x: Tensor) -> Subject:
    """A plain training loop around a model."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)

    def step(x: Tensor = x) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(x)
        loss.backward()
        optimizer.step()
        return loss

    return Subject(
        {"step": step},
        model=model,
        loss=lambda: loss_of(x),
        parameters=trainable(model.parameters()),
    )


def mlp_plain_model() -> PlainVAE:
    """The model of the examples, ending in a sigmoid."""
    return PlainVAE(*mlp_parts(), LATENTS, F.binary_cross_entropy)


def mlp_parts() -> tuple[nn.Module, int, nn.Module]:
    """Encoder, number of its features, and decoder."""
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(784, HIDDEN), nn.ReLU())
    decoder = nn.Sequential(
        nn.Linear(LATENTS, HIDDEN),
        nn.ReLU(),
        nn.Linear(HIDDEN, 784),
        nn.Sigmoid(),
        nn.Unflatten(1, (1, 28, 28)),
    )
    return encoder, HIDDEN, decoder


class Items(torch.utils.data.Dataset):
    """One PIL image at a time, converted to a tensor, as torchvision's MNIST does."""

    def __len__(self) -> int:
        return len(images())

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        picture = Image.fromarray(images()[index, 0])
        pixels = torch.from_numpy(np.array(picture, np.uint8, copy=True)).view(28, 28, 1)
        return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255), 0


def mlp_plain(loader: Literal["items", "tensors"]) -> Subject:
    """The plain loop; `items` reads single images, `tensors` slices one tensor."""
    model = mlp_plain_model()
    result = plain_subject(model, model, grays(BATCH))
    step: Any = result.calls["step"]
    if loader == "items":
        data: Any = Items()
    else:
        data = torch.utils.data.TensorDataset(grays(EXAMPLES), torch.zeros(EXAMPLES))
    batches = torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)

    def epoch() -> float:
        return sum(step(x).item() for x, _ in batches)

    result.calls = {"epoch": epoch} if loader == "items" else {"step": step, "epoch": epoch}
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the progress bars and log messages of peers."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(before)


def pythae_subject(
    parts: tuple[nn.Module, int, nn.Module],
    latents: int,
    shape: tuple[int, ...],
    distortion: str,
    batch: int,
    examples: int,
) -> Subject:
    """pythae's VAE of the given networks, with its own trainer."""
    models, layers = peer_module("pythae.models"), peer_module("pythae.models.nn")
    trainers = peer_module("pythae.trainers")
    output = peer_module("pythae.models.base.base_utils").ModelOutput
    net, features, back = parts

    class Encoder(layers.BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net = net
            self.mean, self.log_var = nn.Linear(features, latents), nn.Linear(features, latents)

        def forward(self, x: Tensor) -> Any:
            h = self.net(x)
            return output(embedding=self.mean(h), log_covariance=self.log_var(h))

    class Decoder(layers.BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = back

        def forward(self, z: Tensor) -> Any:
            return output(reconstruction=self.net(z))

    config = models.VAEConfig(input_dim=shape, latent_dim=latents, reconstruction_loss=distortion)
    model = models.VAE(config, Encoder(), Decoder())
    x = grays(batch) if shape[1] == 28 else pictures(batch)
    result = plain_subject(model, lambda x: model({"data": x}).loss, x)
    if not examples:
        return result

    def epoch() -> None:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            settings = trainers.BaseTrainerConfig(
                output_dir=folder,
                num_epochs=1,
                learning_rate=LR,
                per_device_train_batch_size=batch,
                optimizer_cls="Adam",
                train_dataloader_num_workers=0,
            )
            data = peer_module("pythae.data.datasets").BaseDataset(
                grays(examples), torch.zeros(examples)
            )
            trainer = trainers.BaseTrainer(model, data, training_config=settings)
            trainer.prepare_training()
            trainer.train_step(1)

    result.calls = {**result.calls, "epoch": epoch}
    return result


def keras_subject(parts: Callable[[], tuple[Any, Any, Any]], latents: int, x: Any, data: Any):
    """A Keras model with the same loss, on the back end that KERAS_BACKEND names.

    Args:
        parts: Builds encoder, decoder, and the distortion of (x, reconstruction) per example.
        latents: Dimensions of z.
        x: The batch.
        data: Training set of `fit`; None: an epoch is not timed.
    """
    keras = peer_module("keras")
    layers, ops = keras.layers, keras.ops
    encoder, decoder, distortion = parts()

    class Model(keras.Model):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = encoder, decoder
            self.mean, self.log_var = layers.Dense(latents), layers.Dense(latents)
            self.seeds = keras.random.SeedGenerator(0)

        def call(self, x: Any) -> Any:
            h = self.encoder(x)
            mean, log_var = self.mean(h), self.log_var(h)
            kl = -0.5 * ops.sum(1 + log_var - mean * mean - ops.exp(log_var), -1)
            self.add_loss(ops.mean(kl))
            noise = keras.random.normal(ops.shape(mean), seed=self.seeds)
            return self.decoder(mean + ops.exp(0.5 * log_var) * noise)

    model = Model()
    model.compile(optimizer=keras.optimizers.Adam(LR), loss=distortion)
    model(x[:1])  # creates the weights
    calls: dict[str, Callable[[], object]] = {"step": lambda: model.train_on_batch(x, x)}
    if data is not None:
        calls["epoch"] = lambda: model.fit(data, data, batch_size=len(x), verbose=0)
    parameters = sum(math.prod(w.shape) for w in model.trainable_weights)
    return Subject(calls, parameters=parameters, countable=False)


def mlp_keras() -> Subject:
    """Keras, on flat images."""

    def parts() -> tuple[Any, Any, Any]:
        keras = peer_module("keras")
        layers, ops = keras.layers, keras.ops
        encoder = keras.Sequential([layers.Dense(HIDDEN, "relu")])
        decoder = keras.Sequential([layers.Dense(HIDDEN, "relu"), layers.Dense(784, "sigmoid")])

        def distortion(x: Any, mean: Any) -> Any:
            each = keras.losses.binary_crossentropy(x[..., None], mean[..., None])
            return ops.sum(each, -1)

        return encoder, decoder, distortion

    data = (images().reshape(EXAMPLES, -1) / 255).astype(np.float32)
    return keras_subject(parts, LATENTS, data[:BATCH], data)


# --- convolutional -----------------------------------------------------------------------------


def pictures(n: int) -> Tensor:
    """Random color images, (n, 3, 64, 64), in [0, 1]."""
    return torch.rand(n, 3, 64, 64)


def small_parts() -> tuple[nn.Module, int, nn.Module]:
    """The networks of Keras's example for 28x28: encoder, number of its features, decoder."""
    encoder = nn.Sequential(
        nn.Conv2d(1, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3136, 16),
        nn.ReLU(),
    )
    decoder = nn.Sequential(
        nn.Linear(2, 3136),
        nn.ReLU(),
        nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 64, 3, 2, 1, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 3, 2, 1, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 1, 3, 1, 1),
        nn.Sigmoid(),
    )
    return encoder, 16, decoder


def vanilla_parts() -> tuple[nn.Module, int, nn.Module]:
    """Five convolutions each way with batch normalization, 32 to 512 channels, for 64x64."""
    encoder: list[nn.Module] = []
    for inputs, outputs in zip((3, 32, 64, 128, 256), (32, 64, 128, 256, 512), strict=True):
        encoder += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.LeakyReLU()]
    decoder: list[nn.Module] = [nn.Linear(128, 2048), nn.Unflatten(1, (512, 2, 2))]
    for inputs, outputs in zip((512, 256, 128, 64, 32), (256, 128, 64, 32, 32), strict=True):
        decoder += [
            nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, 1),
            nn.BatchNorm2d(outputs),
            nn.LeakyReLU(),
        ]
    decoder += [nn.Conv2d(32, 3, 3, 1, 1), nn.Tanh()]
    return nn.Sequential(*encoder, nn.Flatten()), 2048, nn.Sequential(*decoder)


def conv_model(size: int) -> VAE:
    """The same networks with musigma's heads; squared error is a Gaussian of variance 1/2."""
    encoder, features, decoder = small_parts() if size == 28 else vanilla_parts()
    latents = 2 if size == 28 else 128
    posterior = GaussianHead(
        nn.Sequential(encoder, nn.Linear(features, 2 * latents)),
        event_ndims=1,
        format=Format(scale="log_var"),
    )
    if size == 28:
        logits = nn.Sequential(
            *list(decoder.children())[:-1]
        )  # the likelihood contains the sigmoid
        head = likelihood("bernoulli", (1, 28, 28), lambda _: logits, levels=2)
    else:
        head = GaussianHead(decoder, event_ndims=3, log_std=-0.5 * math.log(2))
    return VAE(posterior, head, Prior(StandardNormal((latents,))))


def conv_x(size: int) -> Tensor:
    """The batch."""
    return grays(64) if size == 28 else pictures(64)


def conv_ours(size: int, *, fast: bool = False) -> Subject:
    """musigma."""
    return subject(conv_model(size), conv_x(size), lr=LR, fast=fast)


def conv_plain_model(size: int) -> PlainVAE:
    """The model of the plain loop."""
    if size == 28:
        return PlainVAE(*small_parts(), 2, F.binary_cross_entropy)
    return PlainVAE(*vanilla_parts(), 128, F.mse_loss)


def conv_plain(size: int) -> Subject:
    """The plain loop."""
    model = conv_plain_model(size)
    return plain_subject(model, model, conv_x(size))


def conv_pythae(size: int) -> Subject:
    """pythae."""
    if size == 28:
        return pythae_subject(small_parts(), 2, (1, 28, 28), "bce", 64, 0)
    return pythae_subject(vanilla_parts(), 128, (3, 64, 64), "mse", 64, 0)


def conv_keras(size: int) -> Subject:
    """Keras, with channels last."""

    def parts() -> tuple[Any, Any, Any]:
        keras = peer_module("keras")
        k, ops = keras.layers, keras.ops
        if size == 28:
            relu = {"padding": "same", "activation": "relu"}
            encoder = [k.Conv2D(c, 3, 2, **relu) for c in (32, 64)]
            encoder += [k.Flatten(), k.Dense(16, "relu")]
            decoder = [k.Dense(3136, "relu"), k.Reshape((7, 7, 64))]
            decoder += [k.Conv2DTranspose(c, 3, 2, **relu) for c in (64, 32)]
            decoder += [k.Conv2DTranspose(1, 3, 1, "same", activation="sigmoid")]
            return (
                keras.Sequential(encoder),
                keras.Sequential(decoder),
                lambda x, mean: ops.sum(keras.losses.binary_crossentropy(x, mean), (1, 2)),
            )

        def block(layer: Any) -> list[Any]:
            return [layer, k.BatchNormalization(), k.LeakyReLU(0.01)]

        encoder = [b for c in (32, 64, 128, 256, 512) for b in block(k.Conv2D(c, 3, 2, "same"))]
        decoder = [k.Dense(2048), k.Reshape((2, 2, 512))]
        for c in (256, 128, 64, 32, 32):
            decoder += block(k.Conv2DTranspose(c, 3, 2, "same"))
        decoder += [k.Conv2D(3, 3, 1, "same", activation="tanh")]
        return (
            keras.Sequential([*encoder, k.Flatten()]),
            keras.Sequential(decoder),
            lambda x, mean: ops.sum((x - mean) ** 2, (1, 2, 3)),
        )

    x = conv_x(size).permute(0, 2, 3, 1).contiguous().numpy()
    return keras_subject(parts, 2 if size == 28 else 128, x, None)


# --- the workloads -----------------------------------------------------------------------------


def _keras(setup: Callable[[], Subject]) -> tuple[Contender, ...]:
    return tuple(
        Contender(
            f"keras ({backend})",
            setup,
            kind="peer" if backend == "torch" else "other",
            needs=("keras", backend),
            environment={"KERAS_BACKEND": backend},
        )
        for backend in ("torch", "jax")
    )


def _conv(size: int, about: str, parameters: int) -> Workload:
    everyone = (
        *contenders(functools.partial(conv_ours, size)),
        Contender("plain loop", functools.partial(conv_plain, size)),
        Contender("pythae", functools.partial(conv_pythae, size), needs=("pythae",)),
        *_keras(functools.partial(conv_keras, size)),
    )
    return Workload(
        f"conv-vae-{size}",
        about,
        64,
        ("step",),
        everyone,
        parameters=parameters,
        conv=True,
    )


WORKLOADS = (
    Workload(
        "mlp-vae",
        "MLP VAE 784-400-20, batch 128, Bernoulli on gray values; an epoch is 60,000 images "
        "through the whole trainer",
        BATCH,
        ("step", "epoch"),
        (
            Contender("musigma", mlp_ours, "ours"),
            Contender(
                "musigma, fast", functools.partial(mlp_ours, fast=True), "fast", environment={}
            ),
            Contender(
                "plain loop, pictures", functools.partial(mlp_plain, "items"), needs=("pillow",)
            ),
            Contender("plain loop, tensors", functools.partial(mlp_plain, "tensors")),
            Contender(
                "pythae",
                lambda: pythae_subject(mlp_parts(), LATENTS, (1, 28, 28), "bce", BATCH, EXAMPLES),
                needs=("pythae",),
            ),
            *_keras(mlp_keras),
        ),
        epoch=EXAMPLES,
        parameters=652_824,
    ),
    _conv(28, "Convolutional VAE of 28x28 (Keras's example), batch 64, Bernoulli", 134_165),
    _conv(
        64,
        "Convolutional VAE of 64x64x3 (32 to 512 channels, 128 latents), batch 64, squared error",
        3_937_635,
    ),
)
