"""The causal DiT's trainer and its clips, in miniature."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.checkpoints.export import export_vae
from sanawm_jax.core.params import init
from sanawm_jax.core.sharding import make_mesh
from sanawm_jax.data.views import ALL_VIEWS
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.small_world import train_dit
from sanawm_jax.small_world.clip_plans import Planner, plan_clip
from sanawm_jax.small_world.latent_pool import LatentPool
from sanawm_jax.small_world.scenery.captions import VOCABULARY
from sanawm_jax.small_world.scenery.clip import HELD_OUT_SEED
from sanawm_jax.small_world.train_vae import vae_config
from sanawm_jax.text.tokenizer import Tokenizer
from sanawm_jax.vae.model import VideoVAE

TINY = (
    "--minutes 60 --steps 4 --steps_per_call 2 --lengths 9 17 --begin 0 0.5 --batch 2 --rows 8 "
    "--least 2 --render 2 --held_out 2 --sample_steps 2 --width 32 --head 16 --mlp_ratio 1 "
    "--text_length 16 --cached 2 --size 32 48 --render_share 0.5"
).split()


def options(*more: str):
    return train_dit.make_parser().parse_args(["--out", "unused", "--vae", "unused", *more])


def test_batches_of_all_lengths_have_as_many_tokens_and_come_in_turn():
    lengths = train_dit.Lengths(options("--batch", "128"), ranks=2)
    assert lengths.batch == {49: 256, 97: 2 * 68, 193: 2 * 35, 385: 2 * 18}
    assert lengths.at(0.0) == [49] and lengths.at(0.7) == [49, 97, 193] and len(lengths.at(1)) == 4
    with pytest.raises(InputError, match="--begin"):
        train_dit.Lengths(options("--lengths", "49"), ranks=1)


def test_the_network_has_all_branches_and_its_state_fits():
    model = train_dit.dit_config(options(), channels=64)
    kinds = model.kinds()
    assert [kind.softmax for kind in kinds] == [False, False, False, True]
    assert all(kind.plucker for kind in kinds) and model.num_heads == 5
    objective = train_dit.Stage1Objective(train_dit.objective_config(options()), model, 7)
    weights = train_dit.count(objective.abstract)
    assert 9.5e6 < weights < 10.5e6
    assert 6 * weights < 60 << 20  # `compact`: six bytes each


def test_a_plan_has_the_cameras_of_all_views():
    plan = plan_clip(3, 17, 32, 48)
    assert plan.camera.shape == (len(ALL_VIEWS), 3, 20)
    assert plan.plucker.shape == (len(ALL_VIEWS), 3, 4, 6, 48)
    # every version begins at the identity; a mirrored camera has its principal point mirrored
    np.testing.assert_allclose(plan.camera[:, 0, :16].reshape(-1, 4, 4), [np.eye(4)] * 4, atol=1e-6)
    centre = plan.intrinsics[2] / 8
    np.testing.assert_allclose(plan.camera[:2, 0, 18], [centre, 47 / 8 - centre], rtol=1e-5)


def test_a_planner_never_gives_a_held_out_seed_for_training():
    planner = Planner(0, HELD_OUT_SEED - 1, 2, 32, 48)
    assert planner.is_ready(9, 2)
    found = [int(plan.scene.seed) for plan in planner.take(9, 2)]
    assert found == [HELD_OUT_SEED - 1, 0]
    assert int(planner.held_out(9, 1)[0].scene.seed) == HELD_OUT_SEED


def test_new_clips_replace_the_oldest_rows_of_a_pool():
    shapes = {"latents": jax.ShapeDtypeStruct((2,), jnp.float32)}
    pool = LatentPool(make_mesh(), shapes, capacity=9, step=4)
    assert pool.capacity == 8
    for value in range(3):
        pool.add({"latents": jnp.full((1, 1, 4, 2), value + 1.0)})
        assert pool.filled == min(4 * (value + 1), 8)
    rows = np.asarray(pool.rows["latents"])[0, :, 0]
    np.testing.assert_array_equal(rows, [3, 3, 3, 3, 2, 2, 2, 2])


def test_every_word_of_a_caption_is_one_token(tmp_path):
    encode = train_dit.text_encoder(tmp_path, 64)
    tokens = Tokenizer(tmp_path / "tokenizer")
    for word in VOCABULARY:
        assert len(tokens.encode(f" {word}")) == 2, word  # with BOS
    text = "A village under a cloudy sky. There are two red houses and a stone well."
    states, mask = encode([text, ""])
    assert states.shape == (2, 64, train_dit.TEXT_WIDTH) and 10 < int(mask[0].sum()) < 30


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("dit")
    config = vae_config(8, 16)
    export_vae(config, init(VideoVAE, config, jax.random.key(0)), out / "vae", "float32")
    arguments = ["--vae", str(out / "vae"), *TINY]
    train_dit.main(["--out", str(out), *arguments])
    return out, arguments


@pytest.mark.slow
def test_a_run_leaves_weights_report_and_sheet(run):
    out, _ = run
    report = json.loads((out / "report.json").read_text())
    assert report["steps"] == 4 and report["clips"] == 2 and report["frames"] == 9
    assert len(report["psnr_by_quarter"]) == 4 and np.isfinite(report["held_out_loss"])
    assert (out / "report.jpg").stat().st_size > 0
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any(line.get("program") == "9 frames" for line in lines)


@pytest.mark.slow
def test_a_run_goes_on_from_its_compact_state(run, tmp_path):
    out, arguments = run
    resumed = [*arguments, "--resume", str(out / "state"), "--lengths", "9", "--begin", "0"]
    train_dit.main(["--out", str(tmp_path), *resumed, "--text", str(out / "text")])
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 8
