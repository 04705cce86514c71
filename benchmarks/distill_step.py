"""One update of self-forcing at the released size: seconds, utilisation, peak memory.

    python -m benchmarks.distill_step                             # 43 latent frames, all weights
    python -m benchmarks.distill_step --lora 64                   # adapters of student and critic
    python -m benchmarks.distill_step --cached 2 --latent_frames 121
    python -m benchmarks.distill_step --tiny                      # a minute on a CPU

The step is the one that `train.py` compiles for `configs/distill.py:self_forcing_t43`, on one
device: student, critic and frozen teacher of 2.66 B parameters each, one clip of 704x1280 pixels,
300 text tokens. Weights are random and never zero. A step with an update of the student and one of
the critic alone are measured; `seconds` is the mean of a whole cycle of `student_every` steps. The
line has `needs_gib` and `given_gib` of the compiler's plan, the measured peak, and `mfu` of the
operations that `training/recipes/self_forcing.py` counts. If the step does not fit, the line has
`error`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.train_step import plan
from sanawm_jax.runtime.compiler_flags import use_compiler_flags


def run_config(given: argparse.Namespace) -> Any:
    """Returns the configuration of a run on one device."""
    from configs import distill

    config = distill.get_config("smoke" if given.tiny else "self_forcing_t43")
    config.mesh.update(data=1, context=1)
    config.batch_size = given.batch
    config.remat = given.remat
    config.frames = config.synthetic.latent_frames = given.latent_frames or (
        7 if given.tiny else 43
    )
    config.window.update(cached=given.cached, sink=given.cached > 0)
    config.student.lora.rank = config.critic.lora.rank = given.lora
    config.optimizer.moments_dtype = config.critic.optimizer.moments_dtype = given.moments
    return config


def build_recipe(config: Any) -> tuple[Any, Any]:
    """Returns the recipe with random weights, and a batch (1, B, ...) of every input."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.stage1 import inputs
    from sanawm_jax.dit.model import DiT
    from sanawm_jax.training.recipes import self_forcing
    from sanawm_jax.training.recipes.distill import Distillation
    from sanawm_jax.training.recipes.latent_source import LatentSource

    made = config.synthetic
    grid, text = (made.height, made.width), 8 if config.dtype == "float32" else 300

    class Run(Distillation):
        """Reads no folder and no clips."""

        def _source(self) -> LatentSource:
            null = (
                np.zeros((text, self.model.caption_channels), np.float32),
                np.ones(text, np.int32),
            )
            return LatentSource(2, made.latent_frames, grid, null, read=lambda indices: None)

        def weights(self, name: str) -> Any:
            return common.random_params(DiT, self.model, jnp.float32)[1]

        def frozen(self, networks: Any, *, teacher: bool = True) -> Any:
            return {"teacher": common.random_params(DiT, self.model, self.dtype)[1]}

        def init(self, networks: Any, places: Any) -> Any:
            found = {}
            for name, network in networks.items():
                if network.base is None:
                    found[name] = self.weights(name)
                else:
                    found[name] = jax.tree.map(
                        lambda a: 0.02 * jax.random.normal(jax.random.key(0), a.shape),
                        network.abstract,
                    )
            return found if places is None else jax.device_put(found, places)

    original = self_forcing.Distillation
    self_forcing.Distillation = Run
    try:
        workdir = Path(tempfile.gettempdir())  # nothing is written there
        recipe = self_forcing.self_forcing_recipe(config, workdir)
    finally:
        self_forcing.Distillation = original
    model = recipe.update.run.model  # pyright: ignore[reportAttributeAccessIssue]
    latents, conditions = inputs(model, made.latent_frames, grid, text, jnp.float32, batch=1)
    rows = {
        "latents": latents,
        "camera": conditions.camera,
        "plucker": conditions.plucker,
        "text": conditions.text,
        "text_mask": conditions.text_mask,
    }
    return recipe, {
        n: np.repeat(np.asarray(a)[None], config.batch_size, 1) for n, a in rows.items()
    }


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Returns the line."""
    import jax

    from sanawm_jax.core.sharding import make_mesh, place_batches, place_signals
    from sanawm_jax.runtime.failures import explain
    from sanawm_jax.runtime.peak import mfu, peak_flops
    from sanawm_jax.training.engine.loop import start_run

    config = run_config(given)
    trained = f"adapters of rank {given.lora}" if given.lora else "all weights"
    line: dict[str, Any] = {
        "side": "ours",
        "what": f"self-forcing update of {trained}",
        "latent_frames": config.frames,
        "batch": config.batch_size,
        "cached": given.cached,
    }
    mesh = make_mesh(**config.mesh.to_dict())
    device = mesh.devices.flat[0]
    with jax.set_mesh(mesh):
        try:
            recipe, batch = build_recipe(config)
            state, resident, steps = start_run(mesh, config, recipe)
            arguments = (
                resident,
                place_batches(batch, mesh, config.batch_size),
                jax.random.key(config.seed),
                place_signals(mesh, 0.0, 0.0),
            )
            compiled = steps.lower(state, *arguments).compile()  # pyright: ignore
            line.update(plan(compiled))
            metrics: dict[str, Any] = {}

            def cycle(count: int) -> None:
                nonlocal state, metrics
                for _ in range(count):
                    state, metrics = compiled(state, *arguments)
                jax.block_until_ready((state, metrics))

            every = config.student_every
            whole = common.timed(lambda: cycle(every), given.repeats)
            cycle(1)  # the student's step; the next ones are the critic's
            critic = common.timed(lambda: cycle(1), min(every - 2, 3))
        except Exception as error:
            if "out of device memory" not in (explain(error) or ""):
                raise
            return {**line, "error": "out of memory", "device": device.device_kind}
    seconds = whole["seconds"] / every
    share = mfu(recipe.flops * config.batch_size, seconds, mesh.size, peak_flops(device))
    return {
        **line,
        "seconds": round(seconds, 4),
        "critic_seconds": critic["seconds"],
        "student_seconds": round(whole["seconds"] - (every - 1) * critic["seconds"], 4),
        "mfu": share and round(share, 4),
        "pflop": float(f"{recipe.flops * config.batch_size / 1e15:.4g}"),
        "loss": float(metrics["loss"][0]),
        **common.memory("ours"),
    }


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--latent_frames", type=int, default=0, help="43; 7 with --tiny")
    parser.add_argument("--batch", type=int, default=1, help="clips")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--cached", type=int, default=-1, help="earlier chunks in sight; -1: all")
    parser.add_argument("--remat", default="full", help="none, dots, full or parts")
    parser.add_argument("--moments", default="float32", help="or bfloat16")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in a minute")
    parser.add_argument("--repeats", type=int, default=2, help="cycles for the median")
    given = parser.parse_args(arguments)
    use_compiler_flags()
    # This share leaves enough memory for the libraries; JAX's default is 0.75.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    print(json.dumps(measure(given)), flush=True)


if __name__ == "__main__":
    main()
