"""The autoencoder's trainer on clips that it renders itself, in miniature."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world import train_vae
from sanawm_jax.small_world.compact import load_compact, save_compact
from sanawm_jax.vae.keys import load_vae


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("vae")
    arguments = "--minutes 60 --steps 4 --steps_per_call 2 --clips 2 --pool_frames 9 --held_out 2"
    arguments += " --render 2 --batch 2 --frames 1 9 --channels 8 --width 16 --size 24 32"
    train_vae.main(["--out", str(out), *arguments.split()])
    return out, arguments


def test_a_run_leaves_weights_report_and_sheet(run):
    out, _ = run
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 4 and report["clips"] == 2
    assert 3 < report["psnr"] < 60
    assert report["gradient_ratio"] > 0
    assert (out / "held_out.jpg").stat().st_size > 0
    config, params = load_vae(out / "vae", dtype=np.float32)
    assert config.decoder_causal and config.latent_channels == 8
    assert np.asarray(params["latents_std"]).min() > 0


@pytest.mark.slow
def test_a_run_goes_on_from_its_compact_state(run, tmp_path):
    out, arguments = run
    resumed = ["--out", str(tmp_path), *arguments.split(), "--resume", str(out / "state")]
    train_vae.main(resumed)
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 8


def test_compact_state_keeps_weights_and_rounds_moments(tmp_path):
    rng = np.random.default_rng(0)
    params = {"a": rng.normal(size=(300, 7)).astype(np.float32), "b": np.float32([1.5])}
    state = {
        "params": params,
        "average": jax.tree.map(lambda a: a * np.float32(1.01), params),
        "moments": [rng.normal(size=(40, 3)).astype(np.float32), np.int32(9)],
        "step": np.int32(12),
    }
    save_compact(tmp_path, state, part_bytes=1 << 11)  # arrays are cut across files
    assert len(list(tmp_path.glob("state_*.safetensors"))) > 3
    assert all(f.stat().st_size < (1 << 11) + 600 for f in tmp_path.glob("state_*"))
    back = jax.tree.map(np.asarray, load_compact(tmp_path, state))
    np.testing.assert_array_equal(back["params"]["a"], state["params"]["a"])
    np.testing.assert_array_equal(back["params"]["b"], state["params"]["b"])
    np.testing.assert_allclose(back["average"]["a"], state["average"]["a"], rtol=1e-3)
    np.testing.assert_allclose(back["moments"][0], state["moments"][0], rtol=0.07, atol=1e-4)
    assert back["moments"][1] == 9 and back["step"] == 12
    with pytest.raises(InputError, match="no state of this network"):
        load_compact(tmp_path, {**state, "step": np.zeros(3, np.int32)})


def test_sharpness_loss_sees_blur_but_not_where_an_edge_is():
    rng = np.random.default_rng(0)
    video = np.repeat(np.repeat(rng.uniform(-1, 1, (1, 2, 16, 16, 3)), 2, 2), 2, 3)
    blurred = 0.5 * (video + np.roll(video, 1, 3))
    moved = np.roll(video, 4, 3)
    blur, shift = (float(train_vae.sharpness_loss(x, video)) for x in (blurred, moved))
    assert float(train_vae.sharpness_loss(video, video)) == 0
    assert blur > 5 * shift


@pytest.mark.slow
def test_a_run_begins_with_the_weights_of_a_folder(run, tmp_path):
    out, arguments = run
    train_vae.main(["--out", str(tmp_path), *arguments.split(), "--init", str(out / "vae")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 4


def test_a_state_is_exported_without_training(run, tmp_path):
    out, arguments = run
    exported = ["--out", str(tmp_path), *arguments.split(), "--export", str(out / "state")]
    train_vae.main(exported)
    was, now = (load_vae(folder / "vae", dtype=np.float32)[1] for folder in (out, tmp_path))
    assert not (tmp_path / "report.json").exists()
    for a, b in zip(jax.tree.leaves(was), jax.tree.leaves(now), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-6)  # a step of bfloat16


def test_options_that_do_not_go_together_are_one_line(run, tmp_path, capsys):
    _, arguments = run
    with pytest.raises(SystemExit) as stop:
        train_vae.main(["--out", str(tmp_path), *arguments.split(), "--sharpness", "1"])
    assert stop.value.code == 2
    assert "same number of values" in capsys.readouterr().err
