"""One stage-1 training step at the released size: seconds, utilisation, peak memory.

    python -m benchmarks.train_step                              # all weights, six clip lengths
    python -m benchmarks.train_step --lora 32 --latent_frames 21
    python -m benchmarks.train_step --chunk_causal --latent_frames 121
    python -m benchmarks.train_step --latent_frames 121 --context 2 --fsdp 1   # on two devices
    python -m benchmarks.train_step --tiny                       # seconds on a CPU

The step is the one that `train.py` compiles for `configs/stage1_bidirectional.py`, by default on
one device: noise, loss and gradients in bfloat16 with float32 weights and rematerialisation,
gradient clipping, optimizer, and the guard against loss spikes. The training state is donated. The
device holds one clip of random latents of 704x1280 pixels, its camera and 300 text tokens. Weights
are random and never zero, because a card needs less power, and so less time, for zeros.

Every length runs in its own process, the shortest first. For a length that does not fit, the script
prints a line with `error`, and with `needs_gib` from the compiler's plan. `mfu` is the number in
the log of a run, relative to the peak of the data sheet. `of_achievable` is relative to the speed
that large products reach, as in `benchmarks.profile_step`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.profile_step import LIMITS
from sanawm_jax.runtime.compiler_flags import use_compiler_flags


def run_config(given: argparse.Namespace) -> Any:
    """Returns the configuration of a run, by default on one device."""
    from configs import stage1_bidirectional, stage1_chunk_causal
    from sanawm_jax.checkpoints.files import published_fields
    from sanawm_jax.checkpoints.sizes import TINY

    recipe = stage1_chunk_causal if given.chunk_causal else stage1_bidirectional
    config = recipe.get_config()
    config.mesh.update(data=1, fsdp=given.fsdp, context=given.context, tensor=1)
    config.batch_size = given.fsdp  # one clip per group of context ranks
    config.remat = given.remat
    config.optimizer.name = given.optimizer
    config.ema_decay = given.ema_decay
    config.lora.rank = given.lora
    if given.tiny:
        config.dtype = "float32"
        config.dit.update(published_fields(TINY.dit))
    if given.lora:
        config.init_weights = "random"  # any name; `build_recipe` makes the base model
    return config


def build_recipe(config: Any, frames: int, grid: tuple[int, int], text: int) -> tuple[Any, Any]:
    """Returns the recipe of a run with random weights, and a batch (1, 1, ...) of every input.

    Args:
      config: the run's.
      frames, grid: latent frames, and their rows and columns.
      text: tokens of the caption.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.stage1 import inputs
    from sanawm_jax.core.params import from_leaves, leaves
    from sanawm_jax.core.sharding import place
    from sanawm_jax.dit.model import DiT
    from sanawm_jax.training.engine.precision import compute_dtype
    from sanawm_jax.training.objectives.stage1 import Stage1Objective
    from sanawm_jax.training.recipes.latent_source import LatentSource
    from sanawm_jax.training.recipes.stage1 import dit_config, recipe_of_latents

    model, dtype = dit_config(config), compute_dtype(config.dtype)

    class Objective(Stage1Objective):
        """Starts with random weights, and reads no folder."""

        def init(self, shardings: Any) -> Any:
            if not self.lora:
                return place(common.random_params(DiT, model, jnp.float32)[1], shardings)
            made = [
                (path, 0.02 * jax.random.normal(jax.random.key(i), leaf.shape))
                for i, (path, leaf) in enumerate(leaves(self.abstract))
            ]
            return place(from_leaves(dict(made)), shardings)

        def frozen(self) -> dict[str, Any]:
            return {"base": common.random_params(DiT, model, dtype)[1]} if self.lora else {}

    latents, conditions = inputs(model, frames, grid, text, jnp.float32, batch=1)
    rows = {
        "latents": latents,
        "camera": conditions.camera,
        "plucker": conditions.plucker,
        "text": conditions.text,
        "text_mask": conditions.text_mask,
    }
    batch = {name: np.repeat(np.asarray(a)[None], config.batch_size, 1) for name, a in rows.items()}
    null = (np.zeros(rows["text"].shape[1:], np.float32), np.ones((text,), np.int32))
    source = LatentSource(size=1, frames=frames, grid=grid, null=null)
    workdir = Path(tempfile.gettempdir())  # nothing is written there
    objective = Objective(config, model, frames)
    return recipe_of_latents(config, workdir, model, objective, source), batch


