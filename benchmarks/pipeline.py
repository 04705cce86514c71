"""The whole pipeline from an image to an mp4, ours and diffusers', on one device, by stage.

    python -m sanawm_jax.weights.random_init --part all --out DIR
    python -m benchmarks.pipeline --weights DIR --refiner_weights DIR-refiner --num_frames 961
    python -m benchmarks.pipeline --weights DIR       # only stage 1 and the decoder
    python -m benchmarks.pipeline --tiny

Both sides read the same folders, with released or random weights. There is a line for loading the
DiT from the disk, with the time of only reading its files. Other lines are for stage 1, the
refiner, and decoding into an mp4. The time of a stage is that of one call. `first_seconds` is the
time of the first call, which also reads weights and compiles. Our side runs every stage in its own
process, so `peak_gib` (device memory) and `host_gib` (host memory) are those of the stage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common

LATENTS = "latents.npy"
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


def _report(side: str, what: str, given: argparse.Namespace, call: Callable[[], Any]) -> None:
    what = f"{what}, {_request(given)['num_frames']} frames"
    line = {"side": side, "what": what, **common.timed(call, given.repeats), **common.memory(side)}
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**line, "host_gib": round(host / common.GIB, 3)}), flush=True)


def ours(given: argparse.Namespace) -> None:
    """Measures one stage, or starts a process per stage."""
    if given.stage:
        globals()[f"_{given.stage}"](given)
        return
    words = [word for word in sys.argv[1:] if not word.startswith("--side")]
    with tempfile.TemporaryDirectory() as folder:
        refiner = ["refiner"] if given.refiner_weights else []
        for stage in ("load", "stage1", *refiner, "decode"):
            more = ["--side=ours", f"--stage={stage}", f"--folder={folder}"]
            _, status = common.in_own_process([*words, *more])
            if status:
                raise SystemExit(status)


def _stage1_model(given: argparse.Namespace) -> Any:
    from sanawm_jax.sampling.generate import SanaWM

    dtype = "float32" if given.tiny else "bfloat16"
    return SanaWM.from_pretrained(given.weights, dtype=dtype, offload=given.offload)


def _load(given: argparse.Namespace) -> None:
    import jax

    model = _stage1_model(given)
    files = sorted(model.folder.part("transformer").glob("*.safetensors"))

    def read() -> None:
        for file in files:
            with file.open("rb", buffering=0) as stream:
                while stream.readinto(buffer):
                    pass

    def load() -> None:
        jax.block_until_ready(model.folder.load_dit(model.dtype)[2])

    buffer = bytearray(1 << 24)
    jax.block_until_ready(jax.numpy.zeros(1))  # starts the device before the measurement
    seconds = {}
    for name, call in (("read_seconds", read), ("load_seconds", load)):
        for file in files:
            _forget(file)
        seconds[name] = common.timed(call, 0)["seconds"]
    size = sum(file.stat().st_size for file in files)
    ratio = seconds["load_seconds"] / seconds["read_seconds"]
    line = {"what": "loading of the DiT", "file_gb": round(size / 1e9, 2), **seconds}
    print(json.dumps({"side": "ours", "seconds": seconds["load_seconds"], **line,
                      "over_reading": round(ratio, 2)}), flush=True)  # fmt: skip


def _forget(file: Path) -> None:
    """Removes a file from the page cache, so that the next read uses the disk."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _stage1(given: argparse.Namespace) -> None:
    import numpy as np

    options = _request(given)
    image = options.pop("image")
    options["intrinsics"] = ",".join(map(str, options["intrinsics"]))
    model, made = _stage1_model(given), []
    _report(
        "ours", "stage 1", given,
        lambda: made.append(model(image, PROMPT, decode=False, progress=False, **options).latents),
    )  # fmt: skip
    np.save(Path(given.folder) / LATENTS, made[-1])


