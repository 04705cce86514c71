"""The recipes of distillation as a user runs them, on a tiny world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import distill
from sanawm_jax.checkpoints.export import export_transformer
from sanawm_jax.checkpoints.initial_weights import open_trained
from sanawm_jax.checkpoints.layouts import write_index
from sanawm_jax.data.ode_pairs import main as make_pairs
from sanawm_jax.data.ode_store import OdePairs, Shard
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.training.engine.loop import train
from sanawm_jax.training.recipes.distill import random_network
from sanawm_jax.training.recipes.latent_source import synthetic_latents


def tiny(stage: str, folder: Path) -> ConfigDict:
    """Returns the configuration of a stage at the smoke test's sizes, on the files of `folder`."""
    smoke, config = distill.get_config("smoke"), distill.get_config(stage)
    for name in ("dit", "synthetic", "batch_size", "steps_per_call", "dtype", "export_dtype"):
        config[name] = smoke[name]
    config.update(steps=2, save_every=1, use_camera=False, curves=False, steps_per_call=1)
    config.update(numerics="", frames=0, remat="none")
    config.mesh.update(data=1, context=1)
    config.window.update(size=3, cached=2, sink=True)
    config.teacher = str(folder / "teacher")
    if config.data.format == "npy":
        config.data_dir = str(folder / "latents")
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents and a teacher, whose folder is that of a training run."""
    folder = tmp_path_factory.mktemp("tiny")
    smoke = distill.get_config("smoke")
    model = DiTConfig(**smoke.dit.to_dict())
    sizes = {"channels": model.in_channels, "text": model.caption_channels}
    (folder / "latents").mkdir()
    for name, value in synthetic_latents(**smoke.synthetic.to_dict(), **sizes).items():
        np.save(folder / "latents" / f"{name}.npy", value)
    export = folder / "teacher" / "export" / "transformer"
    export_transformer(model, random_network(model, 1), export, "float32")
    for part in ("vae", "text_encoder", "tokenizer"):
        (export.parent / part).mkdir()
    write_index(export.parent, Schedule(shift=3.0))
    return folder


def metrics(workdir: Path) -> list[dict[str, Any]]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["smoke", "consistency", "self_forcing_to_truth"])
def test_a_stage_resumes_bit_equal(stage: str, folder: Path, tmp_path: Path) -> None:
    config = tiny(stage, folder)
    if stage == "self_forcing_to_truth":
        config.held_out.update(clips=4, every=1, batch=2)
    whole = train(config, tmp_path / "whole")
    config.steps = 1
    train(config, tmp_path / "parts")
    config.steps = 2
    parts = train(config, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, parts, whole)
    rows = metrics(tmp_path / "whole")
    assert metrics(tmp_path / "parts") == rows
    assert all(np.isfinite(row["loss"]) for row in rows)
    if stage == "smoke":
        assert rows[0]["generator_loss"] > 0 and rows[1]["generator_loss"] is None
        assert rows[1]["critic_loss"] > 0

    if stage == "self_forcing_to_truth":
        lines = (tmp_path / "parts" / "held_out.jsonl").read_text()
        assert lines == (tmp_path / "whole" / "held_out.jsonl").read_text()
        assert [json.loads(line)["step"] for line in lines.splitlines()] == [1, 2]
        assert open_trained(tmp_path / "whole" / "best").stream_options()

    # the export is a network of the same sizes, and says how it is sampled
    exported = open_trained(tmp_path / "whole")
    assert exported.dit_config() == open_trained(config.teacher).dit_config()
    steps = tuple(map(float, exported.stream_options().pop("denoising_step_list").split(",")))
    assert steps == tuple(config.denoising_step_list)
    assert exported.stream_options()["num_cached_blocks"] == 2
    assert exported.stream_options()["num_frame_per_block"] == 3


@pytest.mark.slow
def test_pairs_and_regression_on_them(folder: Path, tmp_path: Path) -> None:
    store, levels = tmp_path / "pairs", (1000.0, 967.0, 908.0, 764.0, 0.0)
    command = ["--teacher", str(folder / "teacher"), "--latents", str(folder / "latents")]
    command += ["--out", str(store), "--solver_steps", "4", "--dtype", "float32", "--shard", "4"]
    command += ["--batch", "2", "--chunk_size", "3", "--solver", "heun", "--guidance", "2"]
    make_pairs([*command, "--clips", "3"])
    shard = Shard(store / "shard_00000")
    assert shard.rows == 3
    before = shard.read("latents", 1)
    shard.close()
    make_pairs([*command, "--clips", "6"])  # goes on
    pairs = OdePairs(store, levels)
    assert len(pairs) == 6
    np.testing.assert_array_equal(np.moveaxis(pairs.row(1)["trajectory"], -1, 2), before)
    latents = np.load(folder / "latents" / "latents.npy")
    states = pairs.row(4)["trajectory"].astype(np.float32)
    np.testing.assert_allclose(states[:, 0], np.stack([latents[4, 0]] * 5), atol=2e-3)
    assert np.std(states[0, 1:]) == pytest.approx(1.0, abs=0.1)
    assert np.abs(states[-1] - states[0]).max() > 0.1
    pairs.close()

    config = tiny("ode_t43", folder)
    config.update(data_dir=str(store), batch_size=2)
    train(config, tmp_path / "run")
    assert all(row["ode_loss"] > 0 for row in metrics(tmp_path / "run"))


@pytest.mark.slow
def test_adapters_of_student_and_critic(folder: Path, tmp_path: Path) -> None:
    config = tiny("smoke", folder)
    config.student.lora.rank = config.critic.lora.rank = 2
    state = train(config, tmp_path)
    sizes = {
        name: sum(a.size for a in jax.tree.leaves(one.params))
        for name, one in state.learners.items()
    }
    model = open_trained(config.teacher).dit_config()
    whole = sum(a.size for a in jax.tree.leaves(random_network(model, 0)))
    assert max(sizes.values()) < whole / 10
    open_trained(tmp_path).check("transformer")  # adapters are merged


def broken(folder: Path, tmp_path: Path, **changes: Any) -> str:
    config = tiny("smoke", folder)
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError) as caught:
        train(config, tmp_path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input_is_one_line(folder: Path, tmp_path: Path) -> None:
    def line(**changes: Any) -> str:
        return broken(folder, tmp_path, **changes)

    assert "the last entry is 0" in line(denoising_step_list=(1000, 500))
    assert "use --config.frames=9" in line(**{"window.size": 2, "window.first": 3, "frames": 10})
    assert "frames=11: clips have 10" in line(frames=11)
    assert "do not fit clips of 10" in line(**{"window.size": 12})
    assert "held_out.clips=16 leaves no clip" in line(**{"held_out.clips": 16})
    assert "student_every=0" in line(student_every=0)
    other = DiTConfig(**{**distill.get_config("smoke").dit.to_dict(), "hidden_size": 16})
    wide = tmp_path / "other" / "transformer"
    export_transformer(other, random_network(other, 0), wide, "float32")
    assert "does not fit the teacher" in line(**{"student.weights": str(tmp_path / "other")})
    assert "is neither a folder nor a hub name" in line(teacher="nowhere")
    config = tiny("consistency", folder)
    config.ema_decay = 0.0
    with pytest.raises(InputError, match="needs an average"):
        train(config, tmp_path / "run")
    config = tiny("self_forcing_to_truth", folder)
    config.truth.share_last = 2.0
    with pytest.raises(InputError, match=r"truth\.share_last=2\.0 is out of range"):
        train(config, tmp_path / "run")
