"""Stage 2: the video half of the LTX-2 transformer, which refines the latents of stage 1.

    latents -> linear -> blocks [self-attention, text, feed-forward] -> final layer -> velocity

The same forward pass is used for a block with a KV cache, for a whole clip whose sink frames see
only themselves, for attention over all tokens, and for training.

Axis letters: B batch, F latent frames, H W latent rows and columns, P = H W tokens per frame,
T = F P tokens, L text tokens, C width, N heads, D head size, M modulation vectors, c latent
channels, E latent frames that the KV cache has room for, Y layers.
Reference: diffusers `SanaWMLTX2RefinerTransformer3DModel`; text modulation as in
`LTX2VideoTransformer3DModel`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Num, Shaped

from sanawm_jax.core.attention import attention, attention_to_both
from sanawm_jax.core.layers import Linear, modulated_norm, modulation_table
from sanawm_jax.core.modulation import timestep_features
from sanawm_jax.core.params import Params, stack
from sanawm_jax.core.stack import REMAT, over_layers
from sanawm_jax.refiner.config import RefinerConfig
from sanawm_jax.refiner.kv_window import KeyValue, KVWindow, with_block
from sanawm_jax.refiner.layers import AttentionProjections, FeedForward, Norm
from sanawm_jax.refiner.rope import Rotation, VideoRope, rotate, rotations


@dataclasses.dataclass(frozen=True)
class _Context:
    """The inputs that all layers share."""

    modulation: Float32[Array, "B #F #P M C"]
    text: Float[Array, "B L C"] | None  # None if its keys and values are given
    text_mask: Bool[Array, "B L"] | None
    text_modulation: Float32[Array, "B 2 C"] | None
    rotation: Rotation
    key_count: Int[Array, "B"] | None  # the number of valid keys in the window
    sink_frames: int
    capture: bool
    slots: Int[Array, "F"] | None  # slots that a layer writes; None: it returns the block alone


class AdaLNSingle(nnx.Module):
    """Maps timesteps to an embedding and modulation. Reference: `LTX2AdaLayerNormSingle`."""

    def __init__(self, width: int, count: int, *, rngs: nnx.Rngs):
        self.time_in = Linear(256, width, rngs=rngs)
        self.time_out = Linear(width, width, rngs=rngs)
        self.modulation = Linear(width, count * width, rngs=rngs)
        self.count = count

    def __call__(
        self, timesteps: Num[Array, "*rest"]
    ) -> tuple[Float32[Array, "*rest M C"], Float32[Array, "*rest C"]]:
        """Maps timesteps to modulation and embedding.

        The reference rounds these few vectors to the compute dtype. That error would reach every
        token of every block, so they stay in float32 here.
        """
        time = self.time_out(jax.nn.silu(self.time_in(timestep_features(timesteps))))
        modulation = self.modulation(jax.nn.silu(time))
        return rearrange(modulation, "... (M C) -> ... M C", M=self.count), time


class CaptionProjection(nnx.Module):
    """Two linear layers around a tanh-approximated GELU; see `PixArtAlphaTextProjection`."""

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(features, width, rngs=rngs)
        self.linear_2 = Linear(width, width, rngs=rngs)

    def __call__(self, text: Float[Array, "*rest C"]) -> Float[Array, "*rest C_out"]:
        return self.linear_2(jax.nn.gelu(self.linear_1(text), approximate=True))


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
        self.modulation_table = modulation_table(config.num_modulations, width, rngs)
        if config.modulates_text:
            self.text_modulation_table = modulation_table(2, width, rngs)

    def __call__(
        self,
        x: Float[Array, "B F P C"],
        keys: KeyValue | None,
        text_keys: KeyValue | None,
        ctx: _Context,
    ) -> tuple[Float[Array, "B F P C"], KeyValue | None]:
        """Returns the new x, and keys and values as `Refiner.__call__` returns them.

        Args:
          keys: the window of this layer.
          text_keys: (B, L, N, D), those of this layer; computed from the text if None.
        """
        # modulation and norms are float32
        modulation = ctx.modulation + self.modulation_table[...].astype(jnp.float32)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate, *cross = (
            modulation[..., i, :] for i in range(modulation.shape[-2])
        )  # B F|1 P|1 C each
        y, captured = self._self_attention(self.attn_norm(x, scale, shift), keys, ctx)
        x = x + (gate * y).astype(x.dtype)
        if cross:
            cross_shift, cross_scale, cross_gate = cross
            y = self._cross_attention(self.cross_norm(x, cross_scale, cross_shift), text_keys, ctx)
            x = x + (cross_gate * y).astype(x.dtype)
        else:
            x = x + self._cross_attention(self.cross_norm(x), text_keys, ctx)
        y = self.ffn(self.ffn_norm(x, ffn_scale, ffn_shift))
        return x + (ffn_gate * y).astype(x.dtype), captured

    def _self_attention(
        self, x: jax.Array, keys: KeyValue | None, ctx: _Context
    ) -> tuple[jax.Array, KeyValue | None]:
        kind, per_frame = self.config.rope_type, x.shape[2]
        frames = x.shape[1]

        def by_frame(a: jax.Array) -> jax.Array:
            return rearrange(a, "B (F P) N D -> B F P N D", P=per_frame)

        x = rearrange(x, "B F P C -> B (F P) C")
        q, (k, v) = self.attn.query(x), self.attn.key_value(x)  # B T N D
        captured = KeyValue(by_frame(k), by_frame(v)) if ctx.capture else None
        q, k = rotate(q, ctx.rotation, kind), rotate(k, ctx.rotation, kind)
        if keys is not None and ctx.key_count is not None:
            old_k, old_v = (rearrange(a, "B F P N D -> B (F P) N D") for a in (keys.k, keys.v))
            mixed = attention_to_both(q, (k, v), (old_k, old_v), key_count=ctx.key_count)
            if ctx.capture:
                captured = KeyValue(by_frame(k), by_frame(v))
                if ctx.slots is not None:
                    # The block is written after attention has read. Otherwise the compiler would
                    # copy the window.
                    mixed, read = jax.lax.optimization_barrier((mixed, keys))
                    captured = with_block(read, captured, ctx.slots)
        elif 0 < ctx.sink_frames < frames:
            # The sink sees itself, and the rest sees all. Two calls with sliced keys need no mask.
            cut = ctx.sink_frames * per_frame
            sink_mixed = attention(q[:, :cut], k[:, :cut], v[:, :cut])
            mixed = jnp.concatenate([sink_mixed, attention(q[:, cut:], k, v)], 1)
        else:
            mixed = attention(q, k, v)
        y = rearrange(self.attn.project_out(mixed, x), "B (F P) C -> B F P C", P=per_frame)
        return y, captured

    def _cross_attention(
        self, x: jax.Array, text_keys: KeyValue | None, ctx: _Context
    ) -> jax.Array:
        per_frame = x.shape[2]
        x = rearrange(x, "B F P C -> B (F P) C")
        if text_keys is None:
            text_keys = KeyValue(*self.cross_attn.key_value(self._modulated_text(ctx)))
        mixed = attention(
            self.cross_attn.query(x), text_keys.k, text_keys.v, key_mask=ctx.text_mask
        )
        y = self.cross_attn.project_out(mixed, x)
        return rearrange(y, "B (F P) C -> B F P C", P=per_frame)

    def _modulated_text(self, ctx: _Context) -> jax.Array:
        assert ctx.text is not None
        if not hasattr(self, "text_modulation_table"):
            return ctx.text
        table = self.text_modulation_table[...].astype(jnp.float32)[None]  # 1 2 C
        if ctx.text_modulation is not None:
            table = table + ctx.text_modulation
        shift, scale = table[:, :1], table[:, 1:]
        return (ctx.text.astype(jnp.float32) * (1.0 + scale) + shift).astype(ctx.text.dtype)


class Refiner(nnx.Module):
    """The whole stage-2 transformer; `__call__` predicts the velocity, noise - clean."""

    def __init__(self, config: RefinerConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.width
        self.embed = Linear(config.in_channels, width, rngs=rngs)
        if config.use_prompt_embeddings:
            self.caption = CaptionProjection(config.caption_channels, width, rngs=rngs)
        self.time = AdaLNSingle(width, config.num_modulations, rngs=rngs)
        if config.modulates_text and config.use_prompt_adaln_single:
            self.text_time = AdaLNSingle(width, 2, rngs=rngs)
        self.blocks = stack(lambda rngs: Block(config, rngs=rngs), rngs, (config.num_layers,))
        self.final_table = modulation_table(2, width, rngs)
        self.final = Linear(width, config.in_channels, rngs=rngs)

    def timestep_scale(self) -> float:
        """The factor between a noise level and a timestep."""
        return float(self.config.timestep_scale_multiplier)

    def __call__(
        self,
        latents: Float[Array, "B F H W c"],
        timesteps: Num[Array, "B #F #P"],
        text: Float[Array, "B L C"],
        rope: VideoRope,
        *,
        text_mask: Shaped[Array, "B L"] | None = None,
        text_timesteps: Num[Array, "B"] | None = None,
        text_keys: KeyValue | None = None,
        window: KVWindow | None = None,
        sink_frames: int = 0,
        capture: bool = False,
        remat: str = "none",
    ) -> tuple[Float[Array, "B F H W c"], KeyValue | None]:
        """Predicts the velocity of every latent. The function is pure and `jax.grad` works on it.

        Args:
          latents: their dtype is the compute dtype.
          timesteps: one per token, per frame or per clip, equal to the noise level times
            `timestep_scale_multiplier`.
          text: from the connectors, `config.text_width` channels.
          rope: tables for these frames and this grid, from `rope.video_rope`.
          text_mask: non-zero for a token. None hides nothing, which is right for the text
            of the connectors.
          text_timesteps: modulates the text if the configuration says so; by default the
            largest of `timesteps`.
          text_keys: the result of `read_text`; `text` is then not read.
          window: keys and values of other frames, which every frame sees. It has separate or
            stacked layers, like the parameters; see `core.stack.Layers`.
          sink_frames: number of first frames that see only themselves; 0 with a window.
          capture: also return the keys and values of these frames.
          remat: what the backward pass keeps of a block, see `core.stack.scan_runs`.

        Returns:
          The velocity in the compute dtype, and None. With `capture`, the second result is keys
          before rotation and values, (Y, B, F, P, N, D) each; or, with a window, the argument
          `written` of `kv_window.append_block`.

        Raises:
          ValueError: there are both a window and sink frames, or `remat` is unknown.
        """
        config, dtype = self.config, latents.dtype
        if window is not None and sink_frames:
            raise ValueError("a window holds the sink already; sink_frames must be 0")
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
        key_count = slots = None
        if window is not None:
            valid = window.sink_frames + window.history_frames
            key_count = jnp.full((batch,), valid * x.shape[2], jnp.int32)
            slots = window.slots(x.shape[1]) if window.is_separate else None
        ctx = _Context(
            modulation=modulation,
            text=self._caption(text.astype(dtype)) if text_keys is None else None,
            text_mask=None if text_mask is None else text_mask > 0,
            text_modulation=text_modulation,
            rotation=rotations(rope, config.num_attention_heads, config.attention_head_dim),
            key_count=key_count,
            sink_frames=sink_frames,
            capture=capture,
            slots=slots,
        )

        def layer(x: jax.Array, parts: list[Any]) -> tuple[jax.Array, KeyValue | None]:
            block, keys, text_keys = parts
            return block(x, keys, text_keys, ctx)

        if remat != "none":
            layer = jax.checkpoint(layer, prevent_cse=False, policy=REMAT[remat])
        keys = None if window is None else window.keys
        x, captured = over_layers(layer, x, [self.blocks, keys, text_keys])
        table = self.final_table[...].astype(jnp.float32) + time[..., None, :]  # B F|1 P|1 2 C
        y = self.final(modulated_norm(x, table[..., 1, :], table[..., 0, :]))
        return rearrange(y, "B F (H W) c -> B F H W c", H=height), captured

    def _caption(self, text: jax.Array) -> jax.Array:
        return self.caption(text) if hasattr(self, "caption") else text

    def read_text(self, text: Float[Array, "B L C"]) -> KeyValue | None:
        """Computes keys and values (Y, B, L, N, D) of a text, in its dtype.

        The result is None if the timestep modulates the text, because the keys and values then
        differ in every pass.
        """
        if self.config.modulates_text:
            return None

        def layer(text: jax.Array, projections: AttentionProjections) -> tuple[jax.Array, KeyValue]:
            return text, KeyValue(*projections.key_value(text))

        return over_layers(layer, self._caption(text), self.blocks.cross_attn)[1]

    def turn(
        self, k: Float[Array, "*rest F P N D"], rope: VideoRope
    ) -> Float[Array, "*rest F P N D"]:
        """Rotates keys to the frames and the grid of these tables."""
        heads = (self.config.num_attention_heads, self.config.attention_head_dim)
        tokens = rearrange(k, "... F P N D -> ... (F P) N D")
        return rotate(tokens, rotations(rope, *heads), self.config.rope_type).reshape(k.shape)


def without_text_layers(params: Params) -> Params:
    """Removes the parameters that only `read_text` needs, for passes with `text_keys`."""
    cross = dict(params["blocks"]["cross_attn"])
    for name in ("k", "v", "k_norm"):
        cross[name] = dict.fromkeys(cross[name])
    kept = {**params, "blocks": {**params["blocks"], "cross_attn": cross}}
    if "caption" in kept:
        kept["caption"] = {name: dict.fromkeys(part) for name, part in kept["caption"].items()}
    return kept
