"""Stage 1: the camera-controlled DiT of SANA-WM.

    latents -> patch embedding -> blocks [self-attention + camera, Plücker, text, feed-forward]
            -> final layer -> velocity

Axis letters: B batch, F latent frames, H W latent rows and columns, P tokens per frame, T = F P
video tokens, L text tokens, C width, c latent channels, N heads, D head size, A rotated pairs of a
head, M modulation vectors, p q latent rows and columns per token.
Reference: diffusers `SanaWMTransformer3DModel`, `SanaVideoMSCamCtrlBlock`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Num, Shaped

from sanawm_jax.core.frame_attention import text_attention
from sanawm_jax.core.frames import FrameLayout, check_carry, layout_of
from sanawm_jax.core.layers import (
    Conv,
    Linear,
    RMSNorm,
    kernel_init,
    modulated_norm,
    modulation_table,
    zeros_init,
)
from sanawm_jax.core.modulation import timestep_features
from sanawm_jax.core.params import stack
from sanawm_jax.core.rope import pair_split, rope_angles
from sanawm_jax.core.sharding import axis_size, check_heads, shard
from sanawm_jax.core.stack import part, scan_runs
from sanawm_jax.dit.attention import Context, SelfAttention
from sanawm_jax.dit.config import DiTConfig, LayerKind
from sanawm_jax.dit.feed_forward import GatedConvFeedForward, Mlp
from sanawm_jax.dit.state import DiTState, LayerCarry, Window
from sanawm_jax.dit.ucpe import RayTransforms, inverse_rigid, ray_matrices, up_latitude_map
from sanawm_jax.runtime.errors import InputError


def _padded(a: jax.Array, layout: FrameLayout, mode: str = "constant") -> jax.Array:
    """Fills the frame axis (B, F, ...) up to the layout's size."""
    extra = layout.padded - layout.frames
    return jnp.pad(a, [(0, 0), (0, extra)] + [(0, 0)] * (a.ndim - 2), mode=mode)


