"""Feed-forward of a DiT block: a gated depthwise convolution over space, then one over frames.

Axis letters: B batch, F latent frames, P = H W tokens per frame, C width, X frames that the
convolution over frames needs from the chunk before.
Reference: diffusers `GLUMBConvTemp`, `SanaWMMlp`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from kernels_pallas.conv_glu import conv_glu, depthwise_conv
from sanawm_jax.core.frames import FrameLayout, last_frames, neighbours
from sanawm_jax.core.layers import Conv, Linear, activation, zeros_init
from sanawm_jax.core.sharding import per_rank
from sanawm_jax.dit.config import DiTConfig


class GatedConvFeedForward(nnx.Module):
    """1x1 up, SiLU, depthwise 3x3, gate, 1x1 down, plus a residual convolution over frames."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.ffn_width
        self.acts = config.mlp_acts
        self.up = Linear(width, 2 * inner, rngs=rngs)
        self.depthwise = Conv(2 * inner, 2 * inner, (3, 3), groups=2 * inner, rngs=rngs)
        self.down = Linear(inner, width, use_bias=False, rngs=rngs)
        # zero, so that the residual starts as the identity
        self.temporal = Conv(
            width,
            width,
            (config.t_kernel_size,),
            use_bias=False,
            kernel_init=zeros_init,
            rngs=rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B F P C"],
        grid: tuple[int, int],
        layout: FrameLayout,
        before: Float[Array, "B X P C"] | None = None,
    ) -> tuple[Float[Array, "B F P C"], Float[Array, "B X P C"]]:
        """Returns the new tokens, and what the next chunk needs.

        Args:
          grid: rows and columns H, W of the tokens.
          before: of a stream, the frames that the convolution over frames saw last.
        """
        # the bias is the convolution's to add: apart, it is a pass over the widest array there is
        y = rearrange(self.up.product(x), "B F (H W) C -> B F H W C", H=grid[0])
        y = rearrange(self._gated_conv(y), "B F H W C -> B F (H W) C")
        y = activation(self.acts[2])(self.down(y))
        kernel = self.temporal.kernel[...]
        after = last_frames(y, len(kernel) // 2, before)
        return y + _over_frames(y, kernel, layout, before), after

    @jax.named_scope("ffn_conv")
    def _gated_conv(self, x: jax.Array) -> jax.Array:
        """x (B, F, H, W, 2C) before its bias and activation -> (B, F, H, W, C)."""
        assert self.up.bias is not None and self.depthwise.bias is not None
        up_bias = self.up.bias[...]
        kernel, bias = self.depthwise.kernel[...], self.depthwise.bias[...]
        if self.acts[:2] == ("silu", "silu"):
            names = ("B F H W C", "C", "H W _ C", "C")
            run = per_rank(conv_glu, names, "B F H W C", whole_width=True)
            return run(x, up_bias, kernel, bias)
        up_act, gate_act = (activation(name) for name in self.acts[:2])
        x = up_act(x + up_bias.astype(x.dtype))
        value, gate = jnp.split(depthwise_conv(x, kernel, bias), 2, -1)
        return value * gate_act(gate)


@jax.named_scope("temporal_conv")
def _over_frames(
    x: jax.Array, kernel: jax.Array, layout: FrameLayout, before: jax.Array | None
) -> jax.Array:
    """Convolution over axis 1 as one matrix product: x (B, F, P, C), kernel (2X + 1, C, C)."""

    def seen(x: jax.Array, before: jax.Array | None) -> jax.Array:
        return jnp.concatenate(neighbours(x, len(kernel) // 2, layout, before=before), -1)

    # one product per tap would write as many float32 arrays, to be read and added
    joined = per_rank(seen, ("B F P C", "B X P C"), "B F P C")(x, before)
    return joined @ kernel.astype(x.dtype).reshape(-1, kernel.shape[-1])


class Mlp(nnx.Module):
    """Two linear layers with a tanh GELU; the text embedder and the `mlp` feed-forward."""

    def __init__(self, in_features: int, hidden: int, out_features: int, *, rngs: nnx.Rngs):
        self.fc1 = Linear(in_features, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, out_features, rngs=rngs)

    def __call__(self, x: Float[Array, "*rest C"]) -> Float[Array, "*rest C_out"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))
