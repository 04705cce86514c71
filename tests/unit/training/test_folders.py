"""Folders of a configuration: names are found, and what cannot decode is known before a run."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.generate import SanaWM, Video
from sanawm_jax.training.recipes.folders import find_folders
from sanawm_jax.training.recipes.samples import _decoded


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "w"
    write_random(folder, layout="diffusers", part="stage1", sizes=TINY, seed=0)
    return folder


def test_names_become_folders(weights: Path, tmp_path: Path) -> None:
    for given in (weights, weights / "vae"):
        config = ConfigDict({"vae_dir": str(given), "text_dir": str(weights)})
        find_folders(config)
        assert (config.vae_dir, config.text_dir) == (str(weights / "vae"), str(weights))
    find_folders(ConfigDict({"vae_dir": "", "steps": 1}))
    for given, words in ((tmp_path, "holds no autoencoder"), ("nowhere", "neither a folder nor")):
        with pytest.raises(InputError, match=words):
            find_folders(ConfigDict({"vae_dir": str(given)}))


def test_films_are_decoded_as_in_sampling(weights: Path) -> None:
    latents = np.random.default_rng(0).normal(size=(2, 2, 2, 2, 8)).astype(np.float32)
    films = _decoded(latents, str(weights / "vae"), np.float32)
    model = SanaWM.from_pretrained(weights, dtype="float32")
    expected = model.decode(jnp.asarray(latents[:1]))
    assert films.shape == (2, *expected.shape) and films.dtype == np.uint8
    assert np.abs(films[0] - 255 * expected).max() <= 1.01


def test_a_video_can_be_saved(tmp_path: Path) -> None:
    frames = np.full((3, 8, 8, 3), 0.5, np.float32)
    video = Video(np.zeros((1, 8, 1, 1, 1), np.float32), frames, None)  # pyright: ignore
    assert video.save(tmp_path / "a.mp4").is_file()
    assert repr(video) == "Video(latents=(1, 8, 1, 1, 1), frames=(3, 8, 8, 3))"
    video.frames = None
    with pytest.raises(InputError, match="no frames"):
        video.save(tmp_path / "b.mp4")
