"""Where the published implementations of the same DiT compute different numbers.

Three generations of the official code and diffusers disagree in several places, and the weights do
not say which one they were trained with. A preset names one implementation.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from sanawm_jax.runtime.errors import InputError

_PADDED_SIZES = (32, 64, 128, 256)  # heads that flash attention takes without padding


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Where they differ.

    Attributes:
      ucpe_cap: which layers scale a head that its ray transform made longer back to its former
        RMS: `both` kinds, the `softmax` layers alone, or `none`.
      main_scale, camera_scale: what the softmax layers' logits are scaled by in each branch:
        `head` is D^-1/2, `padded` the same of the size to which flash attention pads a head, 128
        for the released 112.
      camera_conv: what the camera branch's short convolution sees of earlier chunks: the last
        frames (`carried`), as the main branch always does, or nothing (`isolated`).
      softmax_sees: in a chunk-causal pass over a whole clip, whether the softmax layers of a chunk
        see the keys up to its end (`chunk`) or those of the whole clip (`clip`).
      ffn_sees: the same of the feed-forward's convolution over frames.
    """

    ucpe_cap: Literal["both", "softmax", "none"] = "both"
    main_scale: Literal["head", "padded"] = "head"
    camera_scale: Literal["head", "padded"] = "padded"
    camera_conv: Literal["carried", "isolated"] = "carried"
    softmax_sees: Literal["chunk", "clip"] = "chunk"
    ffn_sees: Literal["chunk", "clip"] = "chunk"

    def check_stream(self) -> None:
        """Refuses numerics in which a chunk sees later ones.

        Raises:
          InputError: the softmax layers or the feed-forward see the whole clip.
        """
        if "clip" in (self.softmax_sees, self.ffn_sees):
            raise InputError("these numerics see the whole clip, so they cannot run a stream")

    def caps(self, *, softmax: bool) -> bool:
        """Whether layers of a kind bound the length of heads in ray space."""
        return self.ucpe_cap == "both" or (softmax and self.ucpe_cap == "softmax")


PRESETS = {
    # diffusers 0.42.1, `SanaWMTransformer3DModel`
    "diffusers": Numerics(),
    # the official code of the first release, May 2026
    "release": Numerics(ucpe_cap="softmax"),
    # the official code that shipped with the streaming weights, June 2026
    "streaming": Numerics(
        ucpe_cap="none", main_scale="padded", camera_scale="padded", camera_conv="isolated"
    ),
    # the same code's chunk-causal pass over a whole clip, which does not reach its own softmax by
    # chunks, and whose main branch is not padded
    "chunk_causal": Numerics(ucpe_cap="none", softmax_sees="clip"),
    # the official trainer, July 2026
    "trainer": Numerics(ucpe_cap="none", camera_scale="head"),
}


def preset(name: str) -> Numerics:
    """One of `PRESETS`.

    Raises:
      InputError: unknown name.
    """
    if name not in PRESETS:
        raise InputError(f"numerics {name!r} is unknown; use one of {', '.join(PRESETS)}")
    return PRESETS[name]


def softmax_scale(head_dim: int, how: Literal["head", "padded"]) -> float:
    """What logits are multiplied by."""
    if how == "padded" and head_dim < 256 and head_dim not in _PADDED_SIZES:
        head_dim = 128 if head_dim <= 128 else 256
    return head_dim**-0.5