def measure(given: argparse.Namespace, frames: int) -> dict[str, Any]:
    """Returns the line of one length."""
    import jax
    import jax.numpy as jnp

    from sanawm_jax.core.sharding import make_mesh, place_batches, place_signals
    from sanawm_jax.runtime.failures import explain
    from sanawm_jax.runtime.peak import mfu, peak_flops
    from sanawm_jax.training.engine.loop import start_run

    config = run_config(given)
    grid, text = ((2, 2), 8) if given.tiny else ((22, 40), 300)
    name = f"adapters of rank {given.lora}" if given.lora else "all weights"
    kind = "chunk-causal" if given.chunk_causal else "bidirectional"
    line: dict[str, Any] = {
        "side": "ours",
        "what": f"{kind} training step of {name}, {frames} latent frames",
        "latent_frames": frames,
        "mesh": {"fsdp": given.fsdp, "context": given.context},
    }
    mesh = make_mesh(**config.mesh.to_dict())
    device = mesh.devices.flat[0]
    with jax.set_mesh(mesh):
        try:
            recipe, batch = build_recipe(config, frames, grid, text)
            state, resident, steps = start_run(mesh, config, recipe)
            arguments = (
                resident,
                place_batches(batch, mesh, config.batch_size),
                jax.random.key(config.seed),
                place_signals(mesh, 0.0, 0.0),
            )
            compiled: Any = None
            metrics: dict[str, Any] = {}

            def step() -> None:
                nonlocal compiled, state, metrics
                if compiled is None:
                    compiled = steps.lower(state, *arguments).compile()  # pyright: ignore
                    line.update(plan(compiled))
                state, metrics = compiled(state, *arguments)
                jax.block_until_ready((state, metrics))

            line.update(common.timed(step, given.repeats))
        except Exception as error:
            if "out of device memory" not in (explain(error) or ""):
                raise
            return {**line, "error": "out of memory", "device": device.device_kind}
    peak = next((v["gemm"] * 1e12 for n, v in LIMITS.items() if n in device.device_kind), None)
    shares = {
        "mfu": mfu(
            recipe.flops * config.batch_size, line["seconds"], mesh.size, peak_flops(device)
        ),
        "of_achievable": mfu(recipe.flops * config.batch_size, line["seconds"], mesh.size, peak),
    }
    return {
        **line,
        **{key: share and round(share, 4) for key, share in shares.items()},
        "pflop": float(f"{recipe.flops / 1e15:.4g}"),
        "loss": float(jnp.ravel(metrics["loss"])[0]),
        **common.memory("ours"),
    }


def plan(compiled: Any) -> dict[str, float]:
    """Returns the GiB that the compiled step needs, and the part of them that is its arguments."""
    plan = compiled.memory_analysis()
    given, made = plan.argument_size_in_bytes, plan.output_size_in_bytes
    # The donated state is counted both as an argument and as a result.
    whole = given + made - plan.alias_size_in_bytes + plan.temp_size_in_bytes
    return {
        "needs_gib": round(whole / common.GIB, 4),
        "given_gib": round(given / common.GIB, 4),
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent_frames", type=int, nargs="+", help="21 41 61 81 101 121")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--chunk_causal", action="store_true", help="chunks of 3 latent frames")
    parser.add_argument("--remat", default="full", help="none, dots, full or parts")
    parser.add_argument("--optimizer", default="adamw", help="or muon (half the moments)")
    parser.add_argument("--ema_decay", type=float, default=0.0, help="0: no average")
    parser.add_argument("--fsdp", type=int, default=1, help="devices that divide the weights")
    parser.add_argument("--context", type=int, default=1, help="devices that divide the frames")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--repeats", type=int, default=3, help="steps for the median")
    parser.add_argument("--one", action="store_true", help="run all lengths in this process")
    given = parser.parse_args(arguments)
    use_compiler_flags()
    lengths = given.latent_frames or ([5] if given.tiny else [21, 41, 61, 81, 101, 121])
    # This share leaves enough memory for the libraries; JAX's default is 0.75.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    words = list(sys.argv[1:] if arguments is None else arguments)
    for frames in sorted(lengths):
        if given.one:
            print(json.dumps(measure(given, frames)), flush=True)
            continue
        # If --latent_frames is given twice, the last one is used.
        _, status = common.in_own_process([*words, "--latent_frames", str(frames), "--one"])
        if status:
            print(json.dumps({"latent_frames": frames, "error": status}), flush=True)


if __name__ == "__main__":
    main()
