"""Stage-1 runs: published numbers, dry run, a folder of latents, initial weights."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import (
    small_world,
    smoke,
    stage1_bidirectional,
    stage1_chunk_causal,
    stage1_example_set,
)
from sanawm_jax.checkpoints.folder import Stage1Folder
from sanawm_jax.checkpoints.layouts import write_index
from sanawm_jax.core.params import leaves
from sanawm_jax.data.zip_index import Selection
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.training.engine.loop import train
from sanawm_jax.training.engine.step import accumulated_gradients
from sanawm_jax.training.objectives.stage1 import Stage1Objective
from sanawm_jax.training.recipes.dry_run import describe
from sanawm_jax.training.recipes.latent_source import open_latents, synthetic_latents
from sanawm_jax.training.recipes.stage1 import dit_config

_ROOT = Path(__file__).parents[3]


def _tiny():
    config = smoke.get_config()
    config.dit.update(num_layers=2, softmax_every_n=2, hidden_size=32, num_attention_heads=2)
    config.synthetic.update(clips=4, latent_frames=5, height=2, width=2)
    config.update(batch_size=4, steps=1, save_every=1, ema_decay=0.0)
    return config


def _save(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)


def test_published_numbers():
    both, chunked = stage1_bidirectional.get_config(), stage1_chunk_causal.get_config()
    assert both.chunk_size == 0 and chunked.chunk_size == 3
    for config in (both, chunked):
        optim = config.optimizer
        assert (optim.learning_rate, optim.eps, optim.clip_norm) == (1e-5, 1e-10, 0.5)
        assert optim.betas == (0.9, 0.999) and optim.weight_decay == 0 == optim.warmup_steps
        assert (config.flow_shift, config.image_prob, config.seed) == (9.95, 0.9, 3407)
        assert config.chunk_mixture.to_dict() == {
            "same_t": 0.1,
            "incremental": 0.4,
            "last_chunk_anchor": 0.4,
            "teacher_forcing_clean": 0.1,
        }


def test_published_data():
    config = stage1_example_set.get_config()
    assert config.chunk_size == 3 and config.data.repeat == 16 and config.data.num_frames == 961
    assert dict((suffix, limits) for suffix, *limits in config.data.filters) == {
        "_vmafmotion": [0.5, 50],
        "_unimatch": [3, 80],
        "_dover": [0.25, 1],
        "_vlm_entity_filter": [0, 10],
        "_vlm_quality_filter": [0.5, 1.5],
    }
    Selection(filters=config.data.filters, captions=config.data.captions)


def test_dry_run():
    text = describe(stage1_chunk_causal.get_config())
    assert text.startswith("2,661,800,448 parameters")
    assert "fsdp 4 x context 2" in text and "40 chunk(s)" in text
    assert "0.0.attn.qkv.kernel                5x3x2240x6720        -, -, fsdp, tensor" in text
    lines = dict(line.strip().rsplit(None, 1) for line in text.splitlines()[3:9])
    # float32 masters over four ranks
    assert float(lines["parameters"]) == pytest.approx(2.6618 * 4 / 4 * 1e9 / 2**30, rel=0.01)
    assert "1 chunk(s)" in describe(stage1_bidirectional.get_config())
    with pytest.raises(InputError, match="this one is 'dit'"):
        describe(small_world.get_config())
    config = stage1_chunk_causal.get_config()
    config.mesh.update(fsdp=4, tensor=8)
    with pytest.raises(InputError, match=r"mesh\.tensor=8 does not divide the 20 heads"):
        describe(config)


def test_dry_run_of_the_command(tmp_path):
    command = [sys.executable, "train.py", "--config=configs/stage1_chunk_causal.py"]
    done = subprocess.run(
        [*command, f"--workdir={tmp_path / 'run'}", "--config.dry_run"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2,661,800,448 parameters" in done.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("chunk_size", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_accumulation_equals_the_whole_batch(chunk_size):
    config = _tiny()
    config.update(chunk_size=chunk_size, image_prob=0.5)
    model = dit_config(config)
    sizes = {"channels": model.in_channels, "text": model.caption_channels}
    arrays = synthetic_latents(**config.synthetic.to_dict(), **sizes)
    objective = Stage1Objective(config, model, 5)
    rows = {name: arrays[name] for name in ("latents", "camera", "plucker")}
    rows |= {name: arrays[name][arrays["caption"]] for name in ("text", "text_mask")}
    null = (arrays["text"][-1], arrays["text_mask"][-1])
    examples = jax.jit(objective.prepare)(rows, null, jax.random.key(3))
    assert len(np.unique(np.asarray(examples["weights"][:, 0]))) == 2  # some rows have an image
    params = objective.init(None)
    gradient = jax.jit(
        functools.partial(accumulated_gradients, objective.loss), static_argnames="parts"
    )
    (whole, _), expected = gradient(params, examples, parts=1)
    (parted, _), ours = gradient(params, examples, parts=2)
    assert float(parted) == pytest.approx(float(whole), rel=1e-5)
    for (path, a), (_, b) in zip(leaves(ours), leaves(expected), strict=True):
        assert np.linalg.norm(a - b) <= 1e-5 * max(np.linalg.norm(b), 1e-3), path


def test_folder_of_latents_and_weights(tmp_path):
    config = _tiny()
    model = dit_config(config)
    sizes = {"channels": model.in_channels, "text": model.caption_channels}
    arrays = synthetic_latents(**config.synthetic.to_dict(), **sizes)
    _save(tmp_path / "latents", arrays)
    config.data_dir = str(tmp_path / "latents")
    state = train(config, tmp_path / "run")
    assert state.model.average is None
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(rows[0])["loss"])

    # what a run exports, without an average its weights, starts another
    folder = tmp_path / "run" / "export"
    write_index(folder, Schedule(shift=3.0))
    for part in ("text_encoder", "tokenizer", "vae"):
        (folder / part).mkdir()
    Stage1Folder(folder).check("transformer")
    config.init_weights = str(folder)
    config.steps = 0
    again = train(config, tmp_path / "again")
    for (path, a), (_, b) in zip(
        leaves(again.model.params), leaves(state.model.params), strict=True
    ):
        np.testing.assert_array_equal(a, b, err_msg=path)
    config.dit.hidden_size = 64
    with pytest.raises(InputError, match="another network"):
        train(config, tmp_path / "other")


def test_bad_folders(tmp_path):
    arrays = synthetic_latents(3, 2, 2, 2, 4, 8, 2)
    _save(tmp_path / "a", arrays)
    assert open_latents(tmp_path / "a")["latents"].shape == (3, 2, 2, 2, 4)
    np.save(tmp_path / "a" / "camera.npy", arrays["camera"][:2])
    with pytest.raises(InputError, match="different sets"):
        open_latents(tmp_path / "a")
    (tmp_path / "a" / "text.npy").unlink()
    with pytest.raises(InputError, match=r"lacks text\.npy"):
        open_latents(tmp_path / "a")
    config = _tiny()
    _save(tmp_path / "b", arrays)
    config.data_dir = str(tmp_path / "b")
    with pytest.raises(InputError, match=r"latents of data_dir has 4 channels and dit.in_channels"):
        train(config, tmp_path / "run")
