"""Stage 2: the video half of the LTX-2 transformer, which refines stage 1's latents.

    latents -> linear -> blocks [self-attention, text, feed-forward] -> final layer -> velocity

One forward pass serves every use: a block with a window of keys and values before it, a whole clip
whose sink frames see only themselves, plain attention over all tokens, and training.

Axis letters: B batch, F latent frames, H W latent rows and columns, P = H W tokens a frame,
T = F P tokens, L text tokens, C width, N heads, D head size, M modulation vectors.
Reference: diffusers `SanaWMLTX2RefinerTransformer3DModel`; text modulation as in
`LTX2VideoTransformer3DModel`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import lax

from sanawm_jax.core.attention import attention
from sanawm_jax.core.layers import Linear, modulated_norm
from sanawm_jax.core.modulation import timestep_features
from sanawm_jax.core.params import stack
from sanawm_jax.core.stack import REMAT
from sanawm_jax.refiner.config import RefinerConfig
from sanawm_jax.refiner.kv_window import KeyValue
from sanawm_jax.refiner.layers import AttentionProjections, FeedForward, Norm
from sanawm_jax.refiner.rope import Rotation, VideoRope, rotate, rotations

PRE_ROPE = "pre_rope"
POST_ROPE = "post_rope"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prefix:
    """Keys and values before the active frames, as `KVWindow` keeps them."""

    sink: KeyValue  # layers B F P N D, before rotation
    sink_rope: VideoRope  # where the sink sits for these active frames
    history: KeyValue  # layers B F P N D, rotated
    history_frames: jax.Array  # () int32, how many frames of history are valid


@dataclasses.dataclass(frozen=True)
class _Context:
    """What every layer shares."""

    modulation: jax.Array  # B F|1 P|1 M C float32
    text: jax.Array  # B L C
    text_mask: jax.Array | None  # B L bool
    text_modulation: jax.Array | None  # B 2 C float32
    rotation: Rotation
    sink_rotation: Rotation | None
    key_count: jax.Array | None  # B int32, valid keys of [sink, active, history]
    sink_frames: int
    capture: str | None


class AdaLNSingle(nnx.Module):
    """Timesteps to an embedding and to modulation vectors. Reference: `LTX2AdaLayerNormSingle`."""

    def __init__(self, width: int, count: int, *, rngs: nnx.Rngs):
        self.time_in = Linear(256, width, rngs=rngs)
        self.time_out = Linear(width, width, rngs=rngs)
        self.modulation = Linear(width, count * width, rngs=rngs)
        self.count = count

    def __call__(self, timesteps: jax.Array) -> tuple[jax.Array, jax.Array]:
        """timesteps (...) to modulation (..., M, C) and embedding (..., C), both float32.

        An fp32 island: the reference rounds each of these few vectors to the compute dtype, and
        that error reaches every token of every block.
        """
        time = self.time_out(jax.nn.silu(self.time_in(timestep_features(timesteps))))
        modulation = self.modulation(jax.nn.silu(time))
        return rearrange(modulation, "... (M C) -> ... M C", M=self.count), time


class CaptionProjection(nnx.Module):
    """Two linear layers around a tanh GELU. Reference: `PixArtAlphaTextProjection`."""

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(features, width, rngs=rngs)
        self.linear_2 = Linear(width, width, rngs=rngs)

    def __call__(self, text: jax.Array) -> jax.Array:
        return self.linear_2(jax.nn.gelu(self.linear_1(text), approximate=True))


def _table(key: jax.Array, rows: int, width: int) -> nnx.Param:
    return nnx.Param(jax.random.normal(key, (rows, width)) / width**0.5)


class Block(nnx.Module):
    """Self-attention, cross-attention to the text and feed-forward, modulated by the timestep."""

    def __init__(self, config: RefinerConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, heads, head = config.width, config.num_attention_heads, config.attention_head_dim

        def projections(context_width: int | None = None) -> AttentionProjections:
            return AttentionProjections(
                width,
                heads,
                head,
                context_width=context_width,
                is_gated=config.gated_attn,
                use_bias=config.attention_bias,
                use_out_bias=config.attention_out_bias,
                rngs=rngs,
            )

        def norm() -> Norm:
            return Norm(width, eps=config.norm_eps, has_scale=config.norm_elementwise_affine)

        self.attn_norm, self.cross_norm, self.ffn_norm = norm(), norm(), norm()
        self.attn = projections()
        self.cross_attn = projections(config.cross_attention_dim)
        self.ffn = FeedForward(width, config.activation_fn, use_bias=config.ff_bias, rngs=rngs)
        self.modulation_table = _table(rngs.params(), config.num_modulations, width)
        if config.modulates_text:
            self.text_modulation_table = _table(rngs.params(), 2, width)

    def __call__(
        self, x: jax.Array, prefix: tuple[KeyValue, KeyValue] | None, ctx: _Context
    ) -> tuple[jax.Array, KeyValue | None]:
        """x (B, F, P, C) and this layer's (sink, history) to x and, on request, its own k, v."""
        # fp32 island: modulation and norms
        modulation = ctx.modulation + self.modulation_table[...].astype(jnp.float32)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate, *cross = (
            modulation[..., i, :] for i in range(modulation.shape[-2])
        )  # B F|1 P|1 C each
        y, captured = self._self_attention(self.attn_norm(x, scale, shift), prefix, ctx)
        x = x + (gate * y).astype(x.dtype)
        if cross:
            cross_shift, cross_scale, cross_gate = cross
            y = self._cross_attention(self.cross_norm(x, cross_scale, cross_shift), ctx)
            x = x + (cross_gate * y).astype(x.dtype)
        else:
            x = x + self._cross_attention(self.cross_norm(x), ctx)
        y = self.ffn(self.ffn_norm(x, ffn_scale, ffn_shift))
        return x + (ffn_gate * y).astype(x.dtype), captured

    def _self_attention(
        self, x: jax.Array, prefix: tuple[KeyValue, KeyValue] | None, ctx: _Context
    ) -> tuple[jax.Array, KeyValue | None]:
        kind, per_frame = self.config.rope_type, x.shape[2]
        frames = x.shape[1]
        x = rearrange(x, "B F P C -> B (F P) C")
        q, k, v = self.attn.qkv(x, x)  # B T N D
        captured = (k, v)
        q, k = rotate(q, ctx.rotation, kind), rotate(k, ctx.rotation, kind)
        if ctx.capture == POST_ROPE:
            captured = (k, v)
        if prefix is not None:
            assert ctx.sink_rotation is not None
            sink, history = (
                jax.tree.map(lambda a: rearrange(a, "B F P N D -> B (F P) N D"), part)
                for part in prefix
            )
            # valid keys first: a count then hides the unfilled slots of history
            k = jnp.concatenate([rotate(sink.k, ctx.sink_rotation, kind), k, history.k], 1)
            v = jnp.concatenate([sink.v, v, history.v], 1)
            mixed = attention(q, k, v, key_count=ctx.key_count)
        elif 0 < ctx.sink_frames < frames:
            # the sink sees itself, the rest sees all: two calls with sliced keys need no mask
            cut = ctx.sink_frames * per_frame
            sink_mixed = attention(q[:, :cut], k[:, :cut], v[:, :cut])
            mixed = jnp.concatenate([sink_mixed, attention(q[:, cut:], k, v)], 1)
        else:
            mixed = attention(q, k, v)
        y = rearrange(self.attn.project_out(mixed, x), "B (F P) C -> B F P C", P=per_frame)
        if ctx.capture is None:
            return y, None
        return y, KeyValue(
            *(rearrange(a, "B (F P) N D -> B F P N D", P=per_frame) for a in captured)
        )

    def _cross_attention(self, x: jax.Array, ctx: _Context) -> jax.Array:
        per_frame, text = x.shape[2], ctx.text
        x = rearrange(x, "B F P C -> B (F P) C")
        if hasattr(self, "text_modulation_table"):
            table = self.text_modulation_table[...].astype(jnp.float32)[None]  # 1 2 C
            if ctx.text_modulation is not None:
                table = table + ctx.text_modulation
            shift, scale = table[:, :1], table[:, 1:]
            text = (text.astype(jnp.float32) * (1.0 + scale) + shift).astype(text.dtype)
        q, k, v = self.cross_attn.qkv(x, text)
        y = self.cross_attn.project_out(attention(q, k, v, key_mask=ctx.text_mask), x)
        return rearrange(y, "B (F P) C -> B F P C", P=per_frame)


