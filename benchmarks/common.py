"""Shared parts of the benchmarks: a process per side, medians, peak memory, random weights.

A side is one of the implementations to compare: `ours` or `reference`. A script starts a process of
its own for every side, so that the memory of each side is measured alone. It prints one JSON line
per measurement: side, what, seconds (median), seconds of the first call, peak_gib, device. At the
end it prints one line per measurement with the ratio reference / ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sanawm_jax.runtime.compiler_flags import use_compiler_flags

ROOT = Path(__file__).parents[1]
GIB = 2**30
Measure = Callable[[argparse.Namespace], None]


def run_sides(
    parser: argparse.ArgumentParser,
    sides: dict[str, Measure],
    arguments: Sequence[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Runs one side in this process if `--side` names it, else every side in its own process.

    Args:
      parser: the parser with the script's own flags.
      sides: `ours` first, then the others. `reference` has a second form, `compiled`, which runs
        the same function with `given.compile`.
      arguments: the command line.

    Returns:
      Name of a measurement -> side -> its line; empty if only one side runs.
    """
    sides = {**sides, "compiled": sides["reference"]}
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--repeats", type=int, default=3, help="calls for the median")
    parser.add_argument("--peer", action="store_true", help="also run it with torch.compile")
    parser.add_argument("--side", choices=list(sides), help="run only this side, here")
    parser.add_argument(
        "--lines",
        type=Path,
        nargs="+",
        help="run nothing; compare the lines of sides in these files",
    )
    given = parser.parse_args(arguments)
    given.compile = given.side == "compiled"
    use_compiler_flags()
    if given.side:
        sides[given.side](given)
        return {}
    if not given.peer:
        del sides["compiled"]
    words = list(sys.argv[1:] if arguments is None else arguments)
    found: dict[str, dict[str, Any]] = {}
    for side in () if given.lines else sides:
        lines, status = in_own_process([*words, f"--side={side}"])
        for line in lines:
            found.setdefault(line["what"], {})[side] = line
        if status:
            print(json.dumps({"side": side, "error": status}), flush=True)
    for path in given.lines or ():
        try:
            for text in path.read_text().splitlines():
                line = json.loads(text)
                found.setdefault(line["what"], {})[line["side"]] = line
        except (OSError, ValueError, LookupError, TypeError) as error:
            parser.error(f"--lines {path}: no lines of --side ({error})")
    first = next(iter(sides))
    for what, lines in found.items():
        for side, line in lines.items():
            if side != first and first in lines:
                ratio = line["seconds"] / lines[first]["seconds"]
                print(json.dumps({"what": what, "side": side, "ratio": round(ratio, 3)}))
    return found


def in_own_process(words: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Starts this script in a new process, and prints and returns its lines and exit status."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, sys.argv[0], *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    lines = done.stdout.splitlines()
    for line in lines:
        print(line, flush=True)
    return [json.loads(line) for line in lines], done.returncode


def report(side: str, what: str, call: Callable[[], Any], repeats: int, **extra: Any) -> None:
    """Measures a call that waits for its own result, and prints the line.

    Args:
      side: the side that is measured.
      what: name of the measurement.
      call: the function to measure.
      repeats: calls after the first one, which compiles.
      extra: further fields of the line.
    """
    line = {"side": side, "what": what, **timed(call, repeats), **memory(side), **extra}
    print(json.dumps(line), flush=True)


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Returns `seconds`, the median of all calls but the first, and its time, `first_seconds`."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[1:] or times)
    return {"seconds": round(median, 4), "first_seconds": round(times[0], 2)}


def memory(side: str) -> dict[str, Any]:
    """Returns the peak of the device's memory, or of the process without an accelerator."""
    if side == "ours":
        import jax

        device = jax.devices()[0]
        stats = device.memory_stats() or {}
        name, peak = device.device_kind, stats.get("peak_bytes_in_use")
    else:
        import torch

        has_gpu = torch.cuda.is_available()
        name = torch.cuda.get_device_name() if has_gpu else "cpu"
        peak = torch.cuda.max_memory_allocated() if has_gpu else None
    if peak is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_gib": round(peak / GIB, 3), "device": name}


@functools.cache
def _normal(shape: tuple[int, ...], dtype: Any) -> Callable[[Any], Any]:
    """Returns a compiled function that draws an array of small random numbers for every key."""
    import jax

    def draw(key: jax.Array) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, dtype)

    # The arrays are drawn one after the other, because all at once need several times the memory.
    return jax.jit(lambda keys: jax.lax.map(draw, keys))


