"""Linear layers of stage 1 at the released size: bfloat16 and several forms of FP8.

    python -m benchmarks.fp8                          # all layers, 21 and 121 latent frames
    python -m benchmarks.fp8 --only up down --latent_frames 121
    python -m benchmarks.fp8 --tiny                   # emulated, seconds on a CPU

The benchmark prints one JSON line per layer and form: median ms of a call, with the rounding of the
activations; TFLOP/s; relative error ||y - t|| / ||t|| against float32 on the first rows; the
library calls of the compiled program (`__cublas$lt$matmul$f8` is an FP8 product); and whether one
of its products reads FP8. A last line per layer names the fastest form with an FP8 product, and its
speed relative to bfloat16.

Forms:
  bf16              as `core.layers.Linear`
  tensor            as `core.float8.float8_matmul`: one scale per tensor, a part of the product
  tensor, f32 out   the product writes float32; scale and bias are applied before rounding
  tensor, given     the scale of the activations is known; shows the cost of finding their maximum
  tensor, in-out    the kernel is stored (in, out); shows the cost of its transposition
  rows              a scale per token and a scale per output channel, applied after the product
  qdq               both operands are scaled back to bfloat16; XLA may rewrite this to FP8
  product alone     the activations are already in FP8; the limit of all forms
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.hlo import Program
from benchmarks.kernels import errors, milliseconds
from sanawm_jax.core.float8 import FLOAT8, float8_matmul, quantise, scale_for, to_float8
from sanawm_jax.core.layers import affine
from sanawm_jax.memory.programs import INDEX_LIMIT
from sanawm_jax.runtime.compiler_flags import use_compiler_flags

# (in, out, whether there is a bias), for the release's width of 2240.
LAYERS = {
    "qkv": (2240, 6720, False),
    "out": (2240, 2240, True),
    "up": (2240, 13440, True),
    "down": (6720, 2240, False),
    "text_kv": (2240, 4480, True),
}
TOKENS, TEXT = 22 * 40, 300
CHECKED_ROWS = 4096

Form = tuple[Callable[..., jax.Array], Any]  # a function of (x, weights, bias), and the weights


def _product(x8: jax.Array, values: jax.Array, dtype: Any, axis: int = 1) -> jax.Array:
    return lax.dot_general(x8, values, (((1,), (axis,)), ((), ())), preferred_element_type=dtype)


def _added(y: jax.Array, bias: jax.Array | None) -> jax.Array:
    return y if bias is None else y + bias.astype(y.dtype)


def forms(kernel: jax.Array) -> dict[str, Form]:
    """Returns every form of a layer, with weights that are made from a kernel (in, out)."""
    tensor = quantise(kernel)
    scale = tensor["scale"]

    def bf16(x: jax.Array, w: jax.Array, bias: Any) -> jax.Array:
        return x @ w if bias is None else affine(x, w, bias)

    def dynamic(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        s = scale_for(jnp.max(jnp.abs(x)))
        return to_float8(x, s), s

    def wide(x: jax.Array, w: Any, bias: Any) -> jax.Array:
        x8, s = dynamic(x)
        y = _product(x8, w["values"], jnp.float32) * (s * w["scale"])
        return _added(y, bias).astype(x.dtype)

    def given(x: jax.Array, w: Any, bias: Any) -> jax.Array:
        s = jnp.float32(2.0**-6)  # the scale for standard normal activations
        y = _product(to_float8(x, s), w["values"], x.dtype)
        return _added(y * (s * w["scale"]).astype(x.dtype), bias)

    def in_out(x: jax.Array, w: Any, bias: Any) -> jax.Array:
        x8, s = dynamic(x)
        y = _product(x8, w["values"], x.dtype, axis=0)
        return _added(y * (s * w["scale"]).astype(x.dtype), bias)

    def rows(x: jax.Array, w: Any, bias: Any) -> jax.Array:
        s = scale_for(jnp.max(jnp.abs(x), -1, keepdims=True))
        y = _product(to_float8(x, s), w["values"], x.dtype)
        return _added(y * s.astype(x.dtype) * w["scale"].astype(x.dtype), bias)

    def qdq(x: jax.Array, w: Any, bias: Any) -> jax.Array:
        x8, s = dynamic(x)
        x16 = x8.astype(x.dtype) * s.astype(x.dtype)
        w16 = w["values"].astype(x.dtype) * w["scale"].astype(x.dtype)
        return _added(_product(x16, w16, x.dtype), bias)

    def alone(x: jax.Array, w: Any, bias: Any) -> jax.Array:
        y = _product(x, w["values"], kernel.dtype)
        return _added(y * w["scale"].astype(kernel.dtype), bias)

    channels = scale_for(jnp.max(jnp.abs(kernel), 0))
    by_channel = {"values": to_float8(kernel, channels).T, "scale": channels}
    turned = {"values": to_float8(kernel, scale), "scale": scale}
    return {
        "bf16": (bf16, kernel),
        "tensor": (lambda x, w, bias: float8_matmul(x, **w, bias=bias), tensor),
        "tensor, f32 out": (wide, tensor),
        "tensor, given": (given, tensor),
        "tensor, in-out": (in_out, turned),
        "rows": (rows, by_channel),
        "qdq": (qdq, tensor),
        "product alone": (alone, tensor),
    }


def products(text: str) -> tuple[list[str], bool]:
    """Returns library calls and fused products of an HLO text, and whether a product reads FP8."""
    calls = set(re.findall(r'custom_call_target="([^"]+)"', text))
    calls |= set(re.findall(r'"kind":"(__[^"]+)"', text))
    reads_fp8 = any(
        (part.opcode == "dot" or "matmul" in part.target or "gemm" in part.target)
        and any(body[n].shapes[0][0].startswith("f8") for n in part.operands if n in body)
        for body in Program(text).computations.values()
        for part in body.values()
    )
    return sorted(calls), reads_fp8


def measure(layer: str, rows: int, sizes: tuple[int, int, bool], given: Any) -> list[dict]:
    """Prints and returns the lines of one layer on `rows` tokens."""
    inputs, outputs, has_bias = sizes
    dtype = jnp.float32 if given.tiny else jnp.bfloat16
    x = jax.random.normal(jax.random.key(0), (rows, inputs), dtype)
    kernel = jax.random.normal(jax.random.key(1), (inputs, outputs), dtype)
    kernel = kernel * jnp.asarray(inputs**-0.5, dtype)
    bias = jax.random.normal(jax.random.key(2), (outputs,), dtype) if has_bias else None
    with jax.default_matmul_precision("highest"):
        truth = jnp.matmul(x[:CHECKED_ROWS].astype(jnp.float32), kernel.astype(jnp.float32))
        truth = _added(truth, bias)
    found = []
    for form, (function, weights) in forms(kernel).items():
        line: dict[str, Any] = {"layer": layer, "rows": rows, "in": inputs, "out": outputs}
        line["form"] = form
        fed = x.astype(FLOAT8) if form == "product alone" else x
        try:
            run = jax.jit(function).lower(fed, weights, bias).compile()
            calls, is_fp8 = products(run.as_text() or "")
            ms = milliseconds(run, (fed, weights, bias), given.repeats)
            (error,) = errors(run(fed, weights, bias)[:CHECKED_ROWS], truth)
            line |= {
                "ms": float(f"{ms:.4g}"),
                "tflops": float(f"{2e-9 * rows * inputs * outputs / ms:.4g}"),
                "relative_error": float(f"{error:.3g}"),
                "calls": calls,
                "reads_fp8": is_fp8,
            }
        except Exception as error:  # the other forms run even if one fails
            line["error"] = f"{type(error).__name__}: {str(error)[:300]}"
        line["device"] = jax.devices()[0].device_kind
        print(json.dumps(line), flush=True)
        found.append(line)
    whole = [a for a in found if a.get("reads_fp8") and a["form"] not in ("bf16", "product alone")]
    if whole and "ms" in found[0]:
        best = min(whole, key=lambda line: line["ms"])
        speed = round(found[0]["ms"] / best["ms"], 3)
        last = {"layer": layer, "rows": rows, "fastest": best["form"], "over_bf16": speed}
        print(json.dumps(last), flush=True)
        found.append(last)
    return found


def main(arguments: list[str] | None = None) -> list[dict]:
    """Runs one command line and returns its lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=list(LAYERS), nargs="+", default=list(LAYERS))
    parser.add_argument("--latent_frames", type=int, nargs="+", default=[21, 121])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU runs in seconds")
    given = parser.parse_args(arguments)
    use_compiler_flags()
    found = []
    for frames in [1] if given.tiny else given.latent_frames:
        # With guidance, a clip runs one prompt at a time if its widest array is too large for a
        # 32-bit index.
        batch = 2 if 2 * frames * TOKENS * 13440 <= INDEX_LIMIT else 1
        for layer in given.only:
            inputs, outputs, has_bias = LAYERS[layer]
            rows = batch * (TEXT if layer == "text_kv" else frames * TOKENS)
            if given.tiny:
                rows, inputs, outputs = 20, inputs // 70, outputs // 70
            found += measure(layer, rows, (inputs, outputs, has_bias), given)
    return found


if __name__ == "__main__":
    main()
