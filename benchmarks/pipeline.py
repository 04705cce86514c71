"""The whole way from a picture to frames, with the refiner: ours and diffusers' on one device.

    python -m sanawm_jax.weights.random_init --part all --out DIR
    python -m benchmarks.pipeline --weights DIR --refiner_weights DIR-refiner
    python -m benchmarks.pipeline --tiny

Both read the same folders, released or random. The time is of one call, weights read before it
where the side keeps them; the first call, which also compiles, is in `first_seconds`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common

PROMPT = "A slow forward camera move through a quiet city street."


def _request(given: argparse.Namespace) -> dict[str, Any]:
    from PIL import Image

    height, width = (64, 64) if given.tiny else (704, 1280)
    frames, steps = (9, 2) if given.tiny else (given.num_frames, given.steps)
    return {
        "image": Image.new("RGB", (width, height), (120, 140, 160)),
        "action": f"w-{frames - 1}",
        "intrinsics": [0.6 * width, 0.6 * width, width / 2, height / 2],
        "height": height,
        "width": width,
        "num_frames": frames,
        "steps": steps,
    }


def ours(given: argparse.Namespace) -> None:
    """Measures `SanaWM`, then `LTX2Refiner` and the decoder."""
    import jax.numpy as jnp
    import numpy as np
    from einops import rearrange

    from sanawm_jax.pipeline.generate import SanaWM
    from sanawm_jax.pipeline.stage2 import LTX2Refiner

    dtype = "float32" if given.tiny else "bfloat16"
    options = _request(given)
    image = options.pop("image")
    options["intrinsics"] = ",".join(map(str, options["intrinsics"]))
    model = SanaWM.from_pretrained(given.weights, dtype=dtype, offload=given.offload)
    refiner = LTX2Refiner.from_pretrained(given.refiner_weights, dtype=dtype, offload=given.offload)

    def run() -> None:
        latents = model(image, PROMPT, decode=False, progress=False, **options).latents
        model.release()
        refined = refiner(latents, PROMPT, progress=False)
        for window in model.decode_stream(
            jnp.asarray(rearrange(refined, "B C F H W -> B F H W C"))
        ):
            assert np.isfinite(window).all()

    common.report("ours", f"{options['num_frames']} frames", run, given.repeats)


def reference(given: argparse.Namespace) -> None:
    """Measures `SanaWMPipeline` and `SanaWMLTX2Refiner`, offloaded as their documents advise."""
    import torch
    from diffusers import SanaWMLTX2Refiner, SanaWMPipeline

    device, dtype = common.torch_device(given.tiny)
    stage1: Any = SanaWMPipeline.from_pretrained(given.weights, torch_dtype=dtype)
    refiner: Any = SanaWMLTX2Refiner.from_pretrained(given.refiner_weights, torch_dtype=dtype)
    for pipeline in (stage1, refiner):
        pipeline.set_progress_bar_config(disable=True)
        if device == "cuda":
            pipeline.enable_model_cpu_offload()
        if given.compile:
            blocks = getattr(pipeline.transformer, "blocks", None)
            blocks = pipeline.transformer.transformer_blocks if blocks is None else blocks
            for i, block in enumerate(blocks):
                blocks[i] = torch.compile(block)
    stage1.vae.enable_tiling()
    stage1.vae.use_framewise_decoding = True
    options = _request(given)
    image, steps = options.pop("image"), options.pop("steps")

    def run() -> None:
        with torch.no_grad():
            out = stage1(
                image, PROMPT, num_inference_steps=steps, guidance_scale=5.0, output_type="latent",
                **options,
            )  # fmt: skip
            latents = torch.as_tensor(out.latent).to(dtype)
            refined = refiner(latents, PROMPT, fps=16.0, output_type="latent")
            stage1._decode_latents(refined)
        common.wait_torch()

    common.report(given.side, f"{options['num_frames']} frames", run, given.repeats)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="stage 1, diffusers layout")
    parser.add_argument("--refiner_weights", help="the refiner, diffusers layout")
    parser.add_argument("--num_frames", type=int, default=161)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--offload", default="model", choices=["none", "model", "block"])
    words, _ = parser.parse_known_args(arguments)
    if words.weights and words.refiner_weights:
        common.run_sides(parser, {"ours": ours, "reference": reference}, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        import sys

        from sanawm_jax.pipeline.random_weights import TINY, write_random

        given = list(sys.argv[1:] if arguments is None else arguments)
        if "--tiny" not in given:
            parser.error("give --weights and --refiner_weights, or --tiny")
        made = write_random(Path(folder) / "w", part="all", sizes=TINY)
        given += [f"--weights={made[0]}", f"--refiner_weights={made[1]}"]
        common.run_sides(parser, {"ours": ours, "reference": reference}, given)


if __name__ == "__main__":
    main()
