"""The camera branch against diffusers, on inputs and sizes for which its details matter.

With the inputs of `test_dit`, keys are large, so the discount of beta is almost always 1. Its heads
are small, so the camera's softmax has the usual scale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SanaWMTransformer3DModel

from sanawm_jax.checkpoints import keymap
from sanawm_jax.core.params import apply
from sanawm_jax.dit import attention
from sanawm_jax.dit.keys import key_table
from tests.parity.compare import float32_attention, randomise, relative
from tests.parity.test_dit import BASE, loaded, make_inputs, on_device, run_reference

GDN, SOFTMAX = 0, 1  # `softmax_every_n` of one layer of that kind
SMALL_KEY = 0.01  # times the usual size


def move(inputs: dict[str, np.ndarray], factor: float) -> None:
    """Multiplies the translations of the camera's poses (B, F, 20)."""
    inputs["camera"][..., [3, 7, 11]] *= factor


def small_keys_far_cameras(
    rng: np.random.Generator, **overrides: Any
) -> tuple[SanaWMTransformer3DModel, dict[str, np.ndarray]]:
    """Returns a model whose camera keys are small, and inputs with large translations.

    A key is rescaled to its norm before the ray transform, with an epsilon of 1e-6 inside the root.
    If the norm is smaller and the translation is large, the key stays too large, and beta is
    reduced to compensate for this.
    """
    model = SanaWMTransformer3DModel(
        **{**BASE, "num_layers": 1, "softmax_every_n": GDN, **overrides}
    )
    randomise(model, seed=5)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.k_norm_cam.weight *= SMALL_KEY
            # the camera's branch has no denominator: what small keys write is small as well
            block.attn.out_proj_cam.weight /= SMALL_KEY
    inputs = make_inputs(rng, model, (4, 3, 4), 2, 0)
    move(inputs, 30.0)
    return model, inputs


def without_discount(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the inflation by 1, so that beta is not reduced."""
    original = attention.ucpe.to_ray_space

    def to_ray_space(*args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        moved, inflation = original(*args, **options)
        return moved, jnp.ones_like(inflation)

    monkeypatch.setattr(attention.ucpe, "to_ray_space", to_ray_space)


@pytest.mark.parametrize("masked", [False, True])
def test_beta_is_discounted(
    masked: bool, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = small_keys_far_cameras(rng)
    if masked:
        inputs["frame_mask"] = np.array([[1, 1, 1, 1], [1, 0, 1, 0]], np.float32)
    with torch.no_grad(), float32_attention():
        expected = run_reference(model, inputs)
    _, graphdef, params = loaded(model, tmp_path)
    assert relative(apply(graphdef, params, **on_device(inputs)), expected) <= 1e-4
    without_discount(monkeypatch)
    assert relative(apply(graphdef, params, **on_device(inputs)), expected) >= 1e-2


def test_beta_is_not_raised_where_keys_shrink(rng: np.random.Generator, tmp_path: Path) -> None:
    """Keys are positive, so that a small translation towards the negative makes them smaller."""
    model, inputs = small_keys_far_cameras(rng)
    poses = np.tile(np.eye(4, dtype=np.float32), (*inputs["camera"].shape[:2], 1, 1))
    poses[:, 1:, :3, 3] = -0.3
    inputs["camera"][..., :16] = poses.reshape(*poses.shape[:2], 16)
    with torch.no_grad(), float32_attention():
        expected = run_reference(model, inputs)
    _, graphdef, params = loaded(model, tmp_path)
    found: list[jax.Array] = []
    original = attention.ucpe.to_ray_space

    def to_ray_space(*args: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        moved, inflation = original(*args, **options)
        jax.debug.callback(found.append, jnp.min(inflation))
        return moved, inflation

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.ucpe, "to_ray_space", to_ray_space)
        assert relative(apply(graphdef, params, **on_device(inputs)), expected) <= 1e-4
    jax.effects_barrier()
    assert min(map(float, found)) < 0.99  # or the case proves nothing


def test_gradients_of_the_discount(rng: np.random.Generator, tmp_path: Path) -> None:
    model, inputs = small_keys_far_cameras(rng)
    config, graphdef, params = loaded(model, tmp_path)
    weights = rng.normal(size=inputs["latents"].shape).astype(np.float32)
    with float32_attention():
        (run_reference(model, inputs) * torch.from_numpy(weights)).sum().backward()

    def loss(params: Any) -> jax.Array:
        return jnp.sum(apply(graphdef, params, **on_device(inputs)) * weights)

    ours = keymap.export(key_table(config), jax.jit(jax.grad(loss))(params))
    for name in ("k_norm_cam", "k_proj_cam", "beta_proj"):
        theirs = {n: p.grad for n, p in model.named_parameters() if f".{name}.weight" in n}
        assert theirs
        for key, gradient in theirs.items():
            assert relative(ours[key], gradient) <= 1e-3, key


@pytest.mark.parametrize("softmax_every_n", [GDN, SOFTMAX])
def test_one_block_at_the_released_head_and_frame_size(
    softmax_every_n: int, rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of size 112 and 22 x 40 tokens per frame, as in the release, with 2 of the 20 heads.

    For a head of 112, the camera's softmax has the scale 128^-1/2, because the reference pads heads
    to 128.
    """
    model = SanaWMTransformer3DModel(
        **BASE
        | dict(
            num_layers=1,
            softmax_every_n=softmax_every_n,
            hidden_size=224,
            num_attention_heads=2,
            linear_head_dim=112,
            mlp_ratio=1.0,
        )
    )
    randomise(model, seed=6)
    inputs = make_inputs(rng, model, (3, 22, 40), 1, 0)
    with torch.no_grad(), float32_attention():
        expected = run_reference(model, inputs)
    _, graphdef, params = loaded(model, tmp_path)
    forward = jax.jit(lambda p, i: apply(graphdef, p, **i))
    assert relative(forward(params, inputs), expected) <= 1e-4
    # what is special at this size has to matter, or the comparison above proves little
    if softmax_every_n == SOFTMAX:
        monkeypatch.setattr(attention, "softmax_scale", lambda head_dim, how: head_dim**-0.5)
    else:
        without_discount(monkeypatch)
    assert relative(apply(graphdef, params, **on_device(inputs)), expected) >= 5e-4
