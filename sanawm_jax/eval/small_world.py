"""How well a small-world model follows the camera and what its video is worth.

    python -m sanawm_jax.eval.small_world --scenes 56 --json table.json --sheet sheet.png
    python -m sanawm_jax.eval.small_world --minute --json table.json

Prints the figures as the model card shows them; docs/evaluation.md says what they are.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from sanawm_jax.eval.command import Run, make_parser, sampler_of, workers
from sanawm_jax.eval.metrics import psnr
from sanawm_jax.eval.minute import add_minute_flags, minute
from sanawm_jax.eval.runner import Clip, Row, evaluate
from sanawm_jax.eval.scenes import METRICS, make_clip, path_of_truth, plan
from sanawm_jax.eval.summary import BY_QUARTER, CAMERA, mean, show, summary
from sanawm_jax.media.video import as_float
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.errors import InputError

# every how many clips the autoencoder and the pose search are also tried on the truth
_TRUTH_EVERY = 4


def run(options: argparse.Namespace) -> tuple[dict[str, Any], Run]:
    """Figures of stage 1, and the PSNR of the autoencoder alone.

    Raises:
      InputError: no scene, or weights that cannot be used.
    """
    import jax.numpy as jnp

    model, sample_frames = sampler_of(options)

    def make(name: str) -> Clip:
        task = plan(int(name), options.num_frames, options.height, options.width)
        truth = task.render(task.c2w)
        videos = {"stage1": sample_frames(task, truth[0])}
        return make_clip(task, truth, videos, index=int(name))

    def of_the_truth(clip: Clip, video: np.ndarray) -> Row:
        if clip.facts["index"] % _TRUTH_EVERY or clip.truth is None:
            return {}
        signed = jnp.asarray(as_float(clip.truth) * 2 - 1, jnp.float32)
        decoded = model.decode(model.encode(signed[None]))
        return {"vae_psnr": psnr(decoded, clip.truth).mean(), **path_of_truth(clip, video)}

    this = Run(options, [options.weights])
    metrics = {**METRICS, "of_the_truth": of_the_truth}
    names = [f"{index}" for index in range(options.scenes)]
    rows = evaluate(names, make, metrics, this.store, workers())
    this.rows = rows
    stage1 = [row["stages"]["stage1"] for row in rows]
    table = {"clips": options.scenes, "steps": options.steps, "cfg_scale": options.cfg_scale}
    table |= summary(stage1) | {"vae_psnr": mean(row.get("vae_psnr") for row in stage1)}
    if options.minute:
        table["minute"] = minute(options, sample_frames, this)
    return table, this


def table_lines(table: dict[str, Any]) -> list[str]:
    """The figures as the model card shows them."""
    lines = [f"clips                {table['clips']}"]
    lines.append(f"camera following     {table['camera_following']:.1%}")
    if table["confused"]:
        lines.append(f"  confused           {' '.join(table['confused'])}")
    lines.append(f"VAE reconstruction   {table['vae_psnr']:.2f} dB")
    lines += [f"{label}: {show(table[name], 3)}" for name, label in CAMERA.items()]
    lines.append(f"{'quarter':33}" + "".join(f"{q:>9}" for q in range(1, 5)))
    for name, (label, _, digits) in BY_QUARTER.items():
        values = table[f"{name}_by_quarter"]
        lines.append(f"{label:33}" + "".join(f"{show(v, digits):>9}" for v in values))
    for name, value in table.get("minute", {}).items():
        if isinstance(value, float | int):
            lines.append(f"minute: {name} {show(value, 3)}")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = make_parser(__doc__, "small_world_sheet.png")
    add_minute_flags(parser)
    options = parser.parse_args(argv)
    try:
        table, this = run(options)
        print("\n".join(table_lines(table)))
        this.write(table, f"Small world: {options.weights}")
    except InputError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
