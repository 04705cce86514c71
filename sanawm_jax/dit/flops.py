"""Floating-point operations of the DiT, counted from its sizes: what MFU divides by the time.

Matrix products and convolutions count, a multiplication and an addition each; norms, activations,
rotations and softmax do not, and neither does what rematerialisation computes again.
Axis letters: F latent frames, P tokens a frame, C width, N heads, D head size, L text tokens.
"""

from __future__ import annotations

import math

from sanawm_jax.core.frames import chunk_starts as starts_of_chunks
from sanawm_jax.dit.config import DiTConfig


def forward_flops(
    config: DiTConfig,
    frames: int,
    height: int,
    width: int,
    text: int,
    *,
    chunk_size: int = 0,
    split: str = "first_chunk_plus_one",
    camera: bool = True,
) -> float:
    """Of one clip's forward pass.

    Args:
      frames, height, width: of the latents.
      text: L.
      chunk_size, split: of the chunk-causal model, see `core.frames.chunk_starts`; 0 is the
        bidirectional one.
      camera: whether the camera branch and the Plücker rays take part.
    """
    patch = math.prod(config.patch_size)
    tokens = frames * height * width // patch
    c, last = config.hidden_size, 0
    keys = 0  # pairs of a query and a key that it sees, in frames
    starts = starts_of_chunks(frames, chunk_size, split) if chunk_size else (0,)
    for end in (*starts[1:], frames):
        keys += (end - last) * end
        last = end
    pairs = keys * (tokens // frames) ** 2
    total = 2 * tokens * c * patch * 2 * config.in_channels  # patches in, and out
    if camera and config.use_chunk_plucker_post_attn:
        total += 2 * tokens * c * patch * config.chunk_plucker_channels
    total += 2 * frames * (256 * c + 7 * c * c) + 2 * text * c * (config.caption_channels + c)
    for kind in config.kinds():
        total += _block(config, frames, tokens, text, pairs if kind.softmax else None, camera)
        total += 2 * tokens * c * c * (camera and kind.plucker)
    return float(total)


def training_flops(forward: float, *, frozen: bool = False) -> float:
    """Of a training step on what `forward` counts.

    Args:
      frozen: adapters alone are trained, so that no weight's own gradient is a product.
    """
    return forward * (2.0 if frozen else 3.0)


def _block(
    config: DiTConfig, frames: int, tokens: int, text: int, pairs: int | None, camera: bool
) -> int:
    c, inner, heads = config.hidden_size, config.ffn_width, config.num_heads
    d = c // heads
    total = 2 * tokens * c * c * (9 if camera else 5)  # qkv, gate, out; and the camera's four
    branches = 2 if camera else 1
    if pairs is not None:
        total += branches * 4 * pairs * c
    else:
        total += 2 * (tokens + frames) * c * heads  # beta, decay
        # a frame's map and addend, two directions of the recurrence, reading the state
        total += branches * (6 * tokens * c * d + 4 * frames * c * d * d)
        total += 2 * tokens * c * d  # the normaliser's maps, of vectors otherwise
    total += 2 * c * c * 2 * (tokens + text) + 4 * tokens * text * c  # cross-attention
    if config.ffn_type == "mlp":
        return total + 4 * tokens * c * inner
    total += 2 * tokens * inner * (3 * c + 2 * 9)
    return total + 2 * tokens * config.t_kernel_size * c * c