def random_leaf(path: str, key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns random values with the scale that `fill_reference` gives to this parameter."""
    import jax
    import jax.numpy as jnp

    name = path.rpartition(".")[2]
    if name == "decay_rate_log":
        return jax.random.uniform(key, shape, dtype, -1.0, 2.0)
    if name == "decay_step":
        return jax.random.uniform(key, shape, dtype, -6.0, -2.0)
    if name in ("scale", "latents_std"):
        return jnp.ones(shape, dtype)
    if name in ("kernel", "taps") or "table" in name:
        return _normal(shape[1:], dtype)(jax.random.split(key, shape[0]))
    return jnp.zeros(shape, dtype)


def random_layers(path: str, key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Works as `random_leaf`, with one array per layer; see `core.stack.over_layers`."""
    import jax

    from sanawm_jax.core.stack import stacked_axes

    if not stacked_axes(path):
        return random_leaf(path, key, shape, dtype)
    keys = jax.random.split(key, shape[0])[:, None]
    return tuple(random_leaf(path, k[0], (1, *shape[1:]), dtype)[0] for k in keys)


def random_params(
    module: Any,
    config: Any,
    dtype: Any,
    place: Callable[[str, Any], Any] | None = None,
    draw: Callable[..., Any] = random_leaf,
) -> tuple[Any, Any]:
    """Returns a graph definition and random parameters on the device, made one after the other.

    `place` is as in `keymap.load`; `draw` is `random_leaf` or `random_layers`.
    """
    import jax

    from sanawm_jax.core.params import build, from_leaves, leaves

    graphdef, abstract = build(module, config)
    flat = {}
    for i, (path, leaf) in enumerate(leaves(abstract)):
        flat[path] = draw(path, jax.random.key(i), leaf.shape, dtype)
        if place is not None:
            flat[path] = place(path, flat[path])
    return graphdef, from_leaves(flat)


def random_dit(config: Any, dtype: Any, precision: str) -> tuple[Any, Any]:
    """Returns `random_params` of the DiT, rounded if in FP8; see `sampling.precision`."""
    from sanawm_jax.core.float8 import quantising
    from sanawm_jax.dit.model import DiT
    from sanawm_jax.sampling.precision import build_dit

    if precision == "bf16":
        return random_params(DiT, config, dtype)
    graphdef, abstract = build_dit(config, precision)
    return graphdef, random_params(DiT, config, dtype, quantising(abstract, None))[1]


def fill_reference(model: Any, device: str, dtype: Any) -> Any:
    """Moves a reference module from the meta device to a real one, with random weights."""
    model = model.to_empty(device=device).to(dtype)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("A_log"):
            tensor.data.uniform_(-1, 2)
        elif name.endswith("dt_bias"):
            tensor.data.uniform_(-6, -2)
        elif name.endswith("latents_std") or ("norm" in name and name.endswith("weight")):
            tensor.data.fill_(1.0)
        elif tensor.ndim >= 2:
            tensor.data.normal_(0, 0.02)
        else:
            tensor.data.zero_()
    return model.eval()


def torch_device(tiny: bool) -> tuple[str, Any]:
    """Returns the reference's device, and its dtype: bfloat16, or float32 with `--tiny`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, torch.float32 if tiny else torch.bfloat16


def jax_dtype(tiny: bool) -> Any:
    """Returns our dtype, which is the same as that of `torch_device`."""
    import jax.numpy as jnp

    return jnp.float32 if tiny else jnp.bfloat16


def wait_torch() -> None:
    """Waits for the accelerator, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
