"""A folder of random weights runs through `sample.py`, in both layouts, with the refiner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

from sanawm_jax.checkpoints.files import SafetensorsFolder
from sanawm_jax.checkpoints.random_weights import dit_specs, random_tensor, write_random
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.checkpoints.writer import write_folder
from sanawm_jax.media.video_reader import read_mp4
from sanawm_jax.runtime.errors import InputError
from tests.sample_tiny import sample

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("layout", ["diffusers", "upstream"])
def test_the_folder_makes_a_refined_video(layout: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sanawm_jax.weights.random_init", "--tiny", "--part=all"]
    command += [f"--layout={layout}", f"--out={tmp_path / 'w'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = done.stdout.splitlines()
    Image.new("RGB", (64, 64), (200, 30, 30)).save(tmp_path / "image.png")
    latents = tmp_path / "latents.npy"
    video = sample(
        weights=folders[0],
        refiner_weights=folders[-1],
        image=str(tmp_path / "image.png"),
        prompt="a room",
        action="w-24",
        num_frames=25,
        save_latents=str(latents),
        output_dir=str(tmp_path / "out"),
    )
    assert read_mp4(video).shape == (24, 64, 64, 3)  # the sink's frame is left out
    assert np.isfinite(np.load(latents)).all()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "exists already" in again.stderr
    assert len(again.stderr.strip().splitlines()) == 1


def test_shards_have_an_index_as_published(tmp_path: Path) -> None:
    specs = dit_specs(TINY.dit)
    write_folder(
        tmp_path, specs, lambda name: random_tensor(name, specs[name], 3), max_bytes=100_000
    )
    index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2 and set(index["weight_map"].values()) == {f.name for f in shards}
    source = SafetensorsFolder(tmp_path)
    assert set(source.keys()) == specs.keys()
    total = 0
    for name, (shape, dtype) in specs.items():
        value = source.read(name)
        assert (value.shape, value.dtype) == (shape, dtype)
        np.testing.assert_array_equal(value, random_tensor(name, specs[name], 3))
        total += value.nbytes
    assert index["metadata"]["total_size"] == total
    with safe_open(shards[0], "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sanawm_jax.checkpoints.random_weights._write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_random(tmp_path / "w", sizes=TINY)
    assert not list(tmp_path.iterdir())
    (tmp_path / "w").write_text("")
    with pytest.raises(InputError, match="exists already"):
        write_random(tmp_path / "w", sizes=TINY)
