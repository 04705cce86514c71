"""Sampling with the latent frames of stage 1 divided over several devices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.generate import SanaWM
from tests.parity.compare import relative
from tests.parity.stage1_reference import make_folder

FRAMES = 41  # six latent frames: neither four nor eight ranks divide them


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sample")
    make_folder(made)
    return made / "model"


def sample(folder: Path, devices: int) -> np.ndarray:
    model = SanaWM.from_pretrained(folder, dtype="float32", devices=devices)
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    video = model(
        image,
        "a red room",
        action="w-20,dj-20",
        intrinsics=np.array([90.0, 88.0, 48.0, 32.0]),
        num_frames=FRAMES,
        height=64,
        width=96,
        steps=2,
        cfg_scale=3.0,
        progress=False,
        decode=devices == 2,
    )
    assert video.frames is None or np.isfinite(video.frames).all()
    return video.latents


def test_equals_one_device(folder: Path) -> None:
    expected = sample(folder, 1)
    for devices in (2, 4, 8):
        found = sample(folder, devices)
        assert found.shape == expected.shape == (1, 8, 6, 2, 3)
        assert relative(found, expected) <= 1e-5, devices


@pytest.mark.parametrize(
    ("devices", "offload", "message"),
    [(9, "none", "there are 8"), (0, "none", "1 or more"), (2, "block", "offload=model")],
)
def test_bad_numbers(folder: Path, devices: int, offload: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SanaWM.from_pretrained(folder, devices=devices, offload=offload)
