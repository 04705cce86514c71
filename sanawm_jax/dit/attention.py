"""Self-attention of a DiT block: a main branch, a camera branch, one output gate and projection.

The two kinds, frame-wise gated DeltaNet and softmax, share one parameter layout; the softmax kind
carries the unused gates of the other so that published files load whole.
Axis letters: B batch, F latent frames, P tokens per frame, T = F P video tokens, L text tokens, C
width, N heads, D head size, V value size of the recurrence, X frames that a convolution needs from
the chunk before.
Reference: diffusers `BidirectionalGDNUCPESinglePathLiteLA`, `_SoftmaxUCPESinglePathLiteLA`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int, Shaped

from kernels_pallas import gdn, ucpe
from sanawm_jax.core.frame_attention import KeyValueCache, frame_attention
from sanawm_jax.core.frames import FrameLayout, last_frames, neighbours, recurrent_states
from sanawm_jax.core.layers import Linear, RMSNorm, zeros_init
from sanawm_jax.core.params import draw
from sanawm_jax.core.sharding import per_rank, shard
from sanawm_jax.dit.config import DiTConfig
from sanawm_jax.dit.heads import HEADS, from_ray_space, plain_and_rotated, rotate, to_ray_space
from sanawm_jax.dit.numerics import Numerics, softmax_scale
from sanawm_jax.dit.state import RecurrentCarry, SoftmaxCarry, Window
from sanawm_jax.dit.ucpe import RayTransforms

GDN_EPS = 1e-8  # of the denominator
_GATES, _STATE = ("B F P N", "B F N"), "B N V D"


def key_factor(size: int, tokens: int) -> float:
    """Keys of the recurrence are multiplied by 1 / sqrt(D P), `size` is D and `tokens` is P.

    A frame writes P keys of size D at once. This factor bounds the spectrum of its map W, and with
    it the state; `benchmarks/key_scaling.py` shows what happens with a larger one.
    """
    return size**-0.5 * tokens**-0.5


class Context(NamedTuple):
    """Everything that all blocks of one forward pass share."""

    modulation: Float[Array, "B F 6 C"]
    text: Float[Array, "B L C"]
    text_mask: Bool[Array, "B L"]
    angles: Float32[Array, "F P D//2"] | None
    rays: RayTransforms | None
    plucker: Float[Array, "B F P C"] | None
    frame_mask: Shaped[Array, "B F"] | None  # 1 for a real frame and 0 for padding
    key_mask: Bool[Array, "B F"] | None  # false hides a frame's keys
    grid: tuple[int, int]  # token rows, columns
    layout: FrameLayout  # chunks, and padding to the size of a mesh
    remat: str = "none"  # see `core.stack.scan_runs`
    numerics: Numerics = Numerics()
    window: Window | None = None  # of a stream, whose layers return a carry
    chunks: Int[Array, ""] | None = None  # chunks of the stream before this one


class _Heads(NamedTuple):
    """Projections, and what q and k go through before they are used."""

    q: Float[Array, "B F P N D"]
    k: Float[Array, "B F P N D"]
    v: Float[Array, "B F P N D"]
    of_q: ucpe.Features
    of_k: ucpe.Features


class ShortConv(nnx.Module):
    """Depthwise convolution over frames, the same kernel towards the past and the future.

    Kernel (X + 1, C); its last tap is the centre. The past crosses chunks, the future does not.
    Reference: `SanaWMTemporalShortConvolution`.
    """

    def __init__(self, width: int, kernel_size: int):
        centre = jnp.zeros((kernel_size, width)).at[-1].set(1.0)
        self.taps = nnx.Param(centre)

    @jax.named_scope("short_conv")
    def __call__(
        self,
        x: Float[Array, "B F P C"],
        layout: FrameLayout,
        before: Float[Array, "B X P C"] | None = None,
        *,
        isolated: bool = False,
    ) -> Float[Array, "B F P C"]:
        """Convolves x over frames; `before` are the frames before x in a stream."""
        taps = self.taps[...].astype(x.dtype).astype(jnp.float32)
        reach = taps.shape[0] - 1
        if before is None:
            reach = min(reach, layout.frames - 1)

        def run(x: jax.Array, taps: jax.Array, before: jax.Array | None) -> jax.Array:
            seen = neighbours(x, reach, layout, before=before, isolated=isolated)
            y = x * taps[-1]  # sums in float32, as a convolution's are
            for distance in range(1, reach + 1):
                past, future = seen[reach - distance], seen[reach + distance]
                y = y + past * taps[-1 - distance] + future * taps[-1 - distance]
            return y.astype(x.dtype)

        names = ("B F P (N D)", "X (N D)", "B X P (N D)")
        return per_rank(run, names, "B F P (N D)")(x, taps, before)


class SelfAttention(nnx.Module):
    """Self-attention of all video tokens; see the module's head."""

    def __init__(self, config: DiTConfig, *, softmax: bool, rngs: nnx.Rngs):
        width, heads = config.hidden_size, config.num_heads
        self.softmax = softmax
        self.heads = heads
        self.qkv = Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)
        self.beta = Linear(width, heads, kernel_init=zeros_init, rngs=rngs)
        self.decay = Linear(width, heads, kernel_init=zeros_init, rngs=rngs)
        self.decay_rate_log, self.decay_step = _decay_init(heads, rngs)
        self.gate = Linear(width, width, rngs=rngs)
        self.q_camera = Linear(width, width, rngs=rngs)
        self.k_camera = Linear(width, width, rngs=rngs)
        self.v_camera = Linear(width, width, rngs=rngs)
        # zero, so that training starts from the model without a camera
        self.out_camera = Linear(width, width, kernel_init=zeros_init, rngs=rngs)
        if config.qk_norm:
            self.q_norm = RMSNorm(width, eps=1e-5)
            self.k_norm = RMSNorm(width, eps=1e-5)
            self.q_norm_camera = RMSNorm(width, eps=1e-5)
            self.k_norm_camera = RMSNorm(width, eps=1e-5)
        if config.conv_kernel_size > 0 and not softmax:
            for name in ("k",) if config.k_conv_only else ("q", "k", "v"):
                setattr(self, f"{name}_conv", ShortConv(width, config.conv_kernel_size))
                setattr(self, f"{name}_conv_camera", ShortConv(width, config.conv_kernel_size))

    def __call__(
        self,
        x: Float[Array, "B F P C"],
        ctx: Context,
        carry: RecurrentCarry | SoftmaxCarry | None = None,
    ) -> tuple[Float[Array, "B F P C"], RecurrentCarry | SoftmaxCarry | None]:
        """Returns the mixed tokens, and in a stream the carry after this chunk."""
        mask = _mask(ctx, x.dtype)  # B F 1 1 or None
        gates = None if self.softmax else self._gates(x, ctx)
        seen = x if mask is None else x * mask
        before = carry.inputs if isinstance(carry, RecurrentCarry) else {}
        inputs: dict[str, jax.Array] = {}  # what the next chunk's convolutions see of this one
        q, k, v = jnp.split(self.qkv(seen), 3, -1)
        heads = self._prepare(q, k, v, mask, ctx, suffix="", before=before, inputs=inputs)
        main: Any = None
        normaliser: Any = None
        camera: Any = None
        if gates is None:
            y, main = _softmax_main(heads, ctx, getattr(carry, "main", None))
        else:
            states = getattr(carry, "main", None), getattr(carry, "normaliser", None)
            y, main, normaliser = _gdn_main(heads, gates, ctx, *states)
        if ctx.rays is not None:
            q, k, v = self.q_camera(seen), self.k_camera(seen), self.v_camera(seen)
            heads = self._prepare(
                q, k, v, mask, ctx, suffix="_camera", before=before, inputs=inputs
            )
            old = getattr(carry, "camera", None)
            if gates is None:
                z, camera = _softmax_camera(heads, ctx, ctx.rays, old)
            else:
                z, camera = _gdn_camera(heads, gates, ctx, ctx.rays, old)
            y = y + self.out_camera(z)
        # the gate multiplies in float32 (reference: `output_gate(x).to(torch.float32)`)
        gate = jax.nn.silu(self.gate(x).astype(jnp.float32))
        out = self.out((y.astype(jnp.float32) * gate).astype(x.dtype))
        if ctx.window is None:
            return out, None
        if self.softmax:
            return out, SoftmaxCarry(main, camera)
        return out, RecurrentCarry(main, normaliser, camera, inputs)

    def _prepare(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array | None,
        ctx: Context,
        *,
        suffix: str,
        before: dict[str, jax.Array],
        inputs: dict[str, jax.Array],
    ) -> _Heads:
        """Applies mask and short convolution, and says which norm and ReLU are still to come.

        Args:
          before: of a stream, by convolution the frames that it saw last.
          inputs: filled with the same for the next chunk.
        """
        named = {"q": q, "k": k, "v": v}
        of = {}
        for name, value in named.items():
            if mask is not None:
                value = value * mask
            conv = getattr(self, f"{name}_conv{suffix}", None)
            if conv is not None:
                isolated = suffix != "" and ctx.numerics.camera_conv == "isolated"
                old = before.get(name + suffix)
                if ctx.window is not None and not isolated:
                    reach = conv.taps.shape[0] - 1
                    inputs[name + suffix] = last_frames(value, reach, old)
                value = conv(value, ctx.layout, old, isolated=isolated)
            value = rearrange(value, "B F P (N D) -> B F P N D", N=self.heads)
            named[name] = shard(value, "B F P N D")
            norm = getattr(self, f"{name}_norm{suffix}", None)
            of[name] = ucpe.Features(
                scale=None if norm is None else norm.scale[...],
                eps=1e-5 if norm is None else norm.eps,
                relu=not self.softmax,
            )
        if not self.softmax:
            size, tokens = named["k"].shape[-1], named["k"].shape[2]
            of["k"] = of["k"]._replace(factor=key_factor(size, tokens))
        return _Heads(**named, of_q=of["q"], of_k=of["k"])

    def _gates(self, x: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
        """beta (B, F, P, N) of a token and decay (B, F, N) of a frame, float32."""
        beta = jax.nn.sigmoid(self.beta(x)).astype(jnp.float32)
        pooled = jnp.mean(x.astype(jnp.float32), axis=2).astype(x.dtype)
        step = jax.nn.softplus(self.decay(pooled).astype(jnp.float32) + self.decay_step[...])
        decay = jnp.exp(-jnp.exp(self.decay_rate_log[...].astype(jnp.float32)) * step)
        if ctx.frame_mask is not None:
            real = ctx.frame_mask.astype(jnp.float32)[..., None]  # B F 1
            beta = beta * real[..., None]
            decay = decay * real + (1.0 - real)  # padding keeps the state as it is
        return beta, decay


def _decay_init(heads: int, rngs: nnx.Rngs) -> tuple[nnx.Param, nnx.Param]:
    """Mamba-2's initial rates: A uniform in (0, 16), step log-uniform in (0.001, 0.1)."""

    def rate_log(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, minval=1e-3, maxval=16.0))

    def step(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
        low, high = math.log(1e-3), math.log(1e-1)
        step = jnp.exp(jax.random.uniform(key, shape, dtype, minval=low, maxval=high))
        return step + jnp.log(-jnp.expm1(-step))

    return nnx.Param(draw(rate_log, rngs, (heads,))), nnx.Param(draw(step, rngs, (heads,)))


def _mask(ctx: Context, dtype: DTypeLike) -> jax.Array | None:
    return None if ctx.frame_mask is None else ctx.frame_mask.astype(dtype)[..., None, None]


def _gdn_main(
    heads: _Heads,
    gates: tuple[jax.Array, jax.Array],
    ctx: Context,
    old: jax.Array | None,
    old_normaliser: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Numerator on rotated q and k, denominator on plain ones.

    Returns:
      (B, F, P, C), and the last states (B, N, V, D) of the numerator and of the denominator.
    """
    beta, decay = gates
    v, dtype = heads.v, heads.v.dtype
    if ctx.angles is None:
        q_rot = q = ucpe.features(heads.q, heads.of_q)
        k_rot = k = ucpe.features(heads.k, heads.of_k)
    else:
        q, q_rot = plain_and_rotated(heads.q, ctx.angles, heads.of_q)
        k, k_rot = plain_and_rotated(heads.k, ctx.angles, heads.of_k)

    def mix(
        q: jax.Array, q_rot: jax.Array, k: jax.Array, k_rot: jax.Array, v: jax.Array,
        beta: jax.Array, decay: jax.Array, old: jax.Array | None, old_normaliser: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
        with jax.named_scope("gdn"):
            states, last = recurrent_states(k_rot, v, beta, decay, ctx.layout, old)
            normaliser, last_normaliser = recurrent_states(
                k, None, beta, decay, ctx.layout, old_normaliser
            )
            y = gdn.normalised_read_out(states, normaliser, q_rot, q, GDN_EPS)
        return y.astype(dtype), last, last_normaliser

    inputs = (*[HEADS] * 5, *_GATES, _STATE, _STATE)
    run = per_rank(mix, inputs, (HEADS, _STATE, _STATE))
    y, last, last_normaliser = run(q, q_rot, k, k_rot, v, beta, decay, old, old_normaliser)
    y = rearrange(y, "B F P N D -> B F P (N D)")
    mask = _mask(ctx, dtype)
    return y if mask is None else y * mask, last, last_normaliser


def _to_ray_space(
    heads: _Heads, rays: RayTransforms, *, capped: bool
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Moved q, k and v, and the mean squared inflation of keys (B, F, N)."""
    transposed = jnp.swapaxes(rays.ray_from_world, -1, -2)
    move = functools.partial(to_ray_space, capped=capped)
    q, _ = move(heads.q, transposed, rays.angles, heads.of_q)
    k, inflation = move(heads.k, rays.world_from_ray, rays.angles, heads.of_k)
    v, _ = move(heads.v, rays.world_from_ray, rays.angles)
    return q, k, v, inflation


def _from_ray_space(y: jax.Array, ctx: Context, rays: RayTransforms) -> jax.Array:
    mask = _mask(ctx, y.dtype)
    if mask is not None:
        y = y * mask[..., None]
    y = from_ray_space(y, rays.ray_from_world, rays.angles)
    return rearrange(y, "B F P N D -> B F P (N D)")


def _gdn_camera(
    heads: _Heads,
    gates: tuple[jax.Array, jax.Array],
    ctx: Context,
    rays: RayTransforms,
    old: jax.Array | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Numerator only, in ray space: (B, F, P, C), and its last state (B, N, V, D)."""
    beta, decay = gates
    dtype = heads.v.dtype
    q, k, v, inflation = _to_ray_space(heads, rays, capped=ctx.numerics.caps(softmax=False))
    beta = beta / jnp.maximum(inflation, 1.0)[:, :, None]
    if ctx.frame_mask is not None:
        real = _mask(ctx, dtype)[..., None]  # pyright: ignore[reportOptionalSubscript]
        q, k, v = q * real, k * real, v * real

    def mix(
        q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, decay: jax.Array,
        old: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        with jax.named_scope("gdn"):
            states, last = recurrent_states(k, v, beta, decay, ctx.layout, old)
            return gdn.read_out(states, q).astype(dtype), last

    run = per_rank(mix, (*[HEADS] * 3, *_GATES, _STATE), (HEADS, _STATE))
    y, last = run(q, k, v, beta, decay, old)
    return _from_ray_space(y, ctx, rays), last


def _softmax_main(
    heads: _Heads, ctx: Context, cache: KeyValueCache | None
) -> tuple[jax.Array, KeyValueCache | None]:
    """(B, F, P, C), and in a stream the cache with this chunk."""
    v = heads.v
    if ctx.angles is None:
        q, k = ucpe.features(heads.q, heads.of_q), ucpe.features(heads.k, heads.of_k)
    else:
        q = rotate(heads.q, ctx.angles, heads.of_q)
        k = rotate(heads.k, ctx.angles, heads.of_k)
    if ctx.frame_mask is not None:
        # padded keys are zeroed, not hidden, in the reference's main branch
        real = _mask(ctx, q.dtype)[..., None]  # pyright: ignore[reportOptionalSubscript]
        q, k, v = q * real, k * real, v * real
    scale = softmax_scale(q.shape[-1], ctx.numerics.main_scale)
    layout = _softmax_layout(ctx)
    y = frame_attention(q, k, v, layout, scale=scale, cache=cache, cached=_cached(ctx))
    return rearrange(y, "B F P N D -> B F P (N D)"), _written(ctx, cache, k, v)


def _softmax_layout(ctx: Context) -> FrameLayout:
    if ctx.numerics.softmax_sees == "clip":
        return ctx.layout.of_clip()
    return ctx.layout


def _cached(ctx: Context) -> jax.Array | None:
    """() int32, valid frames of the stream's caches."""
    return None if ctx.window is None or ctx.chunks is None else ctx.window.valid(ctx.chunks)


def _written(
    ctx: Context, cache: KeyValueCache | None, k: jax.Array, v: jax.Array
) -> KeyValueCache | None:
    """The cache with this chunk's keys and values; None outside of a stream."""
    if ctx.window is None or ctx.chunks is None:
        return None
    return ctx.window.write(cache, k, v, ctx.chunks)


def _softmax_camera(
    heads: _Heads, ctx: Context, rays: RayTransforms, cache: KeyValueCache | None
) -> tuple[jax.Array, KeyValueCache | None]:
    q, k, v, _ = _to_ray_space(heads, rays, capped=ctx.numerics.caps(softmax=True))
    if ctx.frame_mask is not None:
        real = _mask(ctx, q.dtype)[..., None]  # pyright: ignore[reportOptionalSubscript]
        q, v = q * real, v * real
    scale = softmax_scale(q.shape[-1], ctx.numerics.camera_scale)
    layout = _softmax_layout(ctx)
    y = frame_attention(
        q, k, v, layout, key_mask=ctx.key_mask, scale=scale, cache=cache, cached=_cached(ctx)
    )
    return _from_ray_space(y, ctx, rays), _written(ctx, cache, k, v)
