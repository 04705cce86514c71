"""Time, bandwidth and error of every implementation of every kernel, at the released size.

    python -m benchmarks.kernels                                  # all, 121 latent frames
    python -m benchmarks.kernels --only gdn --latent_frames 21
    python -m benchmarks.kernels --only gdn --part recurrence
    python -m benchmarks.kernels --tiny                           # interpreted, seconds on a CPU

The benchmark prints one JSON line per measurement: kernel, part, variant, pass, median ms, GB/s,
and for every result the relative error ||x - t|| / ||t|| against the XLA form in float32 on the
same (bfloat16) inputs. The pass is forward or backward; backward computes the gradients of all
inputs, including recomputation. The GB/s are those of the fewest bytes that the pass must move. For
a variant that does not compile or run, a line shows the error, and the others continue. A last line
per part and pass names the fastest variant whose error is at most 1.1 times that of XLA. The table
`kernels_pallas.choice.AUTO` should follow these lines. A time is that of ten queued calls, divided
by ten. At the released size, the inputs are larger than any cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import choice, gdn, ucpe
from kernels_pallas.conv_glu import Tiles as ConvTiles
from kernels_pallas.conv_glu import conv_glu
from sanawm_jax.core.attention import attention
from sanawm_jax.runtime.compiler_flags import use_compiler_flags


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of one run: batch, latent frames, grid of tokens, heads, head size, FFN width."""

    batch: int
    frames: int
    grid: tuple[int, int]
    heads: int
    head_dim: int
    inner: int
    dtype: Any = jnp.bfloat16

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclasses.dataclass(frozen=True)
class Part:
    """One function in several variants.

    Attributes:
      kernel, name: names of the kernel and of the function.
      inputs: arrays. Only floating-point arrays are differentiated.
      variants: name -> function of the inputs that returns an array or a tuple; the first is XLA.
      forward_bytes, backward_bytes: the fewest bytes that each pass must move.
      flops: operations of the forward pass if matrix units limit it, else 0.
    """

    kernel: str
    name: str
    inputs: tuple[jax.Array, ...]
    variants: dict[str, Callable[..., Any]]
    forward_bytes: float
    backward_bytes: float
    flops: float = 0.0


def _bytes(*arrays: Any) -> float:
    return float(sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(arrays)))


