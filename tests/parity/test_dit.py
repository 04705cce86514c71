"""The DiT against diffusers' `SanaWMTransformer3DModel`, with weights that our loader reads."""

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
from sanawm_jax.checkpoints.files import SafetensorsFolder, Tensors, published_fields, read_config
from sanawm_jax.core.params import apply, build, count, leaves
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.keys import extra_tensors, is_ignored, key_table
from sanawm_jax.dit.model import DiT
from tests.parity.compare import float32_attention, randomise, relative

BASE: dict[str, Any] = dict(
    num_layers=4,
    hidden_size=48,
    num_attention_heads=2,
    linear_head_dim=24,
    in_channels=8,
    caption_channels=16,
)
Case = tuple[dict[str, Any], tuple[int, int, int], int, int | tuple[int, ...]]
# name -> (config over BASE, latent grid (F, H, W), batch, and which frames of the last clip are
# padding: a number of frames at its end, or the frames)
CASES: dict[str, Case] = {
    "base": ({}, (3, 4, 6), 2, 0),
    "one_frame": ({}, (1, 3, 5), 1, 0),
    "odd_grid_masked": ({}, (6, 3, 5), 2, 2),
    "padding_in_the_middle": (dict(softmax_every_n=2), (6, 3, 2), 2, (2, 3)),
    "padding_in_the_middle_of_gdn": (dict(softmax_every_n=0, num_layers=1), (5, 3, 2), 1, (1,)),
    "padding_at_the_start": (dict(softmax_every_n=2, num_layers=2), (5, 2, 3), 1, (0, 1)),
    "three_heads_every_3": (
        dict(hidden_size=96, linear_head_dim=32, softmax_every_n=3, num_layers=7),
        (4, 2, 3),
        1,
        0,
    ),
    "no_softmax": (dict(softmax_every_n=0, num_layers=2), (5, 3, 3), 1, 1),
    "only_softmax": (dict(softmax_every_n=1, num_layers=2), (2, 3, 4), 1, 1),
    "head_of_40": (
        dict(hidden_size=80, linear_head_dim=40, num_attention_heads=5, softmax_every_n=2),
        (3, 3, 4),
        1,
        0,
    ),
    "patch_2": (dict(patch_size=(1, 2, 2), num_layers=2, softmax_every_n=2), (3, 4, 6), 1, 0),
    "patch_3": (dict(patch_size=(1, 3, 3), num_layers=2, softmax_every_n=2), (2, 6, 9), 1, 0),
    "raymap_instead_of_plucker": (
        dict(use_chunk_plucker_post_attn=False, num_layers=2, softmax_every_n=2),
        (3, 4, 6),
        2,
        0,
    ),
    "raymap_patch_2": (
        dict(
            use_chunk_plucker_post_attn=False,
            num_layers=1,
            patch_size=(1, 2, 2),
            softmax_every_n=2,
        ),
        (2, 4, 6),
        1,
        0,
    ),
    "plucker_in_two_blocks": (dict(chunk_plucker_post_attn_blocks=2), (2, 3, 4), 1, 0),
    "conv_on_all": (dict(k_conv_only=False, conv_kernel_size=3, num_layers=2), (5, 2, 3), 1, 0),
    "no_conv_no_norms": (
        dict(conv_kernel_size=0, qk_norm=False, cross_norm=False, y_norm=False, num_layers=2),
        (3, 2, 3),
        1,
        0,
    ),
    "no_rope": (dict(use_pe=False, softmax_every_n=2, num_layers=2), (3, 2, 3), 1, 0),
    "plain_mlp": (dict(ffn_type="mlp", num_layers=2, mlp_ratio=2.5), (3, 2, 3), 1, 0),
    "frame_kernel_5_gelu": (
        dict(t_kernel_size=5, mlp_acts=("gelu", "mish", "silu"), num_layers=2),
        (4, 2, 3),
        1,
        0,
    ),
}


def poses(rng: np.random.Generator, frames: int) -> np.ndarray:
    """Random smooth rigid camera-to-world poses (F, 4, 4), the first one the identity."""
    from scipy.spatial.transform import Rotation

    steps = np.cumsum(rng.normal(size=(frames, 3)) * 0.2, 0)
    out = np.tile(np.eye(4), (frames, 1, 1))
    out[:, :3, :3] = Rotation.from_rotvec(
        np.cumsum(rng.normal(size=(frames, 3)) * 0.2, 0)
    ).as_matrix()
    out[:, :3, 3] = steps
    out[0] = np.eye(4)
    return out.astype(np.float32)


