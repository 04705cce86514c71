"""The XLA flags that the model's programs want on a GPU.

`sample.py`, `train.py` and the benchmarks set them; a program of one's own calls
`use_compiler_flags` before JAX compiles anything. A flag that `XLA_FLAGS` has already stays.
"""

from __future__ import annotations

import os

FLAGS = {
    # Round where the program rounds. XLA otherwise replaces a bfloat16 array, for a reader that
    # widens it, by the float32 one that it was rounded from, and writes both.
    "xla_allow_excess_precision": "false",
    # Products by cuBLASLt, which adds biases and residuals on the way and reads a layer's weights
    # where they lie in their stack. A product of Triton's does neither here, even where XLA takes
    # cuBLAS for it in the end, as it does for those of this size.
    "xla_gpu_enable_triton_gemm": "false",
    # Join products of one operand only where their results are small, in megabytes: to join two is
    # to copy both weights into one array in every forward pass.
    "xla_gpu_dot_merger_threshold_mb": "8",
    # Convolutions over channels-last arrays, as the models have them and as tensor cores want them.
    # XLA otherwise turns those over time and space, and cuDNN turns them back, in extra passes.
    "xla_gpu_force_conv_nhwc": "true",
}

# Of one compilation on one GPU. The scheduler that hides latency moves what is slow away from its
# readers, as far as the card's memory lets it. Between devices that hides communication; on one,
# all gradients of a block's weights move to the block's end, and everything that they are computed
# from stays in memory until then.
ON_ONE_DEVICE: dict[str, bool | int | float | str] = {
    "xla_gpu_enable_latency_hiding_scheduler": False
}


def options_on(devices: int) -> dict[str, bool | int | float | str] | None:
    """`compiler_options` of a training step on so many devices; None asks for nothing.

    As in `use_compiler_flags` the user's stay.
    """
    import jax

    if devices > 1 or jax.default_backend() != "gpu":
        return None
    named = _named(_given())
    return {name: value for name, value in ON_ONE_DEVICE.items() if name not in named}


def use_compiler_flags() -> None:
    """Adds `FLAGS` to the environment's `XLA_FLAGS`; XLA reads it once, when it first compiles."""
    given = _given()
    named = _named(given)
    added = [f"--{name}={value}" for name, value in FLAGS.items() if name not in named]
    os.environ["XLA_FLAGS"] = " ".join([*given, *added])


def _given() -> list[str]:
    return os.environ.get("XLA_FLAGS", "").split()


def _named(words: list[str]) -> set[str]:
    """Names of the flags that the words set."""
    return {word.lstrip("-").partition("=")[0] for word in words}
