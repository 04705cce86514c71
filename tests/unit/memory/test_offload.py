"""`--offload` changes where weights are and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.memory import streaming
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.generate import SanaWM
from sanawm_jax.sampling.refine import LTX2Refiner, RefineOptions
from tests.streamed_layers import Layers

BOUND = 1e-6  # relative: layers are compiled apart from each other


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from sanawm_jax.checkpoints.sizes import TINY

    out = tmp_path_factory.mktemp("offload") / "w"
    return write_random(out, part="all", sizes=TINY)


def assert_close(a: Any, b: Any) -> None:
    a, b = np.asarray(a), np.asarray(b)
    assert np.isfinite(a).all() and np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, rtol=0, atol=BOUND * np.abs(b).max())


def test_stage1(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def make(offload: str) -> Any:
        model = SanaWM.from_pretrained(folders[0], dtype="float32", offload=offload)
        image = Image.new("RGB", (64, 64), (200, 30, 30))
        made = model(
            image, "a room", action="w-16", intrinsics="60,60,32,32", num_frames=17, height=64,
            width=64, steps=3, cfg_scale=3.0, text_length=8, progress=False,
        )  # fmt: skip
        return made, model

    kept, model = make("none")
    assert set(model._parts) == {"text", "encoder", "transformer", "decoder"}
    moved, model = make("model")
    assert set(model._parts) == {"decoder"}  # one at a time
    np.testing.assert_array_equal(moved.latents, kept.latents)
    np.testing.assert_array_equal(moved.frames, kept.frames)
    layers = Layers(monkeypatch)
    there, decode = [], SanaWM.decode

    def decoded(model: SanaWM, latents: Any) -> Any:
        there.append(layers.alive())
        return decode(model, latents)

    monkeypatch.setattr(SanaWM, "decode", decoded)
    streamed, _ = make("block")
    assert_close(streamed.latents, kept.latents)
    # 4 layers of the DiT and 2 of the text encoder were uploaded, at most two at a time
    assert len(set(layers.brought)) == 6 and layers.most == 2
    assert there == [0]  # gone with the networks


def refine(folder: Path, offload: str, block_size: int) -> np.ndarray:
    latents = np.random.default_rng(0).standard_normal((1, 8, 6, 2, 2)).astype(np.float32)
    options = RefineOptions(refiner_block_size=block_size)
    refiner = LTX2Refiner.from_pretrained(folder, dtype="float32", offload=offload, options=options)
    return refiner(latents, "a room", progress=False)


def test_layers_of_the_refiner_stay(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers stay from the second block on, also in the short last block."""
    kept, layers = refine(folders[1], "model", 2), Layers(monkeypatch)
    stats = {"bytes_limit": 2**30, "bytes_in_use": 0, "peak_bytes_in_use": 2**20}
    monkeypatch.setattr(streaming, "memory_stats", lambda: stats)
    monkeypatch.setattr(streaming, "_measured", {})
    assert_close(refine(folders[1], "block", 2), kept)
    # 2 of Gemma 3, 3 for the text, 3 for the sink, 3 in each pass of the first block, 3 that stay
    assert len(layers.brought) == 2 + 3 + 3 + 4 * 3 + 3 and layers.most == 2 + 3
    assert not layers.alive()


@pytest.mark.parametrize("block_size", [3, 0])
def test_refiner(folders: list[Path], block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = refine(folders[1], "none", block_size)
    np.testing.assert_array_equal(refine(folders[1], "model", block_size), kept)
    layers = Layers(monkeypatch)
    assert_close(refine(folders[1], "block", block_size), kept)
    # 2 of Gemma 3; 3 of the transformer, whose text layers pass once and on their own
    assert len(set(layers.brought)) == 2 + 3 + 3 and layers.most == 2


def test_unknown_name(folders: list[Path]) -> None:
    with pytest.raises(InputError, match="--offload=disk is unknown; use one of none, model, b"):
        SanaWM.from_pretrained(folders[0], offload="disk")
