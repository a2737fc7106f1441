"""Keras on torch: its official example of a VAE, smaller."""

from __future__ import annotations

import os
from collections.abc import Callable

os.environ["KERAS_BACKEND"] = "torch"
import keras
import torch
from keras import layers, ops

DISTRIBUTION = "keras"
EXPECTED = {"vae": "correct", "add_loss": "warning reduction_imbalance"}

Step = Callable[[], torch.Tensor]


class Sampling(layers.Layer):
    """Draws z from its mean and its log variance."""

    def __init__(self) -> None:
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        """One draw."""
        z_mean, z_log_var = inputs
        epsilon = keras.random.normal(shape=ops.shape(z_mean), seed=self.seed_generator)
        return z_mean + ops.exp(0.5 * z_log_var) * epsilon


def _networks() -> tuple[keras.Model, keras.Model]:
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape=(8, 8, 1))
    x = layers.Conv2D(4, 3, activation="relu", strides=2, padding="same")(inputs)
    x = layers.Dense(8, activation="relu")(layers.Flatten()(x))
    z_mean, z_log_var = layers.Dense(2, name="z_mean")(x), layers.Dense(2, name="z_log_var")(x)
    encoder = keras.Model(inputs, [z_mean, z_log_var, Sampling()([z_mean, z_log_var])])
    latent = keras.Input(shape=(2,))
    x = layers.Reshape((4, 4, 4))(layers.Dense(64, activation="relu")(latent))
    x = layers.Conv2DTranspose(4, 3, activation="relu", strides=2, padding="same")(x)
    decoder = keras.Model(
        latent, layers.Conv2DTranspose(1, 3, activation="sigmoid", padding="same")(x)
    )
    return encoder, decoder


def make_vae_step() -> Step:
    encoder, decoder = _networks()
    data = torch.rand(8, 8, 8, 1)

    def step() -> torch.Tensor:
        z_mean, z_log_var, z = encoder(data, training=True)
        reconstruction = decoder(z, training=True)
        reconstruction_loss = ops.mean(
            ops.sum(keras.losses.binary_crossentropy(data, reconstruction), axis=(1, 2))
        )
        kl = -0.5 * (1 + z_log_var - ops.square(z_mean) - ops.exp(z_log_var))
        return reconstruction_loss + ops.mean(ops.sum(kl, axis=1))

    return step


class AddLossVAE(keras.Model):
    """A VAE in the manner of the guide "making new layers": the KL by `add_loss`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = _networks()

    def call(self, inputs):
        """The reconstruction."""
        z_mean, z_log_var, z = self.encoder(inputs)
        kl = -0.5 * ops.mean(z_log_var - ops.square(z_mean) - ops.exp(z_log_var) + 1)
        self.add_loss(kl)
        return self.decoder(z)


def make_add_loss_step() -> Step:
    model = AddLossVAE()
    model.compile(optimizer="adam", loss="mse")
    data = torch.rand(8, 8, 8, 1)
    model(data)

    def step() -> torch.Tensor:
        y = model(data, training=True)
        return model.compute_loss(x=data, y=data, y_pred=y, sample_weight=None, training=True)

    return step
