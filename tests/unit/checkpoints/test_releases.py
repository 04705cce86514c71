"""The streaming and the chunk-causal release: what their folders say, and what an export keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.checkpoints.export import export_weights
from sanawm_jax.checkpoints.layouts import RELEASES
from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.checkpoints.upstream_folder import open_refiner, open_stage1
from sanawm_jax.dit.numerics import PRESETS
from sanawm_jax.sampling.generate import SanaWM
from tests.sample_tiny import sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("releases")
    for name in RELEASES:
        write_random(folder / name, sizes=TINY, layout=name, part="all")
        for layout in ("diffusers", "upstream"):
            export_weights(folder / name, layout, folder / f"{name}-{layout}")
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "image.png")
    return folder


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("layout", ["", "-diffusers", "-upstream"])
def test_a_folder_says_how_it_runs(folder: Path, name: str, layout: str) -> None:
    found = open_stage1(folder / (name + layout))
    assert found.stream_options() == RELEASES[name]
    assert found.dit_config().numerics == PRESETS[name]
    assert found.vae_config().decoder_causal == (name == "streaming")
    assert found.schedule().shift == (8.0 if name == "streaming" else 9.8)
    refiner = folder / (f"{name}-diffusers-refiner" if layout == "-diffusers" else name + layout)
    open_refiner(refiner).check()


def stream(folder: Path, name: str, out: Path, **given: Any) -> np.ndarray:
    sample(
        **{
            "weights": str(folder / name),
            "image": str(folder / "image.png"),
            "prompt": "a room",
            "action": "wd-24",
            "num_frames": 25,
            "streaming": True,
            "latents_only": True,
            "save_latents": str(out / "l.npy"),
            **given,
        }
    )
    return np.load(out / "l.npy")


def test_every_layout_gives_the_same_stream(folder: Path, tmp_path: Path) -> None:
    expected = stream(folder, "streaming", tmp_path)
    for layout in ("-diffusers", "-upstream"):
        np.testing.assert_array_equal(stream(folder, "streaming" + layout, tmp_path), expected)
    other = stream(folder, "streaming", tmp_path, numerics="trainer")
    assert np.abs(other - expected).max() > 1e-6
    with pytest.warns(UserWarning, match="distilled for --streaming"):
        stream(folder, "streaming", tmp_path, streaming=False)


def test_the_chunk_causal_release_is_sampled_chunk_after_chunk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sanawm_jax.sampling import generate

    found = []
    staggered = generate.denoise_staggered
    monkeypatch.setattr(
        generate,
        "denoise_staggered",
        lambda *args, **options: found.append(args[6]) or staggered(*args, **options),
    )
    given = dict(streaming=False, step=2, action="wd-48", num_frames=49)
    latents = stream(folder, "chunk_causal", tmp_path, **given)
    assert found == [(0, 4)] and np.isfinite(latents).all()
    model = SanaWM.from_pretrained(folder / "chunk_causal", dtype="float32")
    assert model.folder.schedule().shift == 9.8
