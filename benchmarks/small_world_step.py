"""What a training step of the small world's DiT costs, and what makes it cheaper.

    python -m benchmarks.small_world_step                    # every variant, one JSON line each
    python -m benchmarks.small_world_step --tiny             # seconds on a CPU
    python -m benchmarks.small_world_step --only base,text64

A step is noise, loss and gradients in bfloat16 over float32 masters, Muon, and the moving average,
on random latents of 160x96 video. Each line has milliseconds of a step, compilation in seconds,
clips per second, TFLOP/s and the number of kernels that a step starts, counted in the compiled
program.
XLA reads its flags once per process: put more of them into `XLA_FLAGS` and compare.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from typing import Any

# name -> changes of the configuration, latent channels 64, grid (12, 20), 7 latent frames
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "scanned": {"unroll": False},
    "text64": {"text": 64},
    "text64_b128": {"text": 64, "batch": 128},
    "text64_b256": {"text": 64, "batch": 256},
    "text64_scanned_b128": {"text": 64, "batch": 128, "unroll": False},
    "text64_wide": {"text": 64, "layers": 4, "width": 384, "heads": 12},
    "text64_plain_b128": {"text": 64, "batch": 128, "no_camera": True},
    "text64_adamw": {"text": 64, "optimizer": "adamw"},
    "text64_patch1": {"text": 64, "patch": 1},
    "text64_long_b32": {"text": 64, "batch": 32, "frames": 21},
}


def step_of(variant: dict[str, Any], tiny: bool):
    """(jitted step, state, batch, floating-point operations of a step)."""
    import jax
    import jax.numpy as jnp
    import optax

    from configs import small_world
    from sanawm_jax.dit.config import DiTConfig
    from sanawm_jax.training.engine.optimizer import make_optimizer
    from sanawm_jax.training.objectives.stage1 import Stage1Objective

    config = small_world.get_config()
    config.unroll = variant.get("unroll", True)
    config.use_camera = not variant.get("no_camera", False)
    patch = variant.get("patch", 2)
    heads, width = variant.get("heads", 8), variant.get("width", 256)
    config.dit.update(
        num_layers=variant.get("layers", 8),
        hidden_size=width,
        num_attention_heads=heads,
        linear_head_dim=width // heads,
        patch_size=(1, patch, patch),
        chunk_plucker_post_attn_blocks=variant.get("layers", 8),
    )
    batch, text = variant.get("batch", 64), variant.get("text", 300)
    frames, grid, channels = variant.get("frames", 7), (12, 20), 64
    if tiny:
        batch, text, grid = 2, 8, (4, 4)
    model = DiTConfig(
        in_channels=channels,
        caption_channels=config.text_width,
        chunk_plucker_channels=48,
        **config.dit.to_dict(),
    )
    objective = Stage1Objective(config, model, frames)
    params = objective.init(None)
    rule = make_optimizer(name=variant.get("optimizer", "muon"), betas=(0.9, 0.99))
    keys = iter(jax.random.split(jax.random.key(0), 4))
    pose = jnp.tile(jnp.eye(4).reshape(-1), (batch, frames, 1))
    pose = pose.at[..., 11].set(jnp.linspace(0.0, 3.0, frames))
    focal = jnp.tile(jnp.array([14.0, 14.0, grid[1] / 2, grid[0] / 2]), (batch, frames, 1))
    rows = {
        "latents": jax.random.normal(next(keys), (batch, frames, *grid, channels)),
        "camera": jnp.concatenate([pose, focal], -1),
        "plucker": jax.random.normal(next(keys), (batch, frames, *grid, 48)),
        "text": jax.random.normal(next(keys), (batch, text, config.text_width)),
        "text_mask": jnp.ones((batch, text), jnp.int32),
    }
    null = rows["text"][0], rows["text_mask"][0]
    state = {"params": params, "average": jax.tree.map(jnp.copy, params)}
    state["moments"] = rule.init(params)

    def step(state, rows, null, key):
        examples = objective.prepare(rows, null, key)
        cast = jax.tree.map(lambda p: p, state["params"])
        grads = jax.grad(lambda p: objective.loss(p, examples)[0])(cast)
        updates, moments = rule.update(grads, state["moments"], state["params"])
        new = optax.apply_updates(state["params"], jax.tree.map(lambda u: 1e-3 * u, updates))
        average = jax.tree.map(lambda a, p: a + 1e-3 * (p - a), state["average"], new)
        return {"params": new, "average": average, "moments": moments}

    flops = batch * objective.flops(grid, text)
    return jax.jit(step, donate_argnums=0), state, (rows, null, next(keys)), flops


def count_kernels(text: str) -> int:
    """Kernels that a compiled GPU program starts: fusions and library calls outside of fusions."""
    inside = re.sub(r"(?ms)^%?fused_\S+ .*?^}", "", text)
    return len(re.findall(r" = \S+ (?:fusion|custom-call|sort|reduce|copy)\(", inside))


def measure(name: str, tiny: bool, repeats: int) -> dict[str, Any]:
    """The line of one variant."""
    import jax

    step, state, inputs, flops = step_of(VARIANTS[name], tiny)
    start = time.time()
    compiled = step.lower(state, *inputs).compile()
    seconds = time.time() - start
    for _ in range(3):
        state = compiled(state, *inputs)
    jax.block_until_ready(state)
    start = time.time()
    for _ in range(repeats):
        state = compiled(state, *inputs)
    jax.block_until_ready(state)
    each = (time.time() - start) / repeats
    batch = inputs[0]["latents"].shape[0]
    return {
        "variant": name,
        "ms": round(1e3 * each, 2),
        "compile_s": round(seconds, 1),
        "clips_per_s": round(batch / each, 1),
        "tflops": round(flops / each / 1e12, 2),
        "kernels": count_kernels(compiled.as_text() or ""),
        "device": jax.devices()[0].device_kind,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="names of variants, with commas")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no variant after these")
    given = parser.parse_args()
    from sanawm_jax.runtime.compiler_flags import use_compiler_flags

    use_compiler_flags()
    began = time.time()
    for name in given.only.split(",") if given.only else VARIANTS:
        if time.time() - began > given.seconds:
            break
        try:
            print(json.dumps(measure(name, given.tiny, given.repeats)), flush=True)
        except Exception as error:  # one variant that does not fit must not end the others
            print(json.dumps({"variant": name, "error": str(error)[:300]}), flush=True)


if __name__ == "__main__":
    main()
