"""A guided step of stage 1 whose latent frames are divided over several GPUs.

    python -m benchmarks.devices --devices 1 2 --latent_frames 121
    python -m benchmarks.devices --devices 1 2 --tiny     # on virtual devices of a CPU

The weights are random and have the released size; 704x1280 pixels, bfloat16, two prompts. Every
number of devices runs in its own process, so that its peak memory is measured alone. `peak_gib` is
that of the device that uses most. The last lines compare the latents of a step with
`--compared_frames` frames: several devices with one device, both in bfloat16; and one device in
bfloat16 with float32, which shows the size of bfloat16's own error.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common


def step_of(devices: int, dtype: Any, frames: int, given: argparse.Namespace) -> Any:
    """Returns a function that runs one step and returns its latents (1, F, H, W, C)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    from benchmarks.stage1 import inputs, sizes
    from sanawm_jax.core.sharding import make_mesh
    from sanawm_jax.dit.model import DiT
    from sanawm_jax.sampling.stage1 import denoise_step

    config, _, grid, text = sizes(given)
    mesh = make_mesh(context=devices)
    whole = NamedSharding(mesh, PartitionSpec())
    drawn = common.jax_dtype(given.tiny)  # float32 gets the same numbers, not more precise ones

    def place(tree: Any) -> Any:
        def one(a: Any) -> Any:
            a = a.astype(dtype) if a.dtype == drawn else a
            return jax.device_put(a, whole)

        return jax.tree.map(one, tree)

    graphdef, params = common.random_params(DiT, config, drawn, place=lambda _, a: place(a))
    start, conditions = place(inputs(config, frames, grid, text, drawn))

    def step() -> Any:
        with jax.set_mesh(mesh):
            found = denoise_step(
                graphdef,
                params,
                jnp.array(start),  # a copy, because the latents are donated to the step
                conditions,
                *map(np.float32, (0.7, 0.6, 5.0)),
                dtype=dtype,
            )
            return jax.block_until_ready(found)

    return step


def measure(given: argparse.Namespace) -> None:
    """Prints the line of one number of devices, and stores latents for the comparison."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    devices = given.devices[0]
    dtype = jnp.float32 if given.exact else common.jax_dtype(given.tiny)
    if not given.exact:
        frames = 5 if given.tiny else given.latent_frames
        step = step_of(devices, dtype, frames, given)
        line = common.timed(step, given.repeats)
        peaks = [(d.memory_stats() or {}).get("peak_bytes_in_use", 0) for d in jax.devices()]
        what = f"step of {frames} latent frames on {devices} devices"
        extra = {"peak_gib": round(max(peaks) / common.GIB, 3), "devices": devices}
        device = jax.devices()[0].device_kind
        print(json.dumps({"what": what, **line, **extra, "device": device}), flush=True)
        del step
    frames = 5 if given.tiny else given.compared_frames
    found = step_of(devices, dtype, frames, given)()
    name = f"{devices}_{'float32' if given.exact else 'bfloat16'}.npy"
    np.save(Path(given.kept) / name, np.asarray(found, np.float32))


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line."""
    import sys

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--latent_frames", type=int, default=121)
    parser.add_argument("--compared_frames", type=int, default=11)
    parser.add_argument("--repeats", type=int, default=3, help="steps for the median")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--kept", default="", help=argparse.SUPPRESS)
    parser.add_argument("--exact", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.kept:
        common.use_compiler_flags()
        measure(given)
        return
    words = list(sys.argv[1:] if arguments is None else arguments)
    if given.tiny:
        count = f"--xla_force_host_platform_device_count={max(given.devices)}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
    with tempfile.TemporaryDirectory() as kept:
        seconds = {}
        for devices in given.devices:
            lines, status = common.in_own_process(
                [*words, "--devices", str(devices), "--kept", kept]
            )
            if status:
                print(json.dumps({"devices": devices, "error": status}), flush=True)
            seconds.update({line["devices"]: line["seconds"] for line in lines})
        common.in_own_process([*words, "--devices", "1", "--kept", kept, "--exact"])
        compare(Path(kept), seconds)


def compare(kept: Path, seconds: dict[int, float]) -> None:
    """Prints speed-ups over one device, and relative differences of the latents."""
    import numpy as np

    found = {file.stem: np.load(file) for file in sorted(kept.glob("*.npy"))}
    one = found.pop("1_bfloat16", None)
    if one is None:
        return
    for name, latents in found.items():
        error = np.linalg.norm(latents - one) / np.linalg.norm(one)
        line = {"what": f"{name} against 1_bfloat16", "relative": float(f"{error:.3g}")}
        devices = int(name.split("_")[0])
        if devices > 1 and {1, devices} <= seconds.keys():
            line["speed_up"] = round(seconds[1] / seconds[devices], 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
