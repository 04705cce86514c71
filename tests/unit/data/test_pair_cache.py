"""Pairs of stage 1 can be resumed, have a fingerprint, and do not depend on the batch."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.core.params import build, init
from sanawm_jax.data import pair_cache
from sanawm_jax.data.pair_cache import build_pairs, build_text, stage1_sampler
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.model import DiT
from sanawm_jax.sampling.schedule import Schedule
from sanawm_jax.sampling.stage1 import Conditions, denoise

CLIPS, SHAPE = 5, (2, 2, 2, 3)


class Stage1:
    """Makes latents that contain the number of their clip and seed, and counts calls."""

    def __init__(self, fail_at: int = 10**9):
        self.calls = 0
        self.fail_at = fail_at

    def __call__(self, clips: np.ndarray, seeds: np.ndarray) -> jax.Array:
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return jnp.ones((len(clips), *SHAPE)) * (clips + 100 * seeds)[:, None, None, None, None]


def test_pairs_resume_and_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_cache, "SAVE_EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        build_pairs(tmp_path, CLIPS, 2, Stage1(fail_at=3), fingerprint="a", batch_size=3)
    assert json.loads((tmp_path / "stage1.json").read_text())["done"] == 6
    rest = Stage1()
    pairs = build_pairs(tmp_path, CLIPS, 2, rest, fingerprint="a", batch_size=3)
    assert rest.calls == 2  # 4 of 10 rows were left
    rows = np.arange(10)
    np.testing.assert_array_equal(pairs[:, 0, 0, 0, 0], rows % 5 + 100 * (rows // 5))
    again, other = Stage1(), Stage1()
    build_pairs(tmp_path, CLIPS, 2, again, fingerprint="a", batch_size=3)
    assert again.calls == 0
    assert build_pairs(tmp_path, CLIPS, 1, other, fingerprint="b", batch_size=3).shape == (
        5,
        *SHAPE,
    )
    assert other.calls == 2


def test_text_is_encoded_once(tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def encode(texts: list[str]) -> jax.Array:
        seen.append(texts)
        return jnp.array([len(t) for t in texts], jnp.float32)[:, None, None] * jnp.ones((1, 2, 4))

    captions = ["a", "bb", "ccc"]
    for _ in range(2):
        text = build_text(tmp_path, captions, encode, fingerprint="a", batch_size=2)
        np.testing.assert_array_equal(text[:, 0, 0], [1, 2, 3])
    assert seen == [["a", "bb"], ["ccc", "ccc"]]  # one shape, one compilation
    build_text(tmp_path, captions, encode, fingerprint="b", batch_size=2)
    assert len(seen) == 4


def test_a_batch_is_sampled_as_stage_1_samples_a_clip() -> None:
    """With guidance, a row equals the result of `SanaWM`'s sampler, whatever is in its batch."""
    guidance = 3.0
    config = DiTConfig(
        in_channels=4,
        num_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        patch_size=(1, 2, 2),
        softmax_every_n=1,
        chunk_plucker_post_attn_blocks=1,
        chunk_plucker_channels=48,
        caption_channels=8,
    )
    rng = np.random.default_rng(0)
    poses = np.zeros((3, 3, 20), np.float32)
    poses[..., :16] = np.eye(4).ravel()
    poses[..., 16:] = (4.0, 4.0, 2.0, 2.0)
    cache = {
        "latents": rng.standard_normal((3, 3, 4, 4, 4)).astype(np.float16),
        "camera": poses,
        "plucker": rng.standard_normal((3, 3, 4, 4, 48)).astype(np.float16),
        "caption": np.array([0, 1, 0], np.int32),
        "text": rng.standard_normal((3, 6, 8)).astype(np.float16),
        "text_mask": np.array([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5], bool),
    }
    graphdef, _ = build(DiT, config)
    params = init(DiT, config, jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), params)
    sigmas = Schedule(shift=3.0).sigmas(3)
    options = dict(guidance=guidance, seed=7, dtype=jnp.float32)
    sample = stage1_sampler(graphdef, params, cache, sigmas, **options)
    whole = np.asarray(sample(np.array([0, 1, 2]), np.array([0, 0, 1])))
    np.testing.assert_array_equal(whole[:, 0], cache["latents"][:, 0])

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 0), 1)  # seed 0, clip 1
    pick = [2, 1]  # the null caption comes first
    conditions = Conditions(
        jnp.asarray(cache["text"][pick], jnp.float32),
        jnp.asarray(cache["text_mask"][pick]),
        jnp.asarray(poses[1:2]),
        jnp.asarray(cache["plucker"][1:2], jnp.float32),
    )
    alone = denoise(
        graphdef,
        params,
        jax.random.normal(key, (3, 4, 4, 4))[None],
        jnp.asarray(cache["latents"][1:2, :1], jnp.float32),
        conditions,
        sigmas,
        guidance=guidance,
        dtype=jnp.float32,
        progress=False,
    )
    np.testing.assert_allclose(alone[0], whole[1], atol=5e-5)
