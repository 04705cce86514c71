"""What the benchmarks share: a process a side, medians, peak memory, random weights.

Each script starts itself once for every side, so that one side's memory is never the other's, and
prints one JSON line a measurement: side, what, seconds (median), seconds of the first call,
peak_gib, the device. A last line a measurement has the ratio reference / ours.
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
    """Runs one side in this process if `--side` names it, else all sides, each in its own.

    Args:
      parser: of the script's own flags.
      sides: `ours` first, then what it is compared with. `reference` has a second form, `compiled`,
        for which it reads `given.compile`.
      arguments: of the command line.

    Returns:
      name of a measurement -> side -> its line; empty for one side.
    """
    sides = {**sides, "compiled": sides["reference"]}
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--repeats", type=int, default=3, help="calls that the median is of")
    parser.add_argument("--peer", action="store_true", help="torch.compile the reference, too")
    parser.add_argument("--side", choices=list(sides), help="only this one, in this process")
    parser.add_argument(
        "--lines",
        type=Path,
        nargs="+",
        help="run nothing, compare what sides printed to these files",
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
    """Starts this script anew, prints its lines, and returns them with the exit status."""
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
    """Times a call that waits for its own result, and prints its line.

    Args:
      side: who is measured.
      what: name of the measurement.
      call: runs it once.
      repeats: calls after the first, which compiles.
      extra: further fields of the line.
    """
    line = {"side": side, "what": what, **timed(call, repeats), **memory(side), **extra}
    print(json.dumps(line), flush=True)


def timed(call: Callable[[], Any], repeats: int) -> dict[str, float]:
    """`seconds`, the median of the calls after the first, and `first_seconds`, of that one."""
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    median = statistics.median(times[1:] or times)
    return {"seconds": round(median, 4), "first_seconds": round(times[0], 2)}


def memory(side: str) -> dict[str, Any]:
    """Peak of the device's memory, or of the process's where there is no accelerator."""
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
    """A compiled function that draws small random numbers, an array for every key."""
    import jax

    def draw(key: jax.Array) -> jax.Array:
        return 0.02 * jax.random.normal(key, shape, dtype)

    # one after the other: all at once need several times their memory
    return jax.jit(lambda keys: jax.lax.map(draw, keys))


def random_leaf(path: str, key: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """A random array of the size that `fill_reference` gives a parameter of that name."""
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
    """`random_leaf`, its layers separate if it has any; see `core.stack.over_layers`."""
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
    """Graph definition and random parameters on the device, a leaf at a time.

    `place` as `keymap.load`'s; `draw` is `random_leaf` or `random_layers`.
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
    """`random_params` of the DiT, in FP8 the same numbers rounded; see `pipeline.precision`."""
    from sanawm_jax.core.float8 import quantising
    from sanawm_jax.dit.model import DiT
    from sanawm_jax.sampling.precision import build_dit

    if precision == "bf16":
        return random_params(DiT, config, dtype)
    graphdef, abstract = build_dit(config, precision)
    return graphdef, random_params(DiT, config, dtype, quantising(abstract, None))[1]


def fill_reference(model: Any, device: str, dtype: Any) -> Any:
    """Gives a reference module made on the meta device random weights on a real one."""
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
    """The reference's device and dtype: bfloat16 on an accelerator, float32 for `--tiny`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    return device, torch.float32 if tiny else torch.bfloat16


def jax_dtype(tiny: bool) -> Any:
    """Our dtype, as `torch_device`'s."""
    import jax.numpy as jnp

    return jnp.float32 if tiny else jnp.bfloat16


def wait_torch() -> None:
    """Waits for the accelerator, if there is one."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
