"""The causal decoder as a stream equals the reference's decoder on the whole clip."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from sanawm_jax.core import params as params_lib
from sanawm_jax.runtime.errors import InputError
from tests.parity.compare import relative
from tests.parity.vae_reference import CASES, Pair, from_torch, make_pair, to_torch

NAMES = ("published", "two_blocks", "strided")
FRAMES = 4


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    config = dataclasses.replace(CASES[request.param][0], decoder_causal=True)
    return make_pair(config, tmp_path_factory.mktemp(request.param))


def decoder(pair: Pair) -> Any:
    @functools.partial(jax.jit)
    def call(params: Any, latents: jax.Array, state: Any) -> Any:
        return params_lib.apply(pair.graphdef, params, latents, state, method="decode_stream")

    return lambda latents, state: call(pair.params, latents, state)


def latents_of(pair: Pair, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(size=(2, FRAMES, 3, 2, pair.cfg.latent_channels)).astype(np.float32)


def test_one_latent_at_a_time(pair: Pair, rng: np.random.Generator) -> None:
    latents = latents_of(pair, rng)
    mean, std = pair.reference.latents_mean, pair.reference.latents_std
    plain = to_torch(latents) * std[:, None, None, None] / pair.cfg.scaling_factor
    with torch.no_grad():
        expected = pair.reference.decode(plain + mean[:, None, None, None], return_dict=False)[0]
    expected = from_torch(expected).numpy()

    step, state, made, shapes = decoder(pair), None, [], None
    for i in range(FRAMES):
        video, state = step(latents[:, i : i + 1], state)
        assert shapes in (None, jax.tree.map(jnp.shape, state))  # a state does not grow
        shapes = jax.tree.map(jnp.shape, state)
        made.append(video)
    lengths = [video.shape[1] for video in made]
    ratio = (expected.shape[1] - 1) // (FRAMES - 1)
    assert lengths == [1, *[ratio] * (FRAMES - 1)]
    assert relative(np.concatenate(made, 1), expected) <= 1e-5


def test_any_cut_gives_the_same_frames(pair: Pair, rng: np.random.Generator) -> None:
    latents, step = latents_of(pair, rng), decoder(pair)
    whole, _ = step(latents, None)
    for cut in (1, 3):
        first, state = step(latents[:, :cut], None)
        rest, _ = step(latents[:, cut:], state)
        assert relative(np.concatenate([first, rest], 1), whole) <= 1e-5


def test_refuses_a_decoder_that_sees_the_future(tmp_path: Path) -> None:
    pair = make_pair(CASES["published"][0], tmp_path)
    with pytest.raises(InputError, match="not causal"):
        decoder(pair)(np.zeros((1, 1, 2, 2, pair.cfg.latent_channels), np.float32), None)