def _refiner(given: argparse.Namespace) -> None:
    import numpy as np

    from sanawm_jax.sampling.refine import LTX2Refiner

    dtype = "float32" if given.tiny else "bfloat16"
    refiner = LTX2Refiner.from_pretrained(given.refiner_weights, dtype=dtype, offload=given.offload)
    file, made = Path(given.folder) / LATENTS, []
    latents = np.load(file)
    _report(
        "ours", "refiner", given,
        lambda: made.append(refiner(latents, PROMPT, progress=False)),
    )  # fmt: skip
    np.save(file, made[-1])


def _decode(given: argparse.Namespace) -> None:
    import jax.numpy as jnp
    import numpy as np

    from sanawm_jax.media.video import to_uint8, write_mp4
    from sanawm_jax.sampling.latents import channels_last

    model, file = _stage1_model(given), Path(given.folder) / LATENTS
    latents = jnp.asarray(channels_last(np.load(file)))

    def decode() -> None:
        for window in model.decode_stream(latents):
            assert np.isfinite(window).all()

    def write() -> None:
        windows = map(to_uint8, model.decode_stream(latents))
        write_mp4(Path(given.folder) / "video.mp4", itertools.chain.from_iterable(windows), 16.0)

    _report("ours", "decoding", given, decode)
    _report("ours", "decoding into an mp4", given, write)


def reference(given: argparse.Namespace) -> None:
    """Measures `SanaWMPipeline` and `SanaWMLTX2Refiner`, with the offload that their docs show."""
    import torch
    from diffusers import SanaWMLTX2Refiner, SanaWMPipeline

    device, dtype = common.torch_device(given.tiny)

    def opened(kind: Any, folder: str) -> Any:
        pipeline: Any = kind.from_pretrained(folder, torch_dtype=dtype)
        pipeline.set_progress_bar_config(disable=True)
        if device == "cuda":
            pipeline.enable_model_cpu_offload()
        if given.compile:
            blocks = getattr(pipeline.transformer, "blocks", None)
            blocks = pipeline.transformer.transformer_blocks if blocks is None else blocks
            for i, block in enumerate(blocks):
                blocks[i] = torch.compile(block)
        return pipeline

    def measure(what: str, call: Callable[[], Any]) -> Any:
        made = []

        def run() -> None:
            with torch.no_grad():
                made.append(call())
            common.wait_torch()

        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _report(given.side, what, given, run)
        return made[-1]

    stage1 = opened(SanaWMPipeline, given.weights)
    stage1.vae.enable_tiling()
    stage1.vae.use_framewise_decoding = True
    options = _request(given)
    image, steps = options.pop("image"), options.pop("steps")
    latents = measure(
        "stage 1",
        lambda: stage1(
            image, PROMPT, num_inference_steps=steps, guidance_scale=5.0, output_type="latent",
            **options,
        ),
    )  # fmt: skip
    latents = torch.as_tensor(latents.latent).to(dtype)
    if given.refiner_weights:
        refiner = opened(SanaWMLTX2Refiner, given.refiner_weights)
        latents = measure(
            "refiner", lambda: refiner(latents, PROMPT, fps=16.0, output_type="latent")
        )
    measure("decoding", lambda: stage1._decode_latents(latents))


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", help="stage 1 in diffusers layout")
    parser.add_argument("--refiner_weights", help="the refiner in diffusers layout")
    parser.add_argument("--num_frames", type=int, default=161)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--offload", default="model", choices=["none", "model", "block"])
    parser.add_argument("--stage", choices=["load", "stage1", "refiner", "decode"])
    parser.add_argument("--folder", help="the folder of the stages' latents")
    words, _ = parser.parse_known_args(arguments)
    if words.weights:
        common.run_sides(parser, {"ours": ours, "reference": reference}, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        from sanawm_jax.checkpoints.random_weights import write_random
        from sanawm_jax.checkpoints.sizes import TINY

        given = list(sys.argv[1:] if arguments is None else arguments)
        if "--tiny" not in given:
            parser.error("give --weights, or --tiny")
        made = write_random(Path(folder) / "w", part="all", sizes=TINY)
        given += [f"--weights={made[0]}", f"--refiner_weights={made[1]}"]
        common.run_sides(parser, {"ours": ours, "reference": reference}, given)


if __name__ == "__main__":
    main()
