"""What a stream of the causal decoder carries from one call to the next.

A causal decoder sees the past only through the last two input frames of each of its convolutions.
It can therefore decode latent by latent, with a state of fixed size. The first latent frame becomes
one frame of video, and each later one `temporal_ratio` frames.

Axis letters: B batch; f h w frames, rows and columns of an activation; C channels.
Reference: the cache of upstream's `AutoencoderKLCausalLTX2Video`, in the order of its modules.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DecoderState = tuple[jax.Array, ...]  # by convolution, in the order in which they run
KERNEL_PAST = 2  # frames before the current one that a convolution over 3 frames sees


class Stream:
    """Gives each causal convolution the frames before its input, and keeps those of the next call.

    An object lives for one call of the decoder. Convolutions ask in the order in which they run.

    Args:
      state: after the call before; None at the start of a stream.
    """

    def __init__(self, state: DecoderState | None):
        self._old = state
        self._new: list[jax.Array] = []

    @property
    def is_start(self) -> bool:
        """Whether this call decodes the first latent frames of a stream."""
        return self._old is None

    @property
    def state(self) -> DecoderState:
        """The state after this call."""
        return tuple(self._new)

    def with_past(self, x: Float[Array, "B f h w C"]) -> Float[Array, "B f_out h w C"]:
        """x behind the frames before it; at the start these are copies of its first frame."""
        if self._old is None:
            before = jnp.repeat(x[:, :1], KERNEL_PAST, axis=1)
        else:
            before = self._old[len(self._new)]
        whole = jnp.concatenate([before, x], 1)
        self._new.append(whole[:, -KERNEL_PAST:])
        return whole