class Refiner(nnx.Module):
    """The whole stage-2 transformer; `__call__` predicts the velocity noise - clean."""

    def __init__(self, config: RefinerConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.embed = Linear(config.in_channels, width, rngs=rngs)
        if config.use_prompt_embeddings:
            self.caption = CaptionProjection(config.caption_channels, width, rngs=rngs)
        self.time = AdaLNSingle(width, config.num_modulations, rngs=rngs)
        if config.modulates_text and config.use_prompt_adaln_single:
            self.text_time = AdaLNSingle(width, 2, rngs=rngs)
        self.blocks = stack(
            lambda key: Block(config, rngs=nnx.Rngs(key)), rngs.params(), (config.num_layers,)
        )
        self.final_table = _table(rngs.params(), 2, width)
        self.final = Linear(width, config.in_channels, rngs=rngs)

    def timestep_scale(self) -> float:
        """What a noise level is multiplied with to be a timestep."""
        return float(self.config.timestep_scale_multiplier)

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text: jax.Array,
        rope: VideoRope,
        *,
        text_mask: jax.Array | None = None,
        text_timesteps: jax.Array | None = None,
        prefix: Prefix | None = None,
        sink_frames: int = 0,
        capture: str | None = None,
        remat: str = "none",
    ) -> tuple[jax.Array, KeyValue | None]:
        """Predicts the velocity of every latent; pure, and differentiable by `jax.grad`.

        Args:
          latents: (B, F, H, W, c); its dtype is the compute dtype.
          timesteps: (B, F or 1, P or 1), noise level times `timestep_scale_multiplier`.
          text: (B, L, text_width) from the connectors.
          rope: tables of these frames and this grid, `rope.video_rope`.
          text_mask: (B, L), non-zero for a token; None shows all, as the connectors' text needs.
          text_timesteps: (B,), which modulates the text where the configuration says so; the
            largest of `timesteps` by default.
          prefix: keys and values before these frames, which every frame sees.
          sink_frames: the first frames, which see only themselves; not together with a prefix.
          capture: `pre_rope` or `post_rope`, also return keys and values of these frames.
          remat: what the backward pass keeps of a block, see `core.stack.scan_runs`.

        Returns:
          (B, F, H, W, c) in the compute dtype, and (layers, B, F, P, N, D) keys and values or
          None.

        Raises:
          ValueError: a prefix with sink frames, or an unknown `capture` or `remat`.
        """
        config, dtype = self.config, latents.dtype
        if prefix is not None and sink_frames:
            raise ValueError("a prefix holds the sink already; sink_frames must be 0")
        if capture not in (None, PRE_ROPE, POST_ROPE):
            raise ValueError(f"capture={capture!r}; use None, {PRE_ROPE} or {POST_ROPE}")
        if remat not in REMAT:
            raise ValueError(f"remat={remat!r}; use one of {', '.join(REMAT)}")
        batch, _, height, _, _ = latents.shape
        x = self.embed(rearrange(latents, "B F H W c -> B F (H W) c"))
        modulation, time = self.time(timesteps)
        text_modulation = None
        if hasattr(self, "text_time"):
            if text_timesteps is None:
                text_timesteps = jnp.max(timesteps, (1, 2))
            text_modulation, _ = self.text_time(text_timesteps)
        text = text.astype(dtype)
        heads = (config.num_attention_heads, config.attention_head_dim)
        sink_rotation, key_count, parts = None, None, None
        if prefix is not None:
            sink_rotation = rotations(prefix.sink_rope, *heads)
            valid = prefix.sink.k.shape[2] + x.shape[1] + prefix.history_frames
            key_count = jnp.full((batch,), valid * x.shape[2], jnp.int32)
            parts = (prefix.sink, prefix.history)
        ctx = _Context(
            modulation=modulation,
            text=self.caption(text) if hasattr(self, "caption") else text,
            text_mask=None if text_mask is None else text_mask > 0,
            text_modulation=text_modulation,
            rotation=rotations(rope, *heads),
            sink_rotation=sink_rotation,
            key_count=key_count,
            sink_frames=sink_frames,
            capture=capture,
        )

        def layer(block: Block, x: jax.Array, parts: tuple[KeyValue, KeyValue] | None):
            return block(x, parts, ctx)

        if remat != "none":
            layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat])
        x, captured = lax.scan(
            lambda x, scanned: layer(scanned[0], x, scanned[1]), x, (self.blocks, parts)
        )
        table = self.final_table[...].astype(jnp.float32) + time[..., None, :]  # B F|1 P|1 2 C
        y = self.final(modulated_norm(x, table[..., 1, :], table[..., 0, :]))
        return rearrange(y, "B F (H W) c -> B F H W c", H=height), captured
