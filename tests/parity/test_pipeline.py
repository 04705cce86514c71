"""Stage 1 as a whole: `sample.py` in a subprocess against diffusers' `SanaWMPipeline`."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaWMPipeline
from PIL import Image

from sanawm_jax.sampling.generate import SanaWM
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.vae.tiling import Tiling
from tests.environment import users_environment
from tests.parity.compare import float32_attention, relative
from tests.parity.stage1_reference import make_folder

ROOT = Path(__file__).parents[2]
STEPS, HEIGHT, WIDTH, FRAMES = 6, 64, 96, 17
ACTION = "w-6,dj-4,ik-3,s-5"
INTRINSICS = [90.0, 88.0, 61.0, 40.0]


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
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=users_environment()
    )
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


def test_tiled_decode(made: Path) -> None:
    """Windows of time and tiles of space, blended as the reference blends them."""
    sizes = {
        "tile_sample_min_height": 96,
        "tile_sample_min_width": 128,
        "tile_sample_min_num_frames": 16,
        "tile_sample_stride_height": 64,
        "tile_sample_stride_width": 64,
        "tile_sample_stride_num_frames": 8,
    }
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, 8, 5, 6, 6, generator=generator)
    pipeline = SanaWMPipeline.from_pretrained(made / "model", torch_dtype=torch.float32)
    with torch.no_grad():
        plain = pipeline._decode_latents(latents)
        pipeline.vae.enable_tiling(**sizes)
        pipeline.vae.use_framewise_decoding = True
        expected = pipeline._decode_latents(latents)
    expected = np.clip(expected[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5, 0, 1)

    ours = latents.permute(0, 2, 3, 4, 1).numpy()
    open_model = functools.partial(SanaWM.from_pretrained, made / "model", dtype="float32")
    model = open_model(tiling=Tiling(use_framewise=True, **sizes))
    windows = list(model.decode_stream(ours))
    assert [len(w) for w in windows] == [9, 8, 8, 8]
    assert all(w.dtype == np.float32 for w in windows)
    assert relative(np.concatenate(windows), expected) <= 1e-5
    np.testing.assert_array_equal(model.decode(ours), np.concatenate(windows))
    # without tiles the result is another, so the comparison above proves something
    whole = open_model(tiling="none").decode(ours)
    plain = np.clip(plain[0].permute(1, 2, 3, 0).numpy() / 2 + 0.5, 0, 1)
    assert relative(whole, plain) <= 1e-5
    assert relative(whole, expected) > 1e-3


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
