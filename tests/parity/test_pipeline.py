"""The whole of stage 1 through `sample.py` in a subprocess against diffusers' `SanaWMPipeline`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    SanaWMPipeline,
    SanaWMTransformer3DModel,
)
from PIL import Image

from sanawm_jax.diffusion.euler import Schedule
from tests.parity.compare import float32_attention, randomise, relative

ROOT = Path(__file__).parents[2]
STEPS, HEIGHT, WIDTH, FRAMES = 6, 64, 96, 17
ACTION = "w-6,dj-4,ik-3,s-5"
INTRINSICS = [90.0, 88.0, 61.0, 40.0]


def make_folder(folder: Path) -> None:
    """A tiny pipeline with random weights, saved by the reference's own classes."""
    from transformers import Gemma2Model, GemmaTokenizer

    from sanawm_jax.text.small import make_small_text_encoder

    config = make_small_text_encoder(["a red room", "a green street"], folder / "text", hidden=64)
    vae = AutoencoderKLLTX2Video(
        latent_channels=8,
        block_out_channels=(8, 16, 16, 16),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    vae = randomise(vae, 1)
    vae.latents_mean.copy_(torch.linspace(-0.3, 0.4, 8))
    vae.latents_std.copy_(torch.linspace(0.6, 1.5, 8))
    SanaWMPipeline(
        tokenizer=GemmaTokenizer.from_pretrained(folder / "text" / "tokenizer"),
        text_encoder=Gemma2Model.from_pretrained(
            folder / "text" / "text_encoder", dtype=torch.float32
        ),
        vae=vae,
        transformer=randomise(
            SanaWMTransformer3DModel(
                num_layers=4,
                hidden_size=48,
                num_attention_heads=2,
                linear_head_dim=24,
                in_channels=8,
                caption_channels=config.hidden_size,
            ),
            2,
            scale=0.5,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=9.8),
    ).save_pretrained(folder / "model")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    make_folder(folder)
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 255, (10, 15, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((120, 80), Image.Resampling.BICUBIC).save(folder / "image.png")
    return folder


def test_sample_py_equals_the_reference(made: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 8, (FRAMES - 1) // 8 + 1, HEIGHT // 32, WIDTH // 32, generator=generator)
    np.save(made / "noise.npy", noise.numpy())
    command = [
        *(sys.executable, str(ROOT / "sample.py")),
        *("--weights", str(made / "model"), "--image", str(made / "image.png")),
        *("--prompt", "a red room with a window", "--negative_prompt", "dark"),
        *("--action", ACTION, "--action_mapping", "diffusers"),
        *("--intrinsics", ",".join(map(str, INTRINSICS))),
        *("--num_frames", str(FRAMES), f"--height={HEIGHT}", f"--width={WIDTH}"),
        *(f"--step={STEPS}", "--cfg_scale=4", "--dtype=float32"),
        *("--latents", str(made / "noise.npy")),
        *("--save_latents", str(made / "latents.npy"), "--save_frames", str(made / "frames.npy")),
        *("--output_dir", str(made / "out"), "--name", "tiny", "--no_refiner"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    video = Path(done.stdout.strip().splitlines()[-1])
    assert video == made / "out" / "tiny_generated.mp4" and video.stat().st_size > 0

    pipeline = SanaWMPipeline.from_pretrained(made / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with float32_attention():
        output = pipeline(
            Image.open(made / "image.png").convert("RGB"),
            "a red room with a window",
            negative_prompt="dark",
            action=ACTION,
            intrinsics=INTRINSICS,
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
        )
    latents, frames = np.load(made / "latents.npy"), np.load(made / "frames.npy")
    assert relative(latents, output.latent) <= 1e-3
    assert frames.shape == output.frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert np.abs(frames - output.frames).max() <= 2e-3
    assert frames.std() > 0.02  # a constant picture would prove nothing


@pytest.mark.parametrize("shift", [1.0, 3.0, 9.8])
@pytest.mark.parametrize("steps", [1, 6, 60])
def test_schedule(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    np.testing.assert_array_equal(Schedule(shift=shift).sigmas(steps), scheduler.sigmas.numpy())


def test_both_stages_in_one_command(made: Path) -> None:
    """Stage 1 hands its latents over in memory; the video starts after the refiner's sink."""
    from tests.parity.refiner_reference import load_refiner, make_refiner

    steps, prompt = 2, "a green street at dusk"
    folder = make_refiner(made / "refined", in_channels=8, out_channels=8)
    grid = (HEIGHT // 32, WIDTH // 32)
    generator = torch.Generator().manual_seed(0)
    np.save(made / "first.npy", torch.randn(1, 8, 3, *grid, generator=generator).numpy())
    noise = torch.randn(1, 8, 2, *grid, generator=generator)
    np.save(made / "second.npy", noise.numpy())
    common = [
        *("--weights", str(made / "model"), "--prompt", prompt, "--dtype=float32"),
        *("--output_dir", str(made / "out")),
    ]
    stage1 = [
        *("--image", str(made / "image.png"), "--action", ACTION, "--action_mapping", "diffusers"),
        *("--intrinsics", ",".join(map(str, INTRINSICS)), "--num_frames", str(FRAMES)),
        *(f"--height={HEIGHT}", f"--width={WIDTH}", f"--step={steps}", "--cfg_scale=1"),
        *("--latents", str(made / "first.npy")),
    ]
    refine = [
        *("--refiner_weights", str(folder), "--refiner_latents", str(made / "second.npy")),
        *("--save_frames", str(made / "refined.npy"), "--name", "refined"),
        *("--save_latents", str(made / "refined_latents.npy")),
    ]
    command = [sys.executable, str(ROOT / "sample.py"), *common, *stage1, *refine]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    pipeline = SanaWMPipeline.from_pretrained(made / "model", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    refiner = load_refiner(folder)
    refiner.vae = pipeline.vae
    with float32_attention(), pytest.MonkeyPatch.context() as patch:
        latents = pipeline(
            Image.open(made / "image.png").convert("RGB"),
            prompt,
            action=ACTION,
            intrinsics=INTRINSICS,
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=steps,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).latent
        patch.setattr("diffusers.pipelines.sana_wm.refiner.randn_tensor", lambda *a, **k: noise)
        frames = refiner(latents, prompt, fps=16.0)
    ours = np.load(made / "refined.npy")
    assert ours.shape == frames.shape == (FRAMES - 1, HEIGHT, WIDTH, 3)
    assert np.abs(ours - frames).max() <= 2e-3
    refined = np.load(made / "refined_latents.npy")
    assert relative(refined[:, :, :1], latents[:, :, :1]) <= 1e-4  # the sink, as stage 1 made it
    assert relative(refined[:, :, 1:], latents[:, :, 1:]) > 0.1