def _normal(index: int, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    return jax.random.normal(jax.random.key(index), shape, dtype) * jnp.asarray(scale, dtype)


def conv_parts(sizes: Sizes, is_tiny: bool) -> Iterator[Part]:
    """The gated convolution of the feed-forward network on one prompt, as in a long guided clip."""
    shape = (sizes.frames, *sizes.grid, 2 * sizes.inner)
    x = _normal(0, shape, sizes.dtype)
    kernel = _normal(1, (3, 3, 1, 2 * sizes.inner), jnp.float32, 0.3)
    x_bias, bias = (_normal(i, (2 * sizes.inner,), jnp.float32, 0.1) for i in (2, 3))
    sweep = [
        ConvTiles(rows, channels, 1, rows, rows)
        for rows, channels in ((4, 64), (2, 64), (3, 64), (4, 32), (4, 128))
    ]
    variants: dict[str, Callable[..., Any]] = {
        impl: lambda *a, impl=impl: conv_glu(*a, impl=impl) for impl in ("xla", "xla_split")
    }
    for tiles in sweep[:1] if is_tiny else sweep:
        name = f"pallas rows {tiles.rows} channels {tiles.channels}"
        variants[name] = lambda *a, tiles=tiles: conv_glu(*a, impl="pallas", tiles=tiles)
    y = _bytes(x) / 2
    yield Part(
        "conv_glu", "conv_glu", (x, x_bias, kernel, bias), variants,
        _bytes(x) + y, 2 * _bytes(x) + y,
    )  # fmt: skip


def gdn_parts(sizes: Sizes, is_tiny: bool) -> Iterator[Part]:
    """Parts of the main branch, then the whole branch in one direction and in both."""
    del is_tiny
    shape = (sizes.batch, sizes.frames, sizes.tokens, sizes.heads, sizes.head_dim)
    bound = sizes.head_dim**-0.5 * sizes.tokens**-0.5
    q, k, v, q_rot, k_rot = (
        _normal(i, shape, sizes.dtype, bound if i in (1, 4) else 1.0) for i in range(5)
    )
    q, k = jax.nn.relu(q), jax.nn.relu(k)
    beta = jax.nn.sigmoid(_normal(5, shape[:4], jnp.float32))
    decay = jax.nn.sigmoid(_normal(6, (*shape[:2], shape[3]), jnp.float32) + 3)
    maps = jax.jit(gdn.frame_transitions)(k_rot, v, beta, decay)
    states = jax.jit(lambda m: gdn.scan_states(m)[0])(maps)
    normaliser = jax.nn.relu(_normal(7, (*decay.shape, 1, sizes.head_dim), jnp.float32)) + 0.1

    def variants(function: Any, *, of_tokens: bool = False) -> dict[str, Callable[..., Any]]:
        forms = {impl: {"impl": impl} for impl in choice.IMPLS["gdn"]}
        if choice.capability() == choice.HOPPER:
            forms["pallas, Triton"] = {"impl": "pallas", "tiles": gdn.Tiles(mosaic=())}
            if of_tokens:  # without the kernel that computes maps and states together
                apart = tuple(name for name in gdn.Tiles().mosaic if name != "states")
                forms["pallas, maps apart"] = {"impl": "pallas", "tiles": gdn.Tiles(mosaic=apart)}
        return {name: lambda *a, o=options: function(*a, **o) for name, options in forms.items()}

    forward, small = _bytes(k_rot, v), _bytes(maps, beta)
    yield Part(
        "gdn", "frame maps", (k_rot, v, beta, decay),
        variants(lambda *a, **o: tuple(gdn.frame_transitions(*a, **o))),
        forward + small, 2 * forward + 2 * small,
    )  # fmt: skip
    yield Part(
        "gdn", "normaliser maps", (k, beta, decay),
        variants(lambda *a, **o: tuple(gdn.normaliser_transitions(*a, **o))),
        _bytes(k, beta, maps.w), 2 * _bytes(k, beta) + _bytes(maps.w),
    )  # fmt: skip
    for both, name in ((False, "recurrence, one direction"), (True, "recurrence, both")):
        run = gdn.bidirectional_states if both else gdn.scan_states
        yield Part(
            "gdn", name, tuple(maps),
            variants(lambda w, u, run=run, **o: run(gdn.Transition(w, u), **o)[0]),
            _bytes(maps, maps.u), _bytes(maps, maps) + 2 * _bytes(maps.u),
        )  # fmt: skip
    yield Part(
        "gdn", "recurrence of the normaliser, both", (maps.w, normaliser),
        variants(lambda w, u, **o: gdn.bidirectional_states(gdn.Transition(w, u), **o)[0]),
        _bytes(maps.w, normaliser, normaliser), 2 * _bytes(maps.w) + 4 * _bytes(normaliser),
    )  # fmt: skip

    for both, name in ((False, "one direction"), (True, "both")):
        run = gdn.bidirectional_token_states if both else gdn.token_states
        yield Part(
            "gdn", f"states from tokens, {name}", (k_rot, v, beta, decay),
            variants(lambda *a, run=run, **o: run(*a, **o)[0], of_tokens=True),
            forward + _bytes(maps.u, beta), 2 * forward + _bytes(maps.u, beta, beta),
        )  # fmt: skip

    def read(states: Any, z: Any, q_rot: Any, q: Any, **options: Any) -> Any:
        y = gdn.normalised_read_out(states, z, q_rot, q, 1e-8, **options)
        return y.astype(q.dtype)

    yield Part(
        "gdn", "read-out", (states, normaliser, q_rot, q), variants(read),
        _bytes(states, q, q, q), 2 * _bytes(states) + 5 * _bytes(q),
    )  # fmt: skip

    def numerator(*a: Any, **options: Any) -> Any:
        v, q_rot, k_rot, beta, decay = a
        states, _ = gdn.token_states(k_rot, v, beta, decay, **options)
        return gdn.read_out(states, q_rot, **options).astype(v.dtype)

    least = _bytes(v, q_rot, k_rot, beta)
    yield Part(
        "gdn", "numerator alone, one direction", (v, q_rot, k_rot, beta, decay),
        variants(numerator, of_tokens=True), least + _bytes(v), 2 * least + _bytes(v),
    )  # fmt: skip

    def branch(*a: Any, both: bool, **options: Any) -> Any:
        q, k, v, q_rot, k_rot, beta, decay = a
        of_tokens = gdn.bidirectional_token_states if both else gdn.token_states
        states, _ = of_tokens(k_rot, v, beta, decay, **options)
        run = gdn.bidirectional_states if both else gdn.scan_states
        z, _ = run(gdn.normaliser_transitions(k, beta, decay, **options), **options)
        return gdn.normalised_read_out(states, z, q_rot, q, 1e-8, **options).astype(q.dtype)

    least = _bytes(q, k, v, q_rot, k_rot, beta)
    for both, name in ((False, "one direction"), (True, "both directions")):
        yield Part(
            "gdn", f"main branch, {name}", (q, k, v, q_rot, k_rot, beta, decay),
            variants(lambda *a, both=both, **o: branch(*a, both=both, **o), of_tokens=True),
            least + _bytes(q), 2 * least + _bytes(q),
        )  # fmt: skip


def attention_parts(sizes: Sizes, is_tiny: bool) -> Iterator[Part]:
    """Self-attention over all tokens of a clip, for one prompt."""
    del is_tiny
    shape = (1, sizes.frames * sizes.tokens, sizes.heads, sizes.head_dim)
    q, k, v = (_normal(i, shape, sizes.dtype) for i in range(3))

    def run(impl: str) -> Callable[..., Any]:
        def attend(*inputs: jax.Array) -> jax.Array:
            with choice.choose(attention=impl):
                return attention(*inputs)

        return attend

    variants = {impl: run(impl) for impl in choice.IMPLS["attention"]}
    flops = 4.0 * shape[1] ** 2 * sizes.heads * sizes.head_dim
    inputs = (q, k, v)
    yield Part("attention", "attention", inputs, variants, 4 * _bytes(q), 8 * _bytes(q), flops)


def ucpe_parts(sizes: Sizes, is_tiny: bool) -> Iterator[Part]:
    """The steps between projections and recurrences, and the output of the camera branch."""
    del is_tiny
    shape = (sizes.batch, sizes.frames, sizes.tokens, sizes.heads, sizes.head_dim)
    x = _normal(0, shape, sizes.dtype)
    matrices = _normal(1, (*shape[:3], 4, 4), jnp.float32)
    angles = _normal(2, (1, *shape[1:3], sizes.head_dim // 2), jnp.float32)
    scale = 1.0 + _normal(3, (sizes.heads * sizes.head_dim,), jnp.float32, 0.1)
    keys = ucpe.Features(scale, 1e-5, True, sizes.head_dim**-0.5 * sizes.tokens**-0.5)

    def part(name: str, function: Callable[..., Any], *small: jax.Array, writes: int = 1) -> Part:
        variants: dict[str, Callable[..., Any]] = {
            impl: lambda x, *a, i=impl: function(x, *a, impl=i) for impl in choice.IMPLS["ucpe"]
        }
        least = (1 + writes) * _bytes(x) + _bytes(small)
        return Part("ucpe", name, (x, *small), variants, least, 2 * least)

    half = angles[..., : sizes.head_dim // 4]
    yield part(
        "features and rotation", lambda x, a, **o: ucpe.plain_and_rotated(x, a[0], keys, **o),
        angles, writes=2,
    )  # fmt: skip
    yield part(
        "features to ray space", lambda x, m, a, **o: ucpe.to_ray_space(x, m, a[0], keys, **o),
        matrices, half,
    )  # fmt: skip
    for name, run in (("to ray space", ucpe.to_ray_space), ("from ray space", ucpe.apply_ucpe)):
        yield part(name, lambda x, m, a, run=run, **o: run(x, m, a[0], **o), matrices, half)


PARTS = {
    "attention": attention_parts,
    "conv_glu": conv_parts,
    "gdn": gdn_parts,
    "ucpe": ucpe_parts,
}


def _pass(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of (weights, *inputs). The forward pass ignores the weights."""
    if name == "forward":
        return lambda _, *inputs: function(*inputs)
    return lambda weights, *inputs: jax.vjp(function, *inputs)[1](weights)


def _weights(name: str, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Returns the cotangents of the results; their values are bfloat16 numbers in any dtype."""
    if name == "forward":
        return None
    like, tree = jax.tree.flatten(jax.eval_shape(function, *inputs))
    return tree.unflatten(
        _normal(8 + i, a.shape, jnp.bfloat16).astype(a.dtype) for i, a in enumerate(like)
    )


def milliseconds(function: Callable[..., Any], inputs: tuple[Any, ...], repeats: int) -> float:
    """Returns the time of one call: the median of several runs of ten queued calls, divided by ten.

    The launch of a queued call overlaps with the previous call. Calls that take more than 50 ms are
    measured one by one.
    """
    jax.block_until_ready(function(*inputs))
    start = time.perf_counter()
    jax.block_until_ready(function(*inputs))
    calls, times = (10 if time.perf_counter() - start < 0.05 else 1), []
    for _ in range(repeats):
        out = None
        start = time.perf_counter()
        for _ in range(calls):
            out = function(*inputs)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * statistics.median(times)


def errors(found: Any, truth: Any) -> list[float]:
    """Returns the relative error of every result, computed on the device."""

    def one(a: jax.Array, t: jax.Array) -> jax.Array:
        a, t = a.astype(jnp.float32), t.astype(jnp.float32)
        return jnp.sqrt(jnp.sum(jnp.square(a - t)) / jnp.maximum(jnp.sum(jnp.square(t)), 1e-30))

    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True)
    # One at a time, because a result takes gigabytes.
    return [float(jax.jit(one)(a, t)) for a, t in pairs]


def measure(
    part: Part, cut: int, repeats: int, passes: tuple[str, ...], wanted: str = ""
) -> Iterator[dict[str, Any]]:
    """Yields the lines of one part.

    Args:
      part: what to measure.
      cut: number of frames for the errors; for more frames, the float32 form would not fit.
      repeats: number of measurements for the median.
      passes: forward, backward.
      wanted: run only variants whose name contains this text. Their errors are compared with the
        error of the first one.
    """
    reference = next(iter(part.variants.values()))
    small = _cut(part.inputs, cut, part.kernel)
    wide = tuple(a.astype(jnp.float32) for a in small)
    variants = {name: f for name, f in part.variants.items() if wanted in name}
    # Programs are compiled in parallel. Otherwise a card would wait for minutes.
    with ThreadPoolExecutor() as pool:
        # The products of the XLA form are in float32 anyway; here its inputs and sums are too.
        truths = _compile(pool, {"": reference}, (wide,), passes, "highest")
        runs = _compile(pool, variants, (small, part.inputs), passes, None)
    for name in passes:
        best: tuple[float, str] | None = None
        accurate: list[float] = []

        truth = truths[name, ""][0].result()(_weights(name, reference, wide), *wide)
        for variant, function in variants.items():
            line = {"kernel": part.kernel, "part": part.name, "variant": variant, "pass": name}
            try:
                short, full = (future.result() for future in runs[name, variant])
                found = errors(short(_weights(name, function, small), *small), truth)
                weights = _weights(name, function, part.inputs)
                time_of = milliseconds(full, (weights, *part.inputs), repeats)
            except Exception as error:  # the other variants run even if one fails
                yield {**line, "error": f"{type(error).__name__}: {str(error)[:300]}"}
                continue
            moved = part.forward_bytes if name == "forward" else part.backward_bytes
            is_bound = part.flops > 0 and name == "forward"
            accurate = accurate or found
            is_good = all(a <= max(1.1 * b, 1e-4) for a, b in zip(found, accurate, strict=True))
            yield {
                **line,
                "ms": round(time_of, 4),
                "gbps": float(f"{moved / time_of * 1e-6:.4g}"),
                **({"tflops": round(part.flops / time_of * 1e-9, 1)} if is_bound else {}),
                "errors": [float(f"{e:.3g}") for e in found],
                "as_accurate_as_xla": is_good and bool(np.isfinite(found).all()),
            }
            if is_good and (best is None or time_of < best[0]):
                best = (time_of, variant)
        if best is not None:
            yield {
                "kernel": part.kernel, "part": part.name, "pass": name,
                "fastest": best[1], "ms": round(best[0], 4),
            }  # fmt: skip


def _compile(
    pool: ThreadPoolExecutor,
    functions: dict[str, Callable[..., Any]],
    inputs: tuple[tuple[jax.Array, ...], ...],
    passes: tuple[str, ...],
    precision: str | None,
) -> dict[tuple[str, str], list[Future[Any]]]:
    """Compiles every pass of every function for each of the inputs."""

    def one(name: str, function: Callable[..., Any], inputs: tuple[jax.Array, ...]) -> Any:
        weights = jax.eval_shape(lambda: _weights(name, function, inputs))
        with jax.default_matmul_precision(precision):
            return jax.jit(_pass(name, function)).lower(weights, *inputs).compile()

    return {
        (name, key): [pool.submit(one, name, function, a) for a in inputs]
        for name in passes
        for key, function in functions.items()
    }


def _cut(inputs: tuple[jax.Array, ...], frames: int, kernel: str) -> tuple[jax.Array, ...]:
    """Returns the first frames of the inputs; for arrays with a batch axis, of the first row."""
    if kernel == "attention":
        return tuple(a[:, :8800] for a in inputs)  # ten frames, with 6 GB of float32 logits
    if kernel == "conv_glu":
        return inputs[0][:frames], *inputs[1:]
    return tuple(a[:1, :frames] for a in inputs)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Runs one command line and returns its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(PARTS), nargs="+", default=list(PARTS))
    parser.add_argument("--part", default="", help="run only parts with this in their name")
    parser.add_argument("--variants", default="", help="run only variants with this in their name")
    parser.add_argument("--latent_frames", type=int, default=121)
    parser.add_argument("--batch", type=int, default=2, help="for gdn and ucpe; the others use 1")
    parser.add_argument("--passes", nargs="+", default=["forward", "backward"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    given = parser.parse_args(arguments)
    use_compiler_flags()
    sizes = Sizes(given.batch, given.latent_frames, (22, 40), 20, 112, 6720)
    if given.tiny:
        sizes = Sizes(1, 2, (3, 4), 1, 16, 16, jnp.float32)
    device = jax.devices()[0].device_kind
    found = []
    for kernel in given.only:
        for part in PARTS[kernel](sizes, given.tiny):
            if given.part not in part.name:
                continue
            cut = 2 if given.tiny else (21 if kernel == "gdn" else 8)
            repeats = 1 if given.tiny else given.repeats
            for line in measure(part, cut, repeats, tuple(given.passes), given.variants):
                line |= {"frames": sizes.frames, "device": device, "auto": choice.AUTO[kernel]}
                print(json.dumps(line), flush=True)
                found.append(line)
    return found


if __name__ == "__main__":
    main()
