"""The shipped small world: diffusers' result with the same folder, and the folder's size."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaWMPipeline
from PIL import Image

from configs.sample_small_world import get_config
from sanawm_jax.refiner.sampler import blocks
from sanawm_jax.sampling.generate import SanaWM
from sanawm_jax.sampling.refine import LTX2Refiner
from tests.parity.compare import float32_attention, relative
from tests.parity.refiner_reference import load_refiner

ASSETS = Path(__file__).parents[2] / "sanawm_jax/small_world/assets"
LIMITS = {"small_world": 40e6, "small_world_refiner": 15e6}  # bytes


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


def test_the_reference_loads_the_refiner_and_refines_the_same() -> None:
    """Refines latents of a pan over the shipped image, in two blocks of frames."""
    defaults = get_config()
    image = np.asarray(Image.open(defaults.image).convert("RGB"), np.float32) / 127.5 - 1
    pan = np.stack([np.roll(image, -i, axis=1) for i in range(defaults.num_frames)])
    encoded = SanaWM.from_pretrained("small_world", dtype="float32").encode(jnp.asarray(pan[None]))
    latents = np.asarray(encoded).transpose(0, 4, 1, 2, 3)  # B C F h w
    # the reference draws block after block
    generator = torch.Generator().manual_seed(0)
    noise = [
        torch.randn(1, 48, last - first, 16, 16, generator=generator)
        for first, last in blocks(latents.shape[2], 1, 3)
    ]
    assert len(noise) == 2

    refiner = LTX2Refiner.from_pretrained(defaults.refiner_weights, dtype="float32")
    assert refiner.folder.lora is None  # merged: diffusers needs nothing else
    expected = load_refiner(ASSETS / "small_world_refiner")(
        torch.from_numpy(latents.copy()),
        defaults.prompt,
        fps=defaults.fps,
        sigmas=refiner.folder.sigmas,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    ours = refiner(
        latents,
        defaults.prompt,
        fps=defaults.fps,
        noise=torch.cat(noise, 2).numpy(),
        progress=False,
    )
    assert relative(ours, expected) <= 1e-3
    assert relative(ours, latents) > 0.05  # it did something