class PatchEmbed(nnx.Module):
    """Non-overlapping patches of one frame to tokens."""

    def __init__(self, config: DiTConfig, channels: int, *, zero: bool = False, rngs: nnx.Rngs):
        self.patch = config.patch_size
        init = zeros_init if zero else kernel_init
        self.conv = Conv(channels, config.hidden_size, self.patch, kernel_init=init, rngs=rngs)

    def __call__(self, x: Float[Array, "B F H W c"]) -> Float[Array, "B F P C"]:
        # torch pads an odd kernel by half of it, an even one not at all
        pad = [(k // 2, k // 2) if self.patch[-1] % 2 else (0, 0) for k in self.patch]
        y = self.conv(x, strides=self.patch, padding=pad)
        return rearrange(y, "B F H W C -> B F (H W) C")


class CrossAttention(nnx.Module):
    """Video queries, text keys and values. Reference: `MultiHeadCrossAttention`."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q = Linear(width, width, rngs=rngs)
        self.kv = Linear(width, 2 * width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)
        if config.cross_norm:
            self.q_norm = RMSNorm(width, eps=1e-6)
            self.k_norm = RMSNorm(width, eps=1e-6)

    def __call__(
        self,
        x: Float[Array, "B F P C"],
        text: Float[Array, "B L C"],
        text_mask: Bool[Array, "B L"],
    ) -> Float[Array, "B F P C"]:
        """Lets the video tokens x attend to the text; false in `text_mask` hides a text token."""
        q = self.q(x)
        k, v = jnp.split(self.kv(text), 2, -1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q = rearrange(q, "B F P (N D) -> B F P N D", N=self.heads)
        k, v = (rearrange(a, "B L (N D) -> B L N D", N=self.heads) for a in (k, v))
        y = text_attention(q, k, v, text_mask)
        return self.out(rearrange(y, "B F P N D -> B F P (N D)"))


class Block(nnx.Module):
    """One transformer block with per-frame adaptive layer norm (adaLN-zero)."""

    def __init__(self, config: DiTConfig, kind: LayerKind, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.attn = SelfAttention(config, softmax=kind.softmax, rngs=rngs)
        self.cross_attn = CrossAttention(config, rngs=rngs)
        if config.ffn_type == "mlp":
            self.ffn = Mlp(width, config.ffn_width, width, rngs=rngs)
        else:
            self.ffn = GatedConvFeedForward(config, rngs=rngs)
        self.modulation_table = modulation_table(6, width, rngs)
        if kind.plucker:
            self.plucker = Linear(width, width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B F P C"], ctx: Context, carry: LayerCarry | None = None
    ) -> tuple[Float[Array, "B F P C"], LayerCarry | None]:
        """Returns the new x, and in a stream the carry after this chunk."""

        def masked(a: jax.Array) -> jax.Array:
            if ctx.frame_mask is None:
                return a
            return a * ctx.frame_mask.astype(a.dtype)[..., None, None]

        modulation = ctx.modulation + self.modulation_table[...].astype(jnp.float32)  # B F 6 C
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            modulation[:, :, i, None] for i in range(6)
        )  # B F 1 C each

        def attend(x: jax.Array) -> tuple[jax.Array, Any]:
            old = None if carry is None else carry.attention
            y, new = self.attn(masked(modulated_norm(x, scale1, shift1)), ctx, old)
            return shard(x + masked((gate1 * y).astype(x.dtype)), "B F P C"), new

        def inform(x: jax.Array) -> jax.Array:
            if ctx.plucker is not None and hasattr(self, "plucker"):
                x = x + self.plucker(ctx.plucker)
            return masked(x + self.cross_attn(x, ctx.text, ctx.text_mask))

        def feed(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            y, new = masked(modulated_norm(x, scale2, shift2)), None
            if isinstance(self.ffn, Mlp):
                y = self.ffn(y)
            else:
                layout = ctx.layout.of_clip() if ctx.numerics.ffn_sees == "clip" else ctx.layout
                y, new = self.ffn(y, ctx.grid, layout, None if carry is None else carry.ffn)
            x = shard(x + masked((gate2 * y).astype(x.dtype)), "B F P C")
            return x, None if ctx.window is None else new

        # softmax of a long clip is most of a step, the recurrence a small part of its own block
        x, attention = part(attend, ctx.remat, keep=self.attn.softmax)(masked(x))
        x, ffn = part(feed, ctx.remat)(part(inform, ctx.remat)(x))
        return x, None if ctx.window is None else LayerCarry(attention, ffn)


class Run(nnx.Module):
    """Layers of one kind, their parameters stacked (repeats, length, ...)."""

    def __init__(
        self, config: DiTConfig, kind: LayerKind, shape: tuple[int, int], *, rngs: nnx.Rngs
    ):
        self.layers = stack(lambda rngs: Block(config, kind, rngs=rngs), rngs, shape)


class Segment(nnx.Module):
    """Runs that repeat together."""

    def __init__(self, runs: list[Run]):
        self.runs = nnx.List(runs)


class DiT(nnx.Module):
    """The whole stage-1 network; `__call__` predicts the velocity noise - clean."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.config = config
        self.patch_embed = PatchEmbed(config, config.in_channels, rngs=rngs)
        self.time_in = Linear(256, width, rngs=rngs)
        self.time_out = Linear(width, width, rngs=rngs)
        self.modulation = Linear(width, 6 * width, kernel_init=zeros_init, rngs=rngs)
        self.text_embed = Mlp(config.caption_channels, width, width, rngs=rngs)
        if config.y_norm:
            self.text_norm = RMSNorm(width, eps=1e-5)
        if config.use_chunk_plucker_post_attn:
            self.plucker_embed = PatchEmbed(
                config, config.chunk_plucker_channels, zero=True, rngs=rngs
            )
        self.raymap_embed = PatchEmbed(config, 3, rngs=rngs)
        self.segments = nnx.List(
            [
                Segment(
                    [
                        Run(config, kind, (segment.repeats, length), rngs=rngs)
                        for kind, length in segment.runs
                    ]
                )
                for segment in config.segments()
            ]
        )
        self.final_table = modulation_table(2, width, rngs)
        outputs = math.prod(config.patch_size) * config.in_channels
        self.final = Linear(width, outputs, kernel_init=zeros_init, rngs=rngs)

    def __call__(
        self,
        latents: Float[Array, "B F H W c"],
        timesteps: Num[Array, "B F"],
        text: Float[Array, "B L C"],
        text_mask: Shaped[Array, "B L"],
        camera: Float[Array, "B F 20"] | None = None,
        plucker: Float[Array, "B F H W _"] | None = None,
        frame_mask: Shaped[Array, "B F"] | None = None,
        *,
        chunk_starts: tuple[int, ...] | None = None,
        cached_chunks: int | None = None,
        sink: bool = True,
        teacher_forced: bool = False,
        remat: str = "none",
        unroll: bool = False,
    ) -> Float[Array, "B F H W c"]:
        """Predicts the velocity of every latent of a whole clip; `stream` takes a chunk at a time.

        Args:
          latents: their dtype is the compute dtype.
          timesteps: in 0..1000; the network sees whole numbers, fractions are cut off.
          text: `config.caption_channels` channels.
          text_mask: non-zero for a token.
          camera: poses relative to the first frame and intrinsics in latent pixels;
            None switches the camera branch off.
          plucker: Plücker rays, 6 channels for each pixel frame of a latent frame.
          frame_mask: 0 for padded frames.
          chunk_starts: first frame of every chunk of the chunk-causal model, see
            `core.frames.chunk_starts`; None is the bidirectional model.
          cached_chunks, sink: which earlier chunks the softmax layers see, by default all; see
            `core.frames.FrameLayout`.
          teacher_forced: the frames are a clip twice, first the history, then the noisy frames that
            continue it; see `core.teacher_forcing`. `chunk_starts` names every frame.
          remat, unroll: see `core.stack.scan_runs`.

        Returns:
          The velocity in the compute dtype.

        Raises:
          InputError: chunk starts that do not ascend from 0, heads that the mesh cannot split.
        """
        return self._run(
            latents,
            timesteps,
            text,
            text_mask,
            camera,
            plucker,
            frame_mask,
            layout_of(latents.shape[1], chunk_starts, cached_chunks, sink, teacher_forced),
            remat=remat,
            unroll=unroll,
        )[0]

    def stream(
        self,
        latents: Float[Array, "B F H W c"],
        timesteps: Num[Array, "B F"],
        text: Float[Array, "B L C"],
        text_mask: Shaped[Array, "B L"],
        camera: Float[Array, "B F 20"] | None = None,
        plucker: Float[Array, "B F H W _"] | None = None,
        *,
        window: Window,
        state: DiTState | None = None,
        remat: str = "none",
        unroll: bool = False,
    ) -> tuple[Float[Array, "B F H W c"], DiTState]:
        """Predicts the velocity of one chunk of a stream, which sees all that the state holds.

        The chunk-causal whole clip gives the same numbers where the window holds all chunks. A
        sampler keeps the state of a last pass over the finished chunk at timestep 0, and drops
        those of the passes before; a compiled function does not compute what it does not return.

        Args:
          latents, timesteps, text, text_mask, camera, plucker: see `__call__`; the frames are
            those of the chunk, the camera's poses are relative to the stream's first frame.
          window: of the stream.
          state: after the chunks before; None for the first chunk.
          remat, unroll: see `core.stack.scan_runs`.

        Returns:
          The velocity in the compute dtype, and the state after this chunk.

        Raises:
          InputError: a chunk of another length than the window's, a state of another window, or
            a mesh that shares the frames out.
        """
        layout = layout_of(latents.shape[1], None)
        check_carry(layout)
        self.config.numerics.check_stream()
        expected = window.first if state is None else window.size
        if layout.frames != expected:
            raise InputError(
                f"this chunk has {layout.frames} latent frames, the window takes {expected}"
            )
        if state is not None and state.window != window:
            raise InputError(f"the state is of a stream with {state.window}, not with {window}")
        velocity, layers, chunks = self._run(
            latents,
            timesteps,
            text,
            text_mask,
            camera,
            plucker,
            None,
            layout,
            window=window,
            state=state,
            remat=remat,
            unroll=unroll,
        )
        return velocity, DiTState(layers, chunks + 1, window)

    def _run(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        text_mask: jax.Array,
        camera: jax.Array | None,
        plucker: jax.Array | None,
        frame_mask: jax.Array | None,
        layout: FrameLayout,
        *,
        window: Window | None = None,
        state: DiTState | None = None,
        remat: str = "none",
        unroll: bool = False,
    ) -> tuple[jax.Array, Any, jax.Array]:
        """The velocity, the layers' carries by segment and run, and the chunks before this one."""
        config, dtype = self.config, latents.dtype
        check_heads(config.num_heads, axis_size("tensor"))
        chunks = jnp.zeros((), jnp.int32) if state is None else state.chunks
        first_frame = 0 if state is None else state.frame
        _, patch_h, patch_w = config.patch_size
        grid = (latents.shape[2] // patch_h, latents.shape[3] // patch_w)
        frames = layout.padded
        places = (frames // 2 if layout.forced else frames, *grid)
        key_mask = None if frame_mask is None else _padded(frame_mask, layout) > 0
        if frames > layout.frames:
            if frame_mask is None:
                frame_mask = jnp.ones(latents.shape[:2], dtype)
            latents, timesteps, frame_mask = (
                _padded(a, layout) for a in (latents, timesteps, frame_mask)
            )
            plucker = None if plucker is None else _padded(plucker, layout)
            # a camera that repeats is valid; zeros are none
            camera = None if camera is None else _padded(camera, layout, mode="edge")
        x = shard(self.patch_embed(latents), "B F P C")
        if camera is not None and not config.use_chunk_plucker_post_attn:
            maps = up_latitude_map(camera, (grid[0] * patch_h, grid[1] * patch_w))
            x = x + self.raymap_embed(maps.astype(dtype))

        features = timestep_features(jnp.trunc(timesteps.astype(jnp.float32))).astype(dtype)
        time = self.time_out(jax.nn.silu(self.time_in(features)))  # B F C
        modulation = rearrange(self.modulation(jax.nn.silu(time)), "B F (M C) -> B F M C", M=6)
        text = self.text_embed(text.astype(dtype))
        if hasattr(self, "text_norm"):
            text = self.text_norm(text)

        ctx = Context(
            modulation=modulation,
            text=text,
            text_mask=text_mask > 0,
            angles=self._angles(places, first_frame, layout.forced, halved=False),
            rays=(
                None if camera is None else self._rays(camera, places, first_frame, layout.forced)
            ),
            plucker=(
                self.plucker_embed(plucker.astype(dtype))
                if plucker is not None and config.use_chunk_plucker_post_attn
                else None
            ),
            frame_mask=frame_mask,
            key_mask=key_mask,
            grid=grid,
            layout=layout,
            remat=remat,
            numerics=config.numerics,
            window=window,
            chunks=None if window is None else chunks,
        )
        carries = []
        for i, segment in enumerate(self.segments):
            x, found = scan_runs(
                [run.layers for run in segment.runs],
                x,
                lambda block, x, carry: block(x, ctx, carry),
                None if state is None else state.layers[i],
                remat=remat,
                unroll=unroll,
            )
            carries.append(found)

        table = self.final_table[...].astype(jnp.float32) + time[:, :, None]  # B F 2 C
        y = self.final(modulated_norm(x, table[:, :, 1, None], table[:, :, 0, None]))
        y = y[:, : layout.frames]
        velocity = rearrange(
            y,
            "B F (H W) (p q c) -> B F (H p) (W q) c",
            H=grid[0],
            p=patch_h,
            q=patch_w,
        )
        return velocity, tuple(carries), chunks

    def _angles(
        self, grid: tuple[int, int, int], first_frame: int | jax.Array, twice: bool, *, halved: bool
    ) -> jax.Array | None:
        """(F, P, A) of a whole head, or of the half that the camera branch rotates.

        With `twice` they are those of two copies of the frames.
        """
        if not self.config.use_pe:
            return None
        head = self.config.linear_head_dim
        pairs = pair_split(head // 2) if halved else None
        angles = rope_angles(head, grid, pairs=pairs, first_frame=first_frame)
        angles = jnp.concatenate([angles, angles]) if twice else angles
        return rearrange(angles, "F H W A -> F (H W) A")

    def _rays(
        self,
        camera: jax.Array,
        grid: tuple[int, int, int],
        first_frame: int | jax.Array,
        twice: bool,
    ) -> RayTransforms:
        _, patch_h, patch_w = self.config.patch_size
        matrices = ray_matrices(camera, grid[1:], (patch_h, patch_w))
        matrices = rearrange(matrices, "B F H W i j -> B F (H W) i j")
        angles = self._angles(grid, first_frame, twice, halved=True)
        return RayTransforms(matrices, inverse_rigid(matrices), angles)
