"""One denoising step of stage 1 with guidance, ours and diffusers', on the same device.

    python -m benchmarks.stage1 --latent_frames 21 121
    python -m benchmarks.stage1 --peer           # also the reference with torch.compile
    python -m benchmarks.stage1 --peer --latent_frames 21 41 61 81 101 121 --figure cost.png
    python -m benchmarks.stage1 --precision fp8  # ours in FP8, and its error against bfloat16
    python -m benchmarks.stage1 --tiny

The weights are random and have the released size; 704x1280 pixels, bfloat16. Our step includes the
Euler update. With FP8, a further line per length compares one step with the step in bfloat16, for
the same weights and latents. It has the relative errors of the latents and of their change, which
is the velocity.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import common


def sizes(given: argparse.Namespace) -> tuple[Any, list[int], tuple[int, int], int]:
    """Returns configuration, latent frames, latent rows and columns, and text tokens."""
    from sanawm_jax.checkpoints.sizes import RELEASED, TINY

    if given.tiny:
        return TINY.dit, [2], (2, 2), 8
    return RELEASED.dit, given.latent_frames, (22, 40), 300


def inputs(
    config: Any, frames: int, grid: tuple[int, int], text: int, dtype: Any, batch: int = 2
) -> tuple[Any, Any]:
    """Returns random latents (1, F, H, W, C) float32, and conditions with a moving camera.

    Args:
      config: the DiT's.
      frames, grid: F and (H, W).
      text: tokens per prompt.
      dtype: of the conditions.
      batch: number of prompts, 2 with guidance.
    """
    import jax
    import jax.numpy as jnp

    from sanawm_jax.sampling.stage1 import Conditions

    keys = iter(jax.random.split(jax.random.key(1), 3))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, dtype)

    pose = jnp.tile(jnp.eye(4).reshape(-1), (frames, 1))
    pose = pose.at[:, 11].set(jnp.linspace(0.0, 3.0, frames))
    intrinsics = jnp.tile(jnp.array([25.0, 25.0, grid[1] / 2, grid[0] / 2]), (frames, 1))
    conditions = Conditions(
        normal(batch, text, config.caption_channels),
        jnp.ones((batch, text), jnp.int32),
        jnp.concatenate([pose, intrinsics], -1)[None],
        normal(1, frames, *grid, config.chunk_plucker_channels),
    )
    latents = normal(1, frames, *grid, config.in_channels)
    return jnp.asarray(latents, jnp.float32), conditions


def ours(given: argparse.Namespace) -> None:
    """Measures `sampling.stage1.denoise_step`."""
    import jax.numpy as jnp

    from sanawm_jax.sampling.stage1 import denoise_step

    config, lengths, grid, text = sizes(given)
    dtype = common.jax_dtype(given.tiny)
    graphdef, params = common.random_dit(config, dtype, given.precision)

    def run(start: Any, conditions: Any) -> Any:
        return denoise_step(
            graphdef,
            params,
            jnp.array(start),  # a copy, because the latents are donated to the step
            conditions,
            *map(jnp.float32, (0.7, 0.6, 5.0)),
            dtype=dtype,
        ).block_until_ready()

    made = {}
    for frames in lengths:
        args = inputs(config, frames, grid, text, dtype)

        def step(args: Any = args, frames: int = frames) -> None:
            made[frames] = run(*args)

        what = f"step of {frames} latent frames"
        extra = {"precision": given.precision, "latent_frames": frames}
        common.report("ours", what, step, given.repeats, **extra)
    if given.precision == "bf16":
        return
    del params  # so that the two sets of weights are never in memory together
    graphdef, params = common.random_dit(config, dtype, "bf16")
    for frames, latents in made.items():
        start, conditions = inputs(config, frames, grid, text, dtype)
        exact = run(start, conditions)

        def error(unchanged: Any, latents: Any = latents, exact: Any = exact) -> float:
            size = jnp.linalg.norm((exact - unchanged).ravel())
            return float(f"{float(jnp.linalg.norm((latents - exact).ravel()) / size):.3g}")

        what = f"{given.precision} against bf16, {frames} latent frames"
        line = {"side": "ours", "what": what, "latents": error(0.0), "velocity": error(start)}
        print(json.dumps(line), flush=True)


def reference(given: argparse.Namespace) -> None:
    """Measures diffusers' `SanaWMTransformer3DModel` with a batch of two."""
    import torch
    from diffusers import SanaWMTransformer3DModel
    from diffusers.models.transformers.transformer_sana_wm import SanaWMRotaryPosEmbed

    from sanawm_jax.checkpoints.files import published_fields

    config, lengths, grid, text = sizes(given)
    device, dtype = common.torch_device(given.tiny)
    with torch.device("meta"):
        model = SanaWMTransformer3DModel(**published_fields(config))
    model = common.fill_reference(model, device, dtype)
    # This plain attribute was made on the meta device too, so it is made again.
    model.rope = SanaWMRotaryPosEmbed(
        attention_head_dim=config.linear_head_dim, patch_size=config.patch_size, max_seq_len=1024
    )
    if given.compile:
        for i, block in enumerate(model.blocks):
            model.blocks[i] = torch.compile(block, dynamic=False)  # type: ignore[assignment]
    for frames in lengths:
        options = {"device": device, "dtype": dtype}
        x = torch.randn(2, config.in_channels, frames, *grid, **options)
        times = torch.full((2, 1, frames), 700.0, device=device)
        times[:, :, 0] = 0
        prompt = torch.randn(2, 1, text, config.caption_channels, **options)
        mask = torch.ones(2, text, device=device, dtype=torch.int64)
        pose = torch.eye(4, device=device).repeat(2, frames, 1, 1)
        pose[:, :, 2, 3] = torch.linspace(0, 3, frames, device=device)
        intrinsics = torch.tensor([25.0, 25.0, grid[1] / 2, grid[0] / 2], device=device)
        camera = torch.cat([pose.flatten(2), intrinsics.repeat(2, frames, 1)], -1).to(dtype)
        rays = torch.randn(2, config.chunk_plucker_channels, frames, *grid, **options)

        def step(args: Any = (x, times, prompt, mask, camera, rays)) -> None:
            x, times, prompt, mask, camera, rays = args
            with torch.no_grad():
                model(
                    x, times, prompt, mask=mask, camera_conditions=camera, chunk_plucker=rays,
                    return_dict=False,
                )  # fmt: skip
            common.wait_torch()

        what = f"step of {frames} latent frames"
        common.report(given.side, what, step, given.repeats, latent_frames=frames)


