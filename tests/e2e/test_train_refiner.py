"""train.py on the refiner: pairs, base model, adapters, resuming, sampling with the results."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from sanawm_jax.checkpoints.export import export_refiner, export_transformer, export_vae
from sanawm_jax.checkpoints.layouts import write_index
from sanawm_jax.checkpoints.refiner_folder import RefinerFolder
from sanawm_jax.core.params import init, leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.refine import LTX2Refiner, RefineOptions
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.small_world.clip import make_clips
from sanawm_jax.small_world.text_encoder import make_small_text_encoder
from sanawm_jax.training.engine.loop import train
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoVAE
from tests.e2e.tiny_config import get_config

ROOT = Path(__file__).parents[2]
CHANNELS = 8


def make_stage1(folder: Path) -> Path:
    """A random stage-1 folder with eight channels and 8x8 pixels per latent."""
    tiny, dit = get_config("vae"), get_config("dit")
    vae = VAEConfig(**tiny.vae.to_dict())
    export_vae(vae, init(VideoVAE, vae, jax.random.key(0)), folder / "vae", "bfloat16")
    captions = [clip["caption"] for clip in make_clips(range(4), 9, 32, 32)]
    make_small_text_encoder(captions, folder, hidden=64)
    model = DiTConfig(
        in_channels=CHANNELS,
        caption_channels=64,
        chunk_plucker_channels=48,
        **dit.dit.to_dict(),
    )
    export_transformer(
        model, init(DiT, model, jax.random.key(1)), folder / "transformer", "bfloat16"
    )
    write_index(folder, Schedule(shift=3.0))
    return folder


@pytest.fixture(scope="module")
def stage1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_stage1(tmp_path_factory.mktemp("stage1"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, stage1: Path) -> Path:
    """The workdir of a base trained by the command line."""
    workdir = tmp_path_factory.mktemp("base")
    done = subprocess.run(
        [
            *(sys.executable, "train.py", "--config=tests/e2e/tiny_config.py:refiner"),
            *(f"--workdir={workdir}", f"--config.stage1_dir={stage1}"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{workdir}/export"
    return workdir


def config_of(stage1: Path, base: Path, **over: object) -> ConfigDict:
    config = get_config("refiner")
    config.update(stage1_dir=str(stage1), cache_dir=str(base / "latents"), **over)
    return config


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def refine(folder: Path) -> np.ndarray:
    latents = np.random.default_rng(0).standard_normal((1, CHANNELS, 5, 4, 4)).astype(np.float32)
    refiner = LTX2Refiner.from_pretrained(folder, dtype="float32", options=RefineOptions())
    return refiner(latents, "a green house", progress=False)


def test_base_run(base: Path) -> None:
    assert [r["step"] for r in rows(base)] == [1, 2, 3, 4]
    assert all(np.isfinite(r["loss"]) for r in rows(base))
    pairs, truth = (np.load(base / "latents" / f"{n}.npy") for n in ("stage1", "latents"))
    assert pairs.shape == truth.shape == (4, 5, 4, 4, CHANNELS)
    np.testing.assert_array_equal(pairs[:, 0], truth[:, 0])  # the given image
    assert np.abs(pairs[:, 1:].astype(np.float32) - truth[:, 1:]).mean() > 0.1


def test_the_export_is_a_refiner_that_sample_py_takes(
    base: Path, stage1: Path, tmp_path: Path
) -> None:
    RefinerFolder(base / "export").check()
    latents = tmp_path / "stage1.npy"
    np.save(latents, np.random.default_rng(0).standard_normal((1, CHANNELS, 5, 4, 4), np.float32))
    done = subprocess.run(
        [
            *(sys.executable, "sample.py", "--weights", str(stage1)),
            *("--refiner_weights", str(base / "export"), "--stage1_latents", str(latents)),
            *("--prompt", "a green house", "--latents_only", "--dtype", "float32"),
            *("--save_latents", str(tmp_path / "out.npy"), "--output_dir", str(tmp_path)),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    refined = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(refined[:, :, 0], np.load(latents)[:, :, 0])
    assert np.abs(refined - np.load(latents))[:, :, 1:].mean() > 0.05


def test_resume_is_bit_equal_and_keeps_the_pairs(stage1: Path, base: Path, tmp_path: Path) -> None:
    stamp = (base / "latents" / "stage1.npy").stat().st_mtime_ns
    config = config_of(stage1, base, steps=2)
    train(config, tmp_path)
    config.steps = 4
    train(config, tmp_path)
    # The random kind of history depends on the step, whose number a resumed run continues.
    assert [r["loss"] for r in rows(tmp_path)] == [r["loss"] for r in rows(base)]
    weights = "export/transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (base / weights).read_bytes()
    assert (base / "latents" / "stage1.npy").stat().st_mtime_ns == stamp


def test_lora_run(stage1: Path, base: Path, tmp_path: Path) -> None:
    config = config_of(stage1, base, base_dir=str(base / "export"))
    config.lora.rank = 4
    config.optimizer.learning_rate = 1e-2
    state = train(config, tmp_path)
    paths = {path for path, _ in leaves(state.model.params)}
    assert paths == {f"blocks.attn.{p}.lora_{x}" for p in "qkv" for x in "ab"}
    assert {path for path, _ in leaves(state.model.average)} == paths
    # first and second moment of the adapters alone
    moments = [a for a in jax.tree.leaves(state.model.moments) if a.ndim > 1]
    assert len(moments) == 2 * len(paths)

    files = sorted(p.name for p in (tmp_path / "export").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    folder = RefinerFolder(tmp_path / "export")
    lora, adapters = folder.load_lora()
    assert (lora.rank, lora.scale) == (4, 1.0)
    ema = jax.tree.map(lambda a: np.asarray(a.astype("bfloat16"), np.float32), state.model.average)
    jax.tree.map(np.testing.assert_array_equal, adapters, ema)
    plain, adapted = refine(base / "export"), refine(tmp_path / "export")
    assert np.abs(plain - adapted).max() > 1e-4


def test_whole_clips_with_the_other_levels(stage1: Path, base: Path, tmp_path: Path) -> None:
    """Training of all weights on whole clips, which starts from a base model."""
    config = config_of(stage1, base, base_dir=str(base / "export"), steps=2, save_every=2)
    config.update(objective="clip", levels="shifted_logit_normal", stage1_noise=(0.0, 0.2))
    state = train(config, tmp_path)
    assert "blocks.ffn.up.kernel" in dict(leaves(state.model.params))
    RefinerFolder(tmp_path / "export").check()


BAD = {
    "stage1": (dict(stage1_dir=""), "stage1_dir is empty"),
    "base": (dict(rank=4), "base_dir is empty; give the refiner folder"),
    "objective": (dict(objective="frames"), "objective='frames'; use one of clip, stream"),
    "levels": (dict(levels="normal"), "levels='normal'; use one of uniform"),
    "window": (dict(window=3), "no chunk with a history of 3"),
    "sink": (dict(objective="clip", sink_frames=5), "sink_frames=5 must leave some of the 5"),
    "noise": (dict(stage1_noise=(0.5, 0.1)), r"stage1_noise=\(0.5, 0.1\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_are_one_line(case: str, stage1: Path, base: Path, tmp_path: Path) -> None:
    change, words = BAD[case]
    config = config_of(stage1, base)
    config.lora.rank = change.get("rank", 0)
    config.stream.window = change.get("window", 2)
    config.update({k: v for k, v in change.items() if k not in ("rank", "window")})
    with pytest.raises(InputError, match=words) as caught:
        train(config, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_base_of_other_latents_is_one_line(stage1: Path, base: Path, tmp_path: Path) -> None:
    model = RefinerFolder(base / "export").config
    model = dataclasses.replace(model, in_channels=4, out_channels=4)
    other = tmp_path / "other"
    shutil.copytree(base / "export", other)
    export_refiner(model, init(Refiner, model, jax.random.key(0)), other / "transformer", "float32")
    with pytest.raises(InputError, match="latents of 4 channels, stage 1's have 8"):
        train(config_of(stage1, base, base_dir=str(other)), tmp_path / "run")