def make_inputs(
    rng: np.random.Generator,
    model: SanaWMTransformer3DModel,
    grid: tuple,
    batch: int,
    masked: int | tuple[int, ...],
) -> dict[str, np.ndarray]:
    frames, rows, columns = grid
    config, tokens = model.config, 7
    intrinsics = np.array([0.9 * columns, 1.1 * rows, columns / 2, rows / 2 - 0.3])
    camera = np.concatenate(
        [
            np.stack([poses(rng, frames).reshape(frames, 16) for _ in range(batch)]),
            np.broadcast_to(intrinsics, (batch, frames, 4))
            * rng.uniform(0.9, 1.1, (batch, frames, 4)),
        ],
        -1,
    )
    timesteps = rng.uniform(0, 1000, (batch, frames))
    timesteps[:, 0] = 0
    text_mask = np.ones((batch, tokens), np.int64)
    text_mask[0, tokens - 2 :] = 0
    inputs = {
        "latents": rng.normal(size=(batch, frames, rows, columns, config.in_channels)),
        "timesteps": timesteps,
        "text": rng.normal(size=(batch, tokens, config.caption_channels)),
        "text_mask": text_mask,
        "camera": camera,
        "plucker": rng.normal(size=(batch, frames, rows, columns, config.chunk_plucker_channels)),
    }
    if masked:
        frame_mask = np.ones((batch, frames))
        padding = masked if isinstance(masked, tuple) else range(frames - masked, frames)
        frame_mask[-1, list(padding)] = 0
        inputs["frame_mask"] = frame_mask
    return {k: v.astype(np.float32) for k, v in inputs.items()}


def run_reference(
    model: SanaWMTransformer3DModel,
    inputs: dict[str, np.ndarray],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    t = {k: torch.from_numpy(v) for k, v in inputs.items()}
    real = {k: v.to(dtype) for k, v in t.items() if k not in ("timesteps", "text_mask")}
    out = model(
        real["latents"].permute(0, 4, 1, 2, 3),
        t["timesteps"][:, None],
        real["text"][:, None],
        mask=t["text_mask"],
        camera_conditions=real.get("camera"),
        chunk_plucker=real["plucker"].permute(0, 4, 1, 2, 3) if "plucker" in real else None,
        frame_valid_mask=real.get("frame_mask"),
    ).sample
    return out.permute(0, 2, 3, 4, 1)


def loaded(model: SanaWMTransformer3DModel, folder: Path) -> tuple[DiTConfig, Any, Any]:
    """The reference's saved folder through our config reader and loader."""
    model.save_pretrained(folder)
    config = DiTConfig.from_json(read_config(folder))
    graphdef, abstract = build(DiT, config)
    params = keymap.load(
        key_table(config), abstract, SafetensorsFolder(folder), what=str(folder), ignore=is_ignored
    )
    return config, graphdef, params


def make(name: str) -> tuple[SanaWMTransformer3DModel, tuple, int, int | tuple[int, ...]]:
    overrides, grid, batch, masked = CASES[name]
    model = SanaWMTransformer3DModel(**{**BASE, **overrides})
    return randomise(model, seed=len(name)), grid, batch, masked


def on_device(inputs: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(a) for name, a in inputs.items()}


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, rng: np.random.Generator, tmp_path: Path) -> None:
    model, grid, batch, masked = make(name)
    inputs = make_inputs(rng, model, grid, batch, masked)
    with torch.no_grad(), float32_attention():
        expected = run_reference(model, inputs)
    _, graphdef, params = loaded(model, tmp_path)
    forward = jax.jit(lambda p, i: apply(graphdef, p, **i))
    ours = forward(params, inputs)
    assert relative(ours, expected) <= 1e-4
    # the camera has to matter, or the comparison above proves little
    turned = {**inputs, "camera": np.roll(inputs["camera"], 1, axis=1) * 1.3}
    if grid[0] > 1:
        assert relative(forward(params, turned), ours) > 1e-3


