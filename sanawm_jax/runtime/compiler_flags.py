"""The XLA flags that the model's programs want on a GPU.

`sample.py`, `train.py` and the benchmarks set them; your own program calls `use_compiler_flags`
before JAX compiles anything. A flag that is already in `XLA_FLAGS` keeps its value.
"""

from __future__ import annotations

import os
from pathlib import Path

from sanawm_jax.runtime.errors import InputError

FLAGS = {
    # Round where the program rounds. Otherwise, where an operation widens a bfloat16 array, XLA
    # lets it read the float32 array from before the rounding, and writes both arrays to memory.
    "xla_allow_excess_precision": "false",
    # Compute matrix products with cuBLASLt, which adds biases and residuals in the same kernel and
    # reads a layer's weights directly from the stacked array. With Triton enabled XLA does neither,
    # even for products of this size, for which it selects cuBLAS in the end.
    "xla_gpu_enable_triton_gemm": "false",
    # Merge products that share an operand only if their results are small (in megabytes), because
    # merging copies both weights into one array in every forward pass.
    "xla_gpu_dot_merger_threshold_mb": "8",
    # Keep convolutions channels-last, as the models have them and as tensor cores need them.
    # Otherwise XLA transposes 3-D convolutions and cuDNN transposes them back, in extra passes.
    "xla_gpu_force_conv_nhwc": "true",
}

# Options of a compilation for one GPU. The latency-hiding scheduler moves slow operations away from
# the operations that read their results, as far as memory allows. With several devices this hides
# communication. On one device it moves all weight gradients of a block to the block's end, so that
# everything they are computed from stays in memory until then.
ON_ONE_DEVICE: dict[str, bool | int | float | str] = {
    "xla_gpu_enable_latency_hiding_scheduler": False
}


def options_on(devices: int) -> dict[str, bool | int | float | str] | None:
    """`compiler_options` of a training step on this number of devices; None sets nothing.

    Flags that the user has set keep their values, as in `use_compiler_flags`.
    """
    import jax

    if devices > 1 or jax.default_backend() != "gpu":
        return None
    named = _named(_given())
    return {name: value for name, value in ON_ONE_DEVICE.items() if name not in named}


def use_compiler_flags() -> None:
    """Adds `FLAGS` to the environment's `XLA_FLAGS`; XLA reads it once, when it first compiles.

    Raises:
      InputError: `XLA_FLAGS` names a file that cannot be read.
    """
    given = _given()
    named = _named(given)
    added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join([*given, *added])

    import jax

    # A debugging option of JAX: broadcasting of trailing axes is used everywhere here.
    jax.config.update("jax_numpy_rank_promotion", "allow")


def _given() -> list[str]:
    """The words of `XLA_FLAGS`. A value that does not begin with a dash is the name of a file."""
    value = os.environ.get("XLA_FLAGS", "").strip()
    if value and not value.startswith("-"):
        try:
            value = Path(value).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise InputError(
                f"XLA_FLAGS={value} is neither flags nor a file that can be read; unset it"
            ) from error
    return value.split()


def _named(words: list[str]) -> set[str]:
    """Names of the flags that these words set."""
    return {word.lstrip("-").partition("=")[0] for word in words}
