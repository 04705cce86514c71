"""A run reads only the parts that it needs, so other parts may be broken."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from sanawm_jax.media.video_reader import read_mp4
from sanawm_jax.runtime.errors import InputError
from tests.parity.stage1_reference import make_folder
from tests.sample_tiny import sample

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    make_folder(folder)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(folder / "image.png")
    return folder


def without(whole: Path, target: Path, prefix: str, *broken: str) -> str:
    """Copies a folder without the VAE's tensors of `prefix`, and damages the `broken` parts."""
    shutil.copytree(whole / "model", target)
    file = target / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    kept = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, file)
    for part in broken:
        for weights in (target / part).glob("*.safetensors"):
            weights.write_bytes(b"broken")
    return str(target)


def latents_file(folder: Path) -> str:
    latents = np.random.default_rng(0).standard_normal((1, 8, 2, 2, 2)).astype(np.float32)
    np.save(folder / "latents.npy", latents)
    return str(folder / "latents.npy")


def test_copying_latents_needs_no_weights(tmp_path: Path) -> None:
    command = [sys.executable, "sample.py", f"--stage1_latents={latents_file(tmp_path)}"]
    command += ["--latents_only", f"--save_latents={tmp_path / 'out.npy'}", "--weights=/nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), np.load(tmp_path / "latents.npy"))


def test_decoding_latents_needs_the_decoder_alone(whole: Path, tmp_path: Path) -> None:
    weights = without(whole, tmp_path / "w", "encoder.", "transformer", "text_encoder")
    given = {"output_dir": str(tmp_path), "stage1_latents": latents_file(tmp_path)}
    frames = tmp_path / "frames.npy"
    video = sample(**given, weights=weights, save_frames=str(frames))
    assert read_mp4(video).shape == np.load(frames).shape == (9, 64, 64, 3)
    with pytest.raises(InputError, match="no weights"):
        sample(**given)
    with pytest.raises(InputError, match=r"vae.*missing.*decoder\."):
        sample(**given, weights=without(whole, tmp_path / "x", "decoder."))


def test_latents_of_an_image_need_no_decoder(whole: Path, tmp_path: Path) -> None:
    weights = without(whole, tmp_path / "w", "decoder.")
    given = {"image": str(whole / "image.png"), "prompt": "a red room"}
    given |= {"action": "w-8", "output_dir": str(tmp_path / "out")}
    given["save_latents"] = str(tmp_path / "latents.npy")
    path = sample(**given, weights=weights, latents_only=True)
    assert np.load(path).shape == (1, 8, 2, 2, 2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"vae.*missing.*decoder\."):
        sample(**given, weights=weights)
    with pytest.raises(InputError, match=r"vae.*missing.*encoder\."):
        broken = without(whole, tmp_path / "x", "encoder.")
        sample(**given, weights=broken, latents_only=True)