def test_forward_without_camera(rng: np.random.Generator, tmp_path: Path) -> None:
    model, grid, batch, _ = make("base")
    inputs = make_inputs(rng, model, grid, batch, 0)
    del inputs["camera"], inputs["plucker"]
    with torch.no_grad(), float32_attention():
        expected = run_reference(model, inputs)
    _, graphdef, params = loaded(model, tmp_path)
    assert relative(apply(graphdef, params, **on_device(inputs)), expected) <= 1e-4


@pytest.mark.parametrize("name", ["base", "odd_grid_masked"])
@pytest.mark.parametrize("remat", ["none", "full", "parts"])
def test_gradients(name: str, remat: str, rng: np.random.Generator, tmp_path: Path) -> None:
    model, grid, batch, masked = make(name)
    inputs = make_inputs(rng, model, grid, batch, masked)
    config, graphdef, params = loaded(model, tmp_path)
    weights = rng.normal(size=inputs["latents"].shape).astype(np.float32)
    with float32_attention():
        (run_reference(model, inputs) * torch.from_numpy(weights)).sum().backward()

    def loss(params: Any) -> jax.Array:
        return jnp.sum(apply(graphdef, params, **on_device(inputs), remat=remat) * weights)

    ours = keymap.export(key_table(config), jax.jit(jax.grad(loss))(params))
    ours = np.concatenate([ours[n].ravel() for n, _ in model.named_parameters()])
    theirs = torch.cat(
        [
            (torch.zeros_like(p) if p.grad is None else p.grad).ravel()
            for _, p in model.named_parameters()
        ]
    )
    assert relative(ours, theirs) <= 1e-3


def test_bfloat16_is_no_worse(
    rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the reference refuses a bfloat16 pixel grid on a CPU; on a GPU it rounds the same numbers
    from diffusers.models.transformers import transformer_sana_wm as reference

    exact_grid = reference.create_grid

    def rounded_grid(*args: Any, dtype: torch.dtype, **kwargs: Any) -> torch.Tensor:
        return exact_grid(*args, dtype=torch.float32, **kwargs).to(dtype)

    monkeypatch.setattr(reference, "create_grid", rounded_grid)
    model, grid, batch, _ = make("base")
    ours_error, their_error = [], []
    _, graphdef, params = loaded(model, tmp_path)
    step = jax.jit(lambda p, i: apply(graphdef, p, **i))
    half = SanaWMTransformer3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for _ in range(4):
        inputs = make_inputs(rng, model, grid, batch, 0)
        with torch.no_grad():
            with float32_attention():
                exact = run_reference(model, inputs)
            their_error.append(relative(run_reference(half, inputs, torch.bfloat16).float(), exact))
        inputs["latents"] = inputs["latents"].astype(jnp.bfloat16)
        ours_error.append(relative(np.asarray(step(params, inputs), np.float32), exact))
    assert np.mean(ours_error) <= np.mean(their_error)


def test_released_names_and_shapes() -> None:
    with torch.device("meta"):
        model = SanaWMTransformer3DModel()
    config = DiTConfig()
    _, abstract = build(DiT, config)
    shapes = {k: np.broadcast_to(np.float32(0), v.shape) for k, v in model.state_dict().items()}
    keymap.check(key_table(config), abstract, Tensors(shapes), what="release", ignore=is_ignored)
    assert count(abstract) == sum(p.numel() for p in model.parameters()) == 2_661_800_448
    assert {k for k in shapes if is_ignored(k)} == set(extra_tensors(config))


def test_config_fields_are_the_reference_s() -> None:
    import inspect

    signature = inspect.signature(SanaWMTransformer3DModel.__init__).parameters
    theirs = {k: v.default for k, v in signature.items() if k != "self"}
    assert published_fields(DiTConfig()) == theirs


def test_export_restores_every_tensor(tmp_path: Path) -> None:
    model, *_ = make("three_heads_every_3")
    config, _, params = loaded(model, tmp_path)
    exported = keymap.export(key_table(config), params, extra_tensors(config))
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    assert exported.keys() == state.keys()
    for key, value in state.items():
        np.testing.assert_array_equal(exported[key], value, err_msg=key)
    again = keymap.load(
        key_table(config), build(DiT, config)[1], Tensors(exported), what="x", ignore=is_ignored
    )
    assert all((a == b).all() for (_, a), (_, b) in zip(leaves(params), leaves(again), strict=True))
