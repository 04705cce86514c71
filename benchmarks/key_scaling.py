"""Shows why the recurrence scales its keys: one small run with three scalings, and a figure.

    python -m benchmarks.key_scaling --workdir=DIR --out=docs/key_scaling.png  # 8 minutes
    python -m benchmarks.key_scaling --tiny --workdir=DIR

A frame writes the keys of all its P tokens, of size D, into the state S at once. The new state is
S W + U with W = g (I - K^T diag(beta) K). If the keys are multiplied by 1/sqrt(D P), the norm of W
stays near one or below. If they are multiplied by 1/sqrt(D), or not at all, this norm grows with P,
and every frame multiplies the state by it. The model always has the first factor. This script
replaces `dit.attention.key_factor` by the others.

The script renders clips of the small world, encodes them with its autoencoder, and trains on them
with the step of `train.py`. Every scaling has the same weights, batches, noise and learning rate,
and no update is skipped. A run ends when its loss or gradient is not a finite number. The script
prints JSON lines: step, loss, gradient norm, and the largest number in the state of any layer for
the clips of the first batch. null stands for a number that is not finite.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs import common as recipes
from sanawm_jax.core.sharding import make_mesh, place_batches, place_signals
from sanawm_jax.data.loader import Loader
from sanawm_jax.dit import attention
from sanawm_jax.runtime.compiler_flags import use_compiler_flags
from sanawm_jax.training.curves import panels, smooth
from sanawm_jax.training.engine.loop import start_run
from sanawm_jax.training.engine.recipe import Recipe
from sanawm_jax.training.recipes.stage1 import dit_recipe

_SMALL_WORLD = Path(attention.__file__).parents[1] / "small_world/assets/small_world"
# the factors of the keys, as functions of D and P
KEY_FACTORS: dict[str, Callable[[int, int], float]] = {
    "1/sqrt(D*S)": attention.key_factor,
    "1/sqrt(D)": lambda size, tokens: size**-0.5,
    "none": lambda size, tokens: 1.0,
}
_PER_CALL = 10  # training steps per call


def run_config(given: argparse.Namespace) -> ConfigDict:
    """Returns a run of two recurrent layers on 48 clips of 129 frames of 64x64 pixels.

    They are 17 latent frames of 64 tokens. There are no softmax layers, because they do not scale
    keys, and because pre-training begins without them (`configs/curriculum.py`).
    """
    config = recipes.training("dit")
    config.update(recipes.stage1())
    config.dtype = "float32"
    config.vae_dir, config.text_dir = str(_SMALL_WORLD / "vae"), str(_SMALL_WORLD)
    config.text_length, config.cache_batch, config.views = 64, 4, 1
    side, frames, clips = (16, 17, 4) if given.tiny else (64, 129, 48)
    config.synthetic = ConfigDict(dict(clips=clips, num_frames=frames, height=side, width=side))
    config.dit = ConfigDict(
        dict(
            num_layers=2,
            softmax_every_n=0,
            hidden_size=64,
            num_attention_heads=4,
            linear_head_dim=16,
            chunk_plucker_post_attn_blocks=2,
            mlp_ratio=1.5,
        )
    )
    config.unroll = True
    config.batch_size = 2
    config.steps = given.steps
    config.steps_per_call = _PER_CALL
    config.ema_decay = 0.0
    config.spike.policy = "none"
    config.optimizer.update(learning_rate=given.learning_rate, warmup_steps=100)
    return config


def largest_state(recipe: Recipe, params: Any, resident: Any, batch: Any, key: jax.Array) -> float:
    """Returns the largest magnitude in the states of all layers in one forward pass, or NaN.

    Args:
      recipe, params, resident: the training run.
      batch: (B,) indices of clips.
      key: random key of their noise.
    """
    found: list[float] = []
    update: Any = recipe.update
    run = attention.recurrent_states

    def watched(*args: Any, **named: Any) -> Any:
        states, last = run(*args, **named)
        jax.debug.callback(lambda a: found.append(float(a)), jnp.max(jnp.abs(states)))
        return states, last

    with mock.patch.object(attention, "recurrent_states", watched):
        # A new function, so that jit does not reuse an earlier trace without the callback.
        loss = jax.jit(lambda p, r, b, k: update.loss(p, update.prepare(r, b, k))[0])
        jax.block_until_ready(loss(params, resident, batch, key))
    jax.effects_barrier()
    return float(np.max(found))


def train(config: ConfigDict, recipe: Recipe, name: str) -> list[dict[str, Any]]:
    """Trains, prints lines, and returns the rows of all steps until the run ends or diverges."""
    mesh = make_mesh(**config.mesh.to_dict())
    rows: list[dict[str, Any]] = []
    with jax.set_mesh(mesh):
        state, resident, steps = start_run(mesh, config, recipe)
        loader = Loader(range(recipe.size), config.batch_size, seed=config.seed)
        key = jax.random.key(config.seed)
        signals = place_signals(mesh, 0.0, 0.0)
        begun, watched = time.perf_counter(), None
        for step in range(0, config.steps, _PER_CALL):
            indices = loader.next(min(_PER_CALL, config.steps - step))
            watched = indices[0] if watched is None else watched
            is_shown = step % (20 * _PER_CALL) == 0
            size = None
            if is_shown:
                size = largest_state(recipe, state.model.params, resident, watched, key)
            batches = place_batches(indices, mesh, config.batch_size)
            state, metrics = steps(state, resident, batches, key, signals)
            values = [np.asarray(metrics[n], np.float64) for n in ("loss", "grad_norm")]
            for i, (loss, norm) in enumerate(zip(*values, strict=True)):
                row = {"key_scale": name, "step": step + i + 1, "loss": loss, "grad_norm": norm}
                if i == 0 and size is not None:
                    row["largest_state"] = size
                rows.append(row)
                is_over = not (math.isfinite(loss) and math.isfinite(norm))
                if (i == 0 and is_shown) or is_over or row["step"] == config.steps:
                    seconds = round(time.perf_counter() - begun, 1)
                    print(json.dumps({**_json(row), "seconds": seconds}), flush=True)
                if is_over:
                    return rows
        loader.close()
    return rows


def _json(row: dict[str, Any]) -> dict[str, Any]:
    def value(a: Any) -> Any:
        if not isinstance(a, float):
            return a
        return float(f"{a:.4g}") if math.isfinite(a) else None

    return {name: value(a) for name, a in row.items()}


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """Draws loss and gradient norm by step, with a curve per scaling, and a cross at a divergence.

    The thick lines of the loss are means over twenty steps.
    """
    colours = dict(zip(KEY_FACTORS, ("#1f4e9c", "#d9822b", "#b3261e"), strict=True))
    with panels(out, 2, (10, 3.4)) as axes:
        for name, rows in runs.items():
            colour, last = colours[name], rows[-1]
            is_over = not (math.isfinite(last["loss"]) and math.isfinite(last["grad_norm"]))
            label = f"{name}: no number at step {last['step']}" if is_over else name
            for axis, metric in zip(axes, ("loss", "grad_norm"), strict=True):
                known = [(row["step"], row[metric]) for row in rows if math.isfinite(row[metric])]
                x, y = np.array(known, np.float64).reshape(-1, 2).T
                if metric == "loss":
                    axis.plot(x, y, color=colour, alpha=0.3, linewidth=0.6)
                    axis.plot(x, smooth(y, 20), color=colour, label=label)
                else:  # a mean would show only the peaks
                    axis.plot(x, y, color=colour, linewidth=0.8)
                if is_over:
                    # The cross is at the last finite number, or at the top if there is none.
                    place = (last["step"], y[-1]) if len(y) else (last["step"], 0.95)
                    transform = axis.transData if len(y) else axis.get_xaxis_transform()
                    axis.plot(*place, "X", color=colour, markersize=8, transform=transform)
        for axis, title in zip(axes, ("loss", "gradient norm"), strict=True):
            axis.set(xlabel="step", ylabel=title, xscale="log", yscale="log")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)


def main(arguments: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Runs one command line and returns the rows of every scaling."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument(
        "--key_scales", nargs="+", choices=list(KEY_FACTORS), default=[*KEY_FACTORS]
    )
    parser.add_argument("--out", type=Path, help="write the curves to this PNG file")
    parser.add_argument("--workdir", type=Path, help="the folder of the encoded clips")
    parser.add_argument("--tiny", action="store_true", help="clips of 3 latent frames, 4 tokens")
    given = parser.parse_args(arguments)
    use_compiler_flags()
    config = run_config(given)
    with tempfile.TemporaryDirectory() as folder:
        workdir = given.workdir or Path(folder)
        recipe = dit_recipe(config, workdir)
        runs = {}
        for name in given.key_scales:
            with mock.patch.object(attention, "key_factor", KEY_FACTORS[name]):
                runs[name] = train(config, recipe, name)
        lines = [json.dumps(_json(row)) + "\n" for rows in runs.values() for row in rows]
        (workdir / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    if given.out:
        draw(runs, given.out)
    return runs


if __name__ == "__main__":
    main()
