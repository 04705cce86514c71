"""train.py on the small world's tasks: training, resuming, exported folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from sanawm_jax.checkpoints.folder import Stage1Folder
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.engine.loop import train
from sanawm_jax.vae.keys import load_vae
from tests.e2e.tiny_config import get_config

_ROOT = Path(__file__).parents[2]


def _rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def vae_dir(tmp_path_factory) -> Path:
    """A trained autoencoder, made by the command line."""
    workdir = tmp_path_factory.mktemp("vae")
    command = [sys.executable, "train.py", "--config=tests/e2e/tiny_config.py:vae"]
    result = subprocess.run(
        [*command, f"--workdir={workdir}", "--config.seed=3"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"{workdir}/export"
    return workdir


def test_vae_run(vae_dir):
    rows = _rows(vae_dir)
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert {"loss", "psnr", "kl", "grad_norm", "learning_rate", "seconds"} <= rows[0].keys()
    config, params = load_vae(vae_dir / "export" / "vae", dtype=np.float32)
    assert config.latent_channels == 8
    assert np.all(params["latents_std"] > 0) and np.any(params["latents_mean"] != 0)


def test_dit_run_resumes_bit_equal(vae_dir, tmp_path):
    config = get_config("dit")
    config.vae_dir = str(vae_dir / "export" / "vae")
    whole = train(config, tmp_path / "whole")
    weights = Stage1Folder(tmp_path / "whole" / "export")
    assert weights.dit_config().in_channels == 8
    assert weights.vae_config().latent_channels == 8
    weights.load_dit(np.float32)

    config.steps = 2
    train(config, tmp_path / "parts")
    # lines that a killed run wrote after its last checkpoint
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    stamp = (tmp_path / "parts" / "latents" / "latents.npy").stat().st_mtime_ns
    config.steps = 4
    parts = train(config, tmp_path / "parts")
    assert (tmp_path / "parts" / "latents" / "latents.npy").stat().st_mtime_ns == stamp

    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    rows = _rows(tmp_path / "parts")
    assert [r["step"] for r in rows] == [1, 2, 3, 4]
    assert [r["loss"] for r in rows] == [r["loss"] for r in _rows(tmp_path / "whole")]


def test_stops_by_the_clock_and_exports(vae_dir, tmp_path):
    config = get_config("dit")
    config.vae_dir = str(vae_dir / "export" / "vae")
    config.update(steps=100_000, save_every=1000, max_minutes=1e-4)
    state = train(config, tmp_path)
    assert 0 < int(state.step) < 1000
    assert (tmp_path / "checkpoints" / str(int(state.step))).is_dir()
    assert (tmp_path / "export" / "model_index.json").is_file()


def test_missing_vae_is_one_line(tmp_path):
    with pytest.raises(InputError, match="vae_dir"):
        train(get_config("dit"), tmp_path)
