"""The causal DiT's trainer, in miniature."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from sanawm_jax.checkpoints.export import export_vae
from sanawm_jax.core.params import init
from sanawm_jax.small_world import train_dit
from sanawm_jax.small_world.train_vae import vae_config
from sanawm_jax.vae.model import VideoVAE

TINY = (
    "--minutes 60 --steps 4 --steps_per_call 2 --lengths 9 17 --begin 0 0.5 --batch 2 --rows 8 "
    "--least 2 --render 2 --held_out 2 --sample_steps 2 --width 32 --head 16 --mlp_ratio 1 "
    "--text_length 16 --cached 2 --size 32 48 --render_share 0.5"
).split()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("dit")
    config = vae_config(8, 16)
    export_vae(config, init(VideoVAE, config, jax.random.key(0)), out / "vae", "float32")
    arguments = ["--vae", str(out / "vae"), *TINY]
    train_dit.main(["--out", str(out), *arguments])
    return out, arguments


def test_a_run_leaves_weights_report_and_sheet(run):
    out, _ = run
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 4 and report["clips"] == 2 and report["frames"] == 9
    assert len(report["psnr_by_quarter"]) == 4 and np.isfinite(report["held_out_loss"])
    assert (out / "held_out.jpg").stat().st_size > 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["program"] for line in lines if line.get("event") == "compiled"]