def draw(found: dict[str, dict[str, Any]], out: Path) -> None:
    """Draws the seconds of a step by the clip's latent frames, with one curve per side.

    Args:
      found: the result of `common.run_sides`.
      out: a PNG file.
    """
    from sanawm_jax.training.curves import panels

    names = {"ours": "sanawm_jax", "reference": "diffusers, eager", "compiled": "torch.compile"}
    curves: dict[str, list[tuple[int, float]]] = {}
    for lines in found.values():
        for side, line in lines.items():
            curves.setdefault(side, []).append((line["latent_frames"], line["seconds"]))
    device = next(iter(next(iter(found.values())).values()))["device"]
    with panels(out, 1, (6, 3.6)) as (axis,):
        for side, points in curves.items():
            axis.plot(*zip(*sorted(points), strict=True), "o-", label=names[side])
        axis.set(xlabel="latent frames of 22x40", ylabel="seconds a guided step", title=device)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent_frames", type=int, nargs="+", default=[21, 121])
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16", help="our side")
    parser.add_argument("--figure", type=Path, help="write seconds by length to this PNG file")
    found = common.run_sides(parser, {"ours": ours, "reference": reference}, arguments)
    figure = parser.parse_args(arguments).figure
    if figure and found:
        draw(found, figure)


if __name__ == "__main__":
    main()
