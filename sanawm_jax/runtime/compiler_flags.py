"""XLA flags that make the model's programs faster on a GPU.

`sample.py`, `train.py` and the benchmarks set them. Your own program can call `use_compiler_flags`
before JAX compiles anything. A flag that `XLA_FLAGS` already contains does not change.
"""

from __future__ import annotations

import os

FLAGS = {
    # Round where the program rounds. Otherwise, if an operation converts a bfloat16 array to
    # float32, XLA lets it read the float32 array from before the rounding, and writes both arrays.
    "xla_allow_excess_precision": "false",
    # Compute matrix products with cuBLASLt. It adds biases and residuals inside the product, and
    # reads a layer's weights directly from the stack of all layers. With Triton products switched
    # on, XLA does neither, even though it finally selects cuBLAS for products of this size.
    "xla_gpu_enable_triton_gemm": "false",
    # Merge two products that share an operand only if their results are below this number of
    # megabytes. A merge copies both weights into one array in every forward pass.
    "xla_gpu_dot_merger_threshold_mb": "8",
    # Keep channels last in convolutions, as in the models; tensor cores need this layout. Otherwise
    # XLA transposes 3-D convolutions, and cuDNN transposes them back, both in extra passes.
    "xla_gpu_force_conv_nhwc": "true",
}

# Options of one compilation for one GPU. The latency-hiding scheduler moves slow operations away
# from the operations that read their results, as far as the memory allows it. On several devices
# this hides communication. On one device it only delays all gradients of a block's weights to the
# end of the block, and until then everything that they are computed from stays in memory.
ON_ONE_DEVICE: dict[str, bool | int | float | str] = {
    "xla_gpu_enable_latency_hiding_scheduler": False
}


def options_on(devices: int) -> dict[str, bool | int | float | str] | None:
    """Returns the `compiler_options` of a training step on this number of devices, or None.

    Flags that the user set in `XLA_FLAGS` do not change, as in `use_compiler_flags`.
    """
    import jax

    if devices > 1 or jax.default_backend() != "gpu":
        return None
    named = _named(_given())
    return {name: value for name, value in ON_ONE_DEVICE.items() if name not in named}


def use_compiler_flags() -> None:
    """Adds `FLAGS` to the variable `XLA_FLAGS`, which XLA reads once, when it first compiles."""
    given = _given()
    named = _named(given)
    added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join([*given, *added])


def _given() -> list[str]:
    return os.environ.get("XLA_FLAGS", "").split()


def _named(words: list[str]) -> set[str]:
    """Returns the names of the flags that the words set."""
    return {word.lstrip("-").partition("=")[0] for word in words}
