"""How much device memory a run needs, computed before anything is loaded or compiled.

The figures are lower bounds: weights, states, and the largest matrix product with its operands. A
run that is refused could not work; a run that is not refused may still run out of memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.core.params import Params, build, from_leaves, leaves
from sanawm_jax.core.stack import stacked_axes
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.memory.offload import OFFLOADS
from sanawm_jax.memory.programs import least_bytes, num_bytes, trace
from sanawm_jax.memory.streaming import memory_stats
from sanawm_jax.refiner.config import RefinerConfig
from sanawm_jax.refiner.kv_window import KeyValue, KVWindow
from sanawm_jax.refiner.model import Refiner, without_text_layers
from sanawm_jax.refiner.rope import video_rope
from sanawm_jax.refiner.sampler import RefinerText, refine_block
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.precision import build_dit
from sanawm_jax.sampling.stage1 import Conditions, denoise_step
from sanawm_jax.text.config import GemmaConfig
from sanawm_jax.text.gemma import GemmaTower
from sanawm_jax.vae.config import VAEConfig
from sanawm_jax.vae.model import VideoDecoder, VideoEncoder

Shape = tuple[int, ...]
_GIB = 2**30
_F32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes that one network needs while it runs."""

    weights: int
    streamed: int  # bytes of weights outside of layers, and of two layers
    other: int  # states and temporaries

    def shared(self, devices: int) -> Need:
        """The need of one of several devices that divide everything except the weights."""
        return dataclasses.replace(self, other=self.other // devices)


def _array(shape: Shape, dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)  # used in place of an array while tracing


def _abstract(params: Params, dtype: Any) -> Params:
    def one(a: Any) -> Any:
        return a if a.dtype.itemsize == 1 else _array(a.shape, dtype)  # FP8 stays

    return jax.tree.map(one, params)


def need_of(params: Params, other: int = 0) -> Need:
    """The need of a network with these abstract parameters, whose dtype is the final one."""
    resident, kinds = 0, dict.fromkeys([""], 0)
    for path, leaf in leaves(params):
        size, axes = num_bytes(leaf), stacked_axes(path)
        if not axes:
            resident += size
        else:
            kind = path.partition(".layers.")[0] if axes == 2 else "layers"
            kinds[kind] = kinds.get(kind, 0) + size // int(np.prod(leaf.shape[:axes]))
    weights = num_bytes(params)
    return Need(weights, min(weights, resident + 2 * max(kinds.values())), other)


def dit_need(
    config: DiTConfig,
    latents: Shape,
    batch: int,
    text_length: int,
    dtype: Any,
    precision: str = "bf16",
) -> Need:
    """The need of one step of stage 1.

    Args:
      latents: (1, C, F, h, w).
      batch: 2 with guidance.
      precision: see `sampling.precision`.
    """
    graphdef, params = build_dit(config, precision)
    params = _abstract(params, dtype)
    _, channels, frames, *grid = latents

    def array(*shape: int, dtype: Any = _F32) -> Any:
        return _array(shape, dtype)

    x = array(1, frames, *grid, channels)
    conditions = Conditions(
        array(batch, text_length, config.caption_channels, dtype=dtype),
        array(batch, text_length, dtype=jnp.int32),
        array(1, frames, 20),
        array(1, frames, *grid, config.chunk_plucker_channels),
    )
    scalars = (array(), array(), array())
    step = trace(denoise_step, graphdef, params, x, conditions, *scalars, dtype=dtype)
    return need_of(params, least_bytes(step) + num_bytes((x, conditions)))


def refiner_need(
    config: RefinerConfig,
    latents: Shape,
    *,
    sink: int,
    block: int,
    window: int,
    text_length: int,
    dtype: Any,
) -> Need:
    """The need of one refiner block with its window of keys and values; see `RefineOptions`."""
    graphdef, params = build(Refiner, config)
    params = _abstract(params, dtype)
    _, channels, frames, height, width = latents
    heads = (config.num_attention_heads, config.attention_head_dim)
    count = config.num_layers

    def layers(*shape: int) -> tuple[Any, ...]:
        return (_array(shape, dtype),) * count

    text = RefinerText(_array((1, text_length, config.text_width), dtype))
    whole = num_bytes(params)
    if not config.modulates_text:
        text = text._replace(keys=KeyValue(*[layers(1, text_length, *heads)] * 2))
        params = without_text_layers(params)
    held = from_leaves({path: leaf for path, leaf in leaves(params) if leaf is not None})
    reading = whole - num_bytes(held) + num_bytes(text)  # before the layers are dropped
    if not block:  # the whole clip at once, without a window
        tokens = num_bytes(_array((frames, height * width, *heads), dtype))
        return need_of(held, max(reading, num_bytes(text) + 4 * tokens))
    block = min(block, frames - sink)

    def keys(slots: int) -> tuple[Any, ...]:
        return layers(1, slots, height * width, *heads)

    state = KVWindow(keys(sink), KeyValue(*[keys(window)] * 2), _array((), jnp.int32))
    clean = _array((1, block, height, width, channels), _F32)
    rope = video_rope(config, frames, height, width, 16.0)
    separate = {**params, "blocks": jax.tree.map(lambda a: layers(*a.shape[1:]), params["blocks"])}
    args = (state, clean, clean, text, rope, _array((4,), _F32))
    program = trace(refine_block, graphdef, separate, *args, dtype=dtype)
    running = num_bytes((state, text)) + least_bytes(program)
    return need_of(held, max(reading, running))


def text_need(config: GemmaConfig, dtype: Any) -> Need:
    """The need of a text encoder."""
    return need_of(_abstract(build(GemmaTower, config)[1], dtype))


def vae_need(config: VAEConfig, dtype: Any, *, half: str, tile: Shape) -> Need:
    """The need of the VAE's `encoder` or `decoder`, whose output is a float32 tile (n, H, W, 3)."""
    module = {"encoder": VideoEncoder, "decoder": VideoDecoder}[half]
    params = _abstract(build(module, config)[1], dtype)
    return need_of(params, num_bytes(_array((*tile, 3), _F32)))


def peak(needs: Sequence[Need], offload: str) -> int:
    """Largest number of bytes at any moment, for networks that run one after the other."""
    if offload == "none":
        weights = itertools.accumulate(n.weights for n in needs)
        return max(w + n.other for w, n in zip(weights, needs, strict=True))
    if offload == "model":
        return max(n.weights + n.other for n in needs)
    return max(n.streamed + n.other for n in needs)


def device_bytes() -> int | None:
    """The device's memory, or None where the backend reports none."""
    return memory_stats().get("bytes_limit")


def check_fits(
    stages: Callable[[], Sequence[Sequence[Need]]], offload: str, limit: int | None = None
) -> None:
    """Compares what a run needs with the device's memory.

    Args:
      stages: gives the networks of each stage in order; all of them are freed between stages. It
        is not called if the backend does not report its memory.
      offload: one of `OFFLOADS`.
      limit: bytes of memory; those of the device by default.

    Raises:
      InputError: it cannot fit; the message names the flag that makes it fit.
    """
    limit = device_bytes() if limit is None else limit
    if limit is None:
        return
    found = [stage for stage in stages() if stage]
    needs = {name: max(peak(stage, name) for stage in found) for name in OFFLOADS}
    if needs[offload] <= limit:
        return
    line = (
        f"this run needs at least {needs[offload] / _GIB:.1f} GiB of device memory, and the device "
        f"has {limit / _GIB:.1f}"
    )
    for name in OFFLOADS[OFFLOADS.index(offload) + 1 :]:
        if needs[name] <= limit:
            raise InputError(f"{line}; --offload={name} needs {needs[name] / _GIB:.1f}")
    raise InputError(f"{line}; fewer --num_frames or a smaller --height and --width need less")
