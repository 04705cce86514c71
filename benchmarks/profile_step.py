"""Where one step spends its time, kernel by kernel, and how close each part is to the limits.

    python -m benchmarks.profile_step --latent_frames 121               # a guided step, full size
    python -m benchmarks.profile_step --latent_frames 21 --backward    # loss, gradients, one clip
    python -m benchmarks.profile_step --refiner                        # one pass of the refiner
    python -m benchmarks.profile_step --tiny                           # seconds on a CPU

The weights are random and the dtype is bfloat16. The step runs under `jax.profiler`. The name of a
kernel leads to an instruction of the compiled program, and so to a named scope of the model. A
kernel that fuses several scopes belongs to the scope of its last instruction. The script prints one
JSON line per part, and then a table on stderr: milliseconds, share, kernels, TFLOP/s and GB/s with
their share of the card's limit. The bytes are the fewest that must move (`benchmarks/hlo.py`). If
the GB/s are above the limit, operands came from a cache. If they are far below it, memory does not
limit the kernel.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.hlo import CONTAINERS, Instruction, Program
from sanawm_jax.runtime.compiler_flags import options_on, use_compiler_flags

# Achievable bfloat16 TFLOP/s of large matrix products and of attention; nominal GB/s of memory.
LIMITS = {
    "H100": {"gemm": 685.0, "attention": 515.0, "memory": 3350.0},
    "H200": {"gemm": 685.0, "attention": 515.0, "memory": 4800.0},
}
# The named scopes of the model, and the part of a step to which each belongs. The innermost scope
# decides.
SCOPES = {
    "short_conv": "convolution",
    "ffn_conv": "convolution",
    "temporal_conv": "convolution",
    "attention": "attention",
    "gdn": "gdn",
    "ucpe": "element-wise",
    "rope": "element-wise",
    "adaln": "element-wise",
    "norm": "element-wise",
    "fp8": "element-wise",  # rounding to FP8; FP8 products are "gemm", with the limit of bfloat16
}
_NAMED = re.compile(r"\b(" + "|".join(SCOPES) + r")\b")


def part_of(program: Program, instruction: Instruction) -> tuple[str, str]:
    """Returns the part of the step and the scope, such as ("gdn", "gdn") or ("gemm", "other")."""
    named = _NAMED.findall(program.scope(instruction))
    scope = named[-1] if named else ""
    # A matrix product in an element-wise scope counts as a product.
    if scope and SCOPES[scope] != "element-wise":
        return SCOPES[scope], scope
    if program.flops(instruction):
        return "gemm", scope or "linear"
    if program.is_copy(instruction):
        return "copy", scope or "other"
    return "element-wise", scope or "other"


def kernels(trace: Path) -> Iterator[tuple[str, str, float]]:
    """Yields the instruction, the kernel and the nanoseconds of everything that a device ran.

    Args:
      trace: a folder that `jax.profiler.trace` wrote; its newest run is read.

    Raises:
      FileNotFoundError: the folder has no profile.
    """
    import jax

    files = sorted(trace.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"no profile in {trace}")
    planes = list(jax.profiler.ProfileData.from_file(str(files[-1])).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in devices or [plane for plane in planes if plane.name == "/host:CPU"]:
        for line in plane.lines:
            if devices and not (line.name or "").startswith("Stream"):
                continue  # such a line contains the events of other lines again
            for event in line.events:
                stats = dict(event.stats)
                name = stats.get("hlo_op")
                if name is not None or devices:
                    yield str(name or ""), event.name or "", float(event.duration_ns)


def summarise(
    program: Program, events: Sequence[tuple[str, str, float]], steps: int
) -> list[dict[str, Any]]:
    """Adds up the kernels by part and scope, and sorts the sums, the longest time first.

    Args:
      program: the program that ran.
      events: the result of `kernels`.
      steps: how often the program ran.
    """
    rows: dict[tuple[str, str], dict[str, float]] = collections.defaultdict(
        lambda: {"ms": 0.0, "kernels": 0, "flops": 0.0, "bytes": 0.0}
    )
    runs = executions(program, events)
    for name, kernel, nanoseconds in events:
        instruction = program.instructions.get(name)
        if instruction is None:
            is_copy = re.search("memcpy|memset", kernel, re.I)
            key = ("copy", "memcpy") if is_copy else ("unattributed", "other")
        elif instruction.opcode in CONTAINERS:
            continue
        else:
            key = part_of(program, instruction)
        row = rows[key]
        row["ms"] += nanoseconds * 1e-6 / steps
        row["kernels"] += 1 / steps
        if instruction is not None and (count := runs.pop(name, 0)):
            row["flops"] += program.flops(instruction) * count / steps
            row["bytes"] += program.bytes(instruction) * count / steps
    total = sum(row["ms"] for row in rows.values())
    lines = [
        {"part": part, "scope": scope, "share": row["ms"] / total, **row}
        for (part, scope), row in rows.items()
    ]
    return sorted(lines, key=lambda line: -line["ms"])


def executions(program: Program, events: Sequence[tuple[str, str, float]]) -> dict[str, int]:
    """Returns how often every instruction ran.

    An instruction may run several kernels (split reductions, attention), and some of them may have
    the same name. All instructions of a computation run equally often. So the smallest count of a
    kernel in the computation is the number of runs.
    """
    counts = collections.Counter((name, kernel) for name, kernel, _ in events)
    least: dict[str, int] = {}
    for (name, _), count in counts.items():
        least[name] = min(count, least.get(name, count))
    homes: dict[str, int] = {}
    for name, count in least.items():
        if name in program.instructions:
            home = program.home(name)
            homes[home] = min(count, homes.get(home, count))
    return {name: homes[program.home(name)] for name in least if name in program.instructions}


def longest(
    program: Program, events: Sequence[tuple[str, str, float]], steps: int, count: int
) -> list[str]:
    """Lists the instructions that take longest: ms per step, kernels, name, scope, result."""
    times: collections.Counter[str] = collections.Counter()
    kernels_of: collections.Counter[str] = collections.Counter()
    for name, kernel, nanoseconds in events:
        times[name or kernel] += nanoseconds  # pyright: ignore[reportArgumentType]
        kernels_of[name or kernel] += 1
    found = []
    for name, nanoseconds in times.most_common(count):
        instruction = program.instructions.get(name)
        scope, text = (program.scope(instruction), instruction.text) if instruction else ("", "")
        result = text.partition("=")[2].strip().partition(" ")[0][:60]
        found.append(
            f"{nanoseconds * 1e-6 / steps:9.3f} ms {kernels_of[name] / steps:6.0f}x"
            f"  {name[:36]:36}  {scope[-70:]}  {result}"
        )
    return found


def rates(line: dict[str, Any], device: str) -> dict[str, Any]:
    """Adds tflops, gbps and their shares of the card's limits, or None for an unknown card."""
    limits = next((limit for kind, limit in LIMITS.items() if kind in device), None)
    seconds = max(line["ms"] * 1e-3, 1e-12)
    tflops, gbps = line["flops"] / seconds * 1e-12, line["bytes"] / seconds * 1e-9
    peak = limits and limits["attention" if line["part"] == "attention" else "gemm"]
    return {
        **line,
        "tflops": tflops,
        "gbps": gbps,
        "of_peak": peak and tflops / peak,
        "of_memory": limits and gbps / limits["memory"],
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Formats the lines as a table."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.0f}%"

    head = ("part", "scope", "ms", "share", "kernels", "TFLOP/s", "of limit", "GB/s", "of limit")
    rows = [head] + [
        (
            line["part"],
            line["scope"],
            f"{line['ms']:.3f}",
            percent(line["share"]),
            f"{line['kernels']:.0f}",
            f"{line['tflops']:.1f}",
            percent(line["of_peak"]),
            f"{line['gbps']:.0f}",
            percent(line["of_memory"]),
        )
        for line in lines
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def build_step(given: argparse.Namespace, frames: int) -> tuple[Any, Callable[[Any], Any]]:
    """Returns a compiled step and a function that runs it once."""
    import jax
    import jax.numpy as jnp

    from benchmarks.stage1 import inputs
    from sanawm_jax.core.params import apply
    from sanawm_jax.sampling.stage1 import denoise_step

    config, _, grid, text = given.sizes
    dtype = common.jax_dtype(given.tiny)
    graphdef, params = common.random_dit(config, dtype, given.precision)
    start, conditions = inputs(config, frames, grid, text, dtype, batch=given.batch)
    if not given.backward:
        scalars = tuple(map(jnp.float32, (0.7, 0.6, 5.0)))
        step = denoise_step.lower(graphdef, params, start, conditions, *scalars, dtype=dtype)
        compiled = step.compile()
        # The latents are donated to the step, so each call gets a copy.
        return compiled, lambda run: run(params, jnp.array(start), conditions, *scalars)

    def loss(params: Any, latents: jax.Array, conditions: Any) -> jax.Array:
        times = jnp.full((len(conditions.text), frames), 700.0)

        def repeat(a: jax.Array) -> jax.Array:
            return jnp.broadcast_to(a, (len(conditions.text), *a.shape[1:]))

        velocity = apply(
            graphdef,
            params,
            repeat(latents).astype(dtype),
            times,
            conditions.text,
            conditions.text_mask,
            repeat(conditions.camera),
            repeat(conditions.plucker),
            remat=given.remat,
        )
        return jnp.mean(jnp.square(velocity.astype(jnp.float32) - 1.0))

    gradient = jax.jit(jax.value_and_grad(loss), compiler_options=options_on(1))
    compiled = gradient.lower(params, start, conditions).compile()
    return compiled, lambda run: run(params, start, conditions)


def build_refiner(given: argparse.Namespace) -> tuple[Any, Callable[[Any], Any]]:
    """Works as `build_step`, for one forward pass of the refiner with its KV cache."""
    from benchmarks import refiner

    given.frames = 0  # this benchmark does not refine a clip
    config, frames, grid, length = refiner.sizes(given)
    dtype = common.jax_dtype(given.tiny)
    graphdef, params, *_, call = refiner.window(config, frames, grid, length, dtype)
    forward, *inputs = call
    compiled = forward.lower(graphdef, params, *inputs).compile()
    return compiled, lambda run: run(params, *inputs)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs one command line and returns its lines."""
    from benchmarks.stage1 import sizes

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent_frames", type=int, nargs="+", default=[121])
    parser.add_argument("--batch", type=int, default=None, help="2: with guidance (default)")
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--refiner", action="store_true", help="a pass of the refiner instead")
    parser.add_argument("--backward", action="store_true", help="loss and gradients instead")
    parser.add_argument(
        "--remat", default="full", help="with --backward: none, dots, full or parts"
    )
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    parser.add_argument("--repeats", type=int, default=3, help="steps to profile")
    parser.add_argument("--longest", type=int, default=0, help="also list this many instructions")
    parser.add_argument("--trace", type=Path, help="keep the profile in this folder")
    given = parser.parse_args(arguments)
    use_compiler_flags()
    given.batch = given.batch or (1 if given.backward else 2)
    given.sizes = sizes(given)
    # In a profile, kernels that are launched as one graph do not have the names of instructions.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_enable_command_buffer="

    import jax

    device = jax.devices()[0].device_kind
    found = []
    if given.refiner:
        jobs = {"forward of the refiner's window": functools.partial(build_refiner, given)}
    else:
        name = "gradients" if given.backward else "step"
        jobs = {
            f"{name} of {frames} latent frames, batch {given.batch}": functools.partial(
                build_step, given, frames
            )
            for frames in given.sizes[1]
        }
    for what, build in jobs.items():
        compiled, step = build()
        program = Program(compiled.as_text())
        jax.block_until_ready(step(compiled))
        with contextlib.ExitStack() as stack:
            folder = given.trace or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with jax.profiler.trace(str(folder)):
                for _ in range(given.repeats):
                    jax.block_until_ready(step(compiled))
            events = list(kernels(folder))
        lines = [rates(line, device) for line in summarise(program, events, given.repeats)]
        for line in lines:
            rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in line.items()}
            print(json.dumps({"what": what, "device": device, **rounded}), flush=True)
        print(f"{what} on {device}\n{table(lines)}", file=sys.stderr, flush=True)
        for line in longest(program, events, given.repeats, given.longest):
            print(line, file=sys.stderr, flush=True)
        found += lines
    return found


if __name__ == "__main__":
    main()
