"""How well a small-world model follows the camera and what its video is worth.

    python -m sanawm_jax.eval.small_world --scenes 56 --json table.json --sheet sheet.png

Prints the figures as the model card shows them; `eval.runner` says what they are.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from sanawm_jax.eval.metrics import psnr
from sanawm_jax.eval.runner import Task, evaluate, make_parser, sample_task, write_results
from sanawm_jax.runtime.command_line import fail
from sanawm_jax.runtime.errors import InputError


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Figures and strips of stage 1, and the PSNR of the autoencoder alone.

    Raises:
      InputError: no scene, or weights that cannot be used.
    """
    import jax.numpy as jnp

    from sanawm_jax.sampling.generate import SanaWM

    model = SanaWM.from_pretrained(options.weights, dtype="float32")
    vae_psnr = []

    def make(task: Task, truth: np.ndarray) -> dict[str, np.ndarray]:
        video = sample_task(model, task, options)
        assert video.frames is not None
        decoded = model.decode(model.encode(jnp.asarray(truth * 2 - 1)[None]))
        vae_psnr.append(psnr(decoded, truth).mean())
        return {"stage1": video.frames}

    table, strips = evaluate(options, make)
    figures = table.pop("stage1")
    return {**table, **figures, "vae_psnr": float(np.mean(vae_psnr))}, strips


def table_lines(table: dict[str, Any]) -> list[str]:
    """The figures as the model card shows them."""
    lines = [f"clips                {table['clips']}"]
    lines.append(f"camera following     {table['camera_following']:.1%}")
    if table["confused"]:
        lines.append(f"  confused           {' '.join(table['confused'])}")
    lines.append(f"VAE reconstruction   {table['vae_psnr']:.2f} dB")
    lines.append("quarter              " + "".join(f"{q:>9}" for q in range(1, 5)))
    lines.append("PSNR to truth, dB    " + "".join(f"{v:9.2f}" for v in table["psnr_by_quarter"]))
    lines.append("SSIM to truth        " + "".join(f"{v:9.4f}" for v in table["ssim_by_quarter"]))
    return lines


def main(argv: list[str] | None = None) -> None:
    """Runs one command line."""
    options = make_parser(__doc__, "small_world_sheet.png").parse_args(argv)
    try:
        table, strips = run(options)
    except InputError as error:
        fail(str(error))
    print("\n".join(table_lines(table)))
    write_results(table, strips, options)


if __name__ == "__main__":
    main()
