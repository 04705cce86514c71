"""The shipped small world: what diffusers makes of the same folder, and what it weighs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import SanaWMPipeline
from PIL import Image

from configs.sample_small_world import get_config
from sanawm_jax.pipeline.generate import SanaWM
from tests.parity.compare import float32_attention, relative

ASSETS = Path(__file__).parents[2] / "sanawm_jax" / "assets"
LIMITS = {"small_world": 40e6}  # bytes


@pytest.mark.parametrize("name", LIMITS)
def test_all_weights_together(name: str) -> None:
    files = list((ASSETS / name).rglob("*.safetensors"))
    assert len(files) >= 3
    assert sum(file.stat().st_size for file in files) <= LIMITS[name]


def test_the_reference_loads_the_folder_and_samples_the_same() -> None:
    defaults = get_config()
    image = Image.open(defaults.image).convert("RGB")
    options = {"action": "wl-16", "num_frames": 17, "height": 128, "width": 128}
    noise = torch.randn(1, 48, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    intrinsics = [float(x) for x in defaults.intrinsics.split(",")]

    pipeline = SanaWMPipeline.from_pretrained(ASSETS / "small_world").to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with float32_attention():
        expected = pipeline(
            image,
            defaults.prompt,
            intrinsics=intrinsics,
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
    model = SanaWM.from_pretrained("small_world", dtype="float32")
    ours = model(
        image,
        defaults.prompt,
        intrinsics=np.array(intrinsics),
        action_mapping="diffusers",
        steps=2,
        cfg_scale=1.0,
        latents=noise.numpy(),
        progress=False,
        **options,
    )
    assert ours.frames is not None
    assert relative(ours.latents, expected.latent) <= 1e-3
    assert np.abs(ours.frames - expected.frames).max() <= 2e-3
    # two steps are a blur of the scene, but of this scene: noise would be far from the image
    first = np.asarray(image, np.float32) / 255
    assert np.square(ours.frames[0] - first).mean() == pytest.approx(0, abs=2e-3)
