"""Everything through which one latent frame sees another: chunks, shifts and the recurrence.

The other parts of a network treat each frame alone. These know the chunk layout and, on a mesh
whose `context` axis shares the frames out, communicate explicitly (`jax.shard_map`): a shift
passes a halo to the neighbours, and the recurrence composes the maps of whole ranks. Attention is
in `core.frame_attention`. Frame numbers, chunk starts among them, are those of the whole clip.

A stream runs one chunk per call instead. Each function then takes what the earlier chunks left
behind (the last frames, a recurrent state, keys and values), and the whole-clip call without it is
the same function. A call with a carry has one chunk and one rank.
Axis letters: B batch, F latent frames, P tokens per frame, N heads, D head size, V value size, C
channels, X frames that a convolution needs from the chunk before.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas import gdn
from sanawm_jax.core import teacher_forcing
from sanawm_jax.core.sharding import CONTEXT, axis_size
from sanawm_jax.runtime.errors import InputError

CHUNK_STRATEGIES = ("first_chunk_plus_one", "uniform", "first_frame")


def chunk_starts(frames: int, size: int, strategy: str = "first_chunk_plus_one") -> tuple[int, ...]:
    """First frame of every chunk of a clip; a last chunk that is short joins the one before it.

    Args:
      frames: F of the whole clip.
      size: frames a chunk.
      strategy: first_chunk_plus_one (the first chunk has size + 1 frames: the given image and a
        chunk), first_frame (the first chunk is one frame) or uniform.

    Raises:
      InputError: unknown strategy, or a size below 1.
    """
    if strategy not in CHUNK_STRATEGIES:
        raise InputError(
            f"chunk_split_strategy={strategy!r}; use one of {', '.join(CHUNK_STRATEGIES)}"
        )
    if size < 1:
        raise InputError(f"chunk_size={size} must be at least 1")
    if size >= frames:
        return (0,)
    second = {"first_chunk_plus_one": size + 1, "uniform": size, "first_frame": 1}[strategy]
    starts = [0, *range(second, frames, size)]
    # the lone first frame is a chunk of its own and absorbs nothing
    least = 2 if strategy == "first_frame" else 1
    if len(starts) > least and frames - starts[-1] < size:
        starts.pop()
    return tuple(starts)


@dataclasses.dataclass(frozen=True)
class FrameLayout:
    """Which frames see which, and on how many ranks they lie.

    A chunk sees itself and everything before it; one chunk is the bidirectional model.

    Attributes:
      frames: F of the clip.
      starts: first frame of every chunk, ascending from 0.
      shards: ranks that share the frames out; the axis is padded to a multiple.
      cached: earlier chunks whose keys a chunk's softmax attention sees, as in a stream with such
        a cache; None is all of them. The recurrence sees the whole past in any case.
      sink: whether the first chunk is one of `cached`, and the others are the last ones.
      forced: the frames are a clip twice, see `core.teacher_forcing`; chunks have one frame.

    Raises:
      InputError: starts that do not ascend from 0 below `frames`; a limited cache, or teacher
        forcing, on a mesh that shares the frames out; teacher forcing in longer chunks.
    """

    frames: int
    starts: tuple[int, ...] = (0,)
    shards: int = 1
    cached: int | None = None
    sink: bool = True
    forced: bool = False

    def __post_init__(self) -> None:
        single = self.starts == tuple(range(self.frames))
        if self.forced and (self.frames % 2 or not single or self.shards > 1):
            raise InputError(
                f"teacher forcing of {self.frames} frames with chunk_starts={self.starts} on "
                f"{self.shards} context ranks: use chunks of one frame, and no context ranks"
            )
        if self.cached is not None and (self.cached < 1 or self.shards > 1):
            raise InputError(
                f"cached={self.cached} chunks on {self.shards} context ranks: use at least one "
                "chunk, and no context ranks"
            )
        ascending = all(a < b for a, b in zip(self.starts, self.starts[1:], strict=False))
        if not self.starts or self.starts[0] or not ascending or self.starts[-1] >= self.frames:
            raise InputError(
                f"chunk_starts={self.starts} must ascend from 0 and stay below {self.frames} frames"
            )

    @property
    def padded(self) -> int:
        return -(-self.frames // self.shards) * self.shards

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First frame and end of every chunk."""
        return list(zip(self.starts, (*self.starts[1:], self.frames), strict=True))

    def key_frames(self, chunk: int) -> list[tuple[int, int]]:
        """First frame and end of the runs of frames whose keys a chunk's softmax sees."""
        chunks = self.chunks
        end = chunks[chunk][1]
        if self.cached is None or chunk <= self.cached:
            return [(0, end)]
        if not self.sink:
            return [(chunks[chunk - self.cached][0], end)]
        return [chunks[0], (chunks[chunk - self.cached + 1][0], end)]

    def borders(self) -> tuple[Int[np.ndarray, "F"], Int[np.ndarray, "F"]]:
        """First frame and end of the chunk of every frame, padded frames included."""
        starts = np.full((self.padded,), self.starts[-1], np.int32)
        ends = np.full((self.padded,), self.frames, np.int32)
        for start, end in self.chunks:
            starts[start:end], ends[start:end] = start, end
        return starts, ends

    def ends(self) -> Int[np.ndarray, "F"]:
        """The frame at which each frame's chunk ends; no frame sees that one or a later one."""
        return self.borders()[1]

    def of_clip(self) -> FrameLayout:
        """The same frames as one chunk."""
        return dataclasses.replace(self, starts=(0,))

    def history(self) -> list[list[int]]:
        """For each frame of a clip in chunks of one frame, the earlier ones that softmax sees."""
        clip = self.frames // 2 if self.forced else self.frames
        single = dataclasses.replace(self, frames=clip, starts=tuple(range(clip)), forced=False)
        runs = [single.key_frames(i) for i in range(clip)]
        return [
            [f for start, end in found for f in range(start, end) if f < i]
            for i, found in enumerate(runs)
        ]

    def local(self, table: Shaped[np.ndarray, "F"]) -> Shaped[Array, "F_local"]:
        """This rank's part of a table over the padded frames; ranks call it inside `shard_map`."""
        if self.shards == 1:
            return jnp.asarray(table)
        size = self.padded // self.shards
        start = lax.axis_index(CONTEXT) * size
        return lax.dynamic_slice_in_dim(jnp.asarray(table), start, size)

    def is_plain(self) -> bool:
        """One chunk without padding: the ends of the array are the only borders."""
        return len(self.starts) == 1 and self.padded == self.frames


def layout_of(
    frames: int,
    starts: tuple[int, ...] | None,
    cached: int | None = None,
    sink: bool = True,
    forced: bool = False,
) -> FrameLayout:
    """The layout of a clip on the mesh that is set; no starts is one chunk."""
    return FrameLayout(frames, starts or (0,), axis_size(CONTEXT), cached, sink, forced)


def check_carry(layout: FrameLayout) -> None:
    """Refuses a carry where frames are in several chunks, padded or shared out.

    Raises:
      InputError: the call has more than one chunk, or a mesh shares its frames out.
    """
    if not layout.is_plain() or layout.shards > 1:
        raise InputError(
            "a stream runs one chunk per call, on a mesh without context ranks; "
            f"this call has {len(layout.starts)} chunks on {layout.shards} ranks"
        )


def last_frames(
    x: Float[Array, "B F P C"], count: int, before: Float[Array, "B X P C"] | None = None
) -> Float[Array, "B X P C"]:
    """The last `count` frames of a stream, which the next chunk's convolution sees.

    Args:
      x: this chunk.
      before: `count` frames, what this function returned for the chunk before; None is the
        start of the stream, before which there are zeros.
    """
    if before is None:
        before = jnp.zeros_like(x, shape=(x.shape[0], count, *x.shape[2:]))
    return jnp.concatenate([before, x], 1)[:, x.shape[1] :]


def neighbours(
    x: Float[Array, "B F P C"],
    reach: int,
    layout: FrameLayout,
    *,
    before: Float[Array, "B X P C"] | None = None,
    isolated: bool = False,
) -> list[Float[Array, "B F P C"]]:
    """What a convolution over frames sees: x at frame f - reach, ..., f, ..., f + reach.

    There are zeros before the clip, and from the end of f's chunk on: a frame sees the past of
    other chunks but only the future of its own. On a mesh, `sharding.per_rank` calls it.

    Args:
      x: tokens of this rank's frames.
      reach: frames to each side.
      before: the `reach` frames before x in a stream, see `last_frames`.
      isolated: there are zeros before f's chunk too.
    """
    if before is not None:
        check_carry(layout)
    if layout.forced:
        return teacher_forcing.neighbours(x, reach)
    frames, frame = x.shape[1], np.arange(layout.padded)
    starts, ends = layout.borders()
    padded = _with_halos(x, reach, layout.shards, before)

    def seen(offset: int) -> jax.Array:
        shifted = padded[:, reach + offset : reach + offset + frames]
        if layout.is_plain() or (offset <= 0 and not isolated):
            return shifted
        visible = frame + offset < ends if offset > 0 else frame + offset >= starts
        return jnp.where(layout.local(visible)[:, None, None], shifted, 0)

    return [seen(offset) for offset in range(-reach, reach + 1)]


def _with_halos(x: jax.Array, reach: int, ranks: int, before: jax.Array | None) -> jax.Array:
    """This rank's frames x with the `reach` frames before and after them; zero outside."""
    if ranks == 1:
        past = reach if before is None else 0
        padded = jnp.pad(x, ((0, 0), (past, reach), (0, 0), (0, 0)))
        return padded if before is None else jnp.concatenate([before, padded], 1)

    def from_rank(distance: int, part: jax.Array) -> jax.Array:
        pairs = [(r, r - distance) for r in range(ranks) if 0 <= r - distance < ranks]
        return lax.ppermute(part, CONTEXT, pairs)

    parts, frames = [x], x.shape[1]
    for hop in range(1, -(-reach // frames) + 1):  # a long convolution reaches over several ranks
        count = min(frames, reach - (hop - 1) * frames)
        parts.insert(0, from_rank(-hop, x[:, frames - count :]))
        parts.append(from_rank(hop, x[:, :count]))
    return jnp.concatenate(parts, 1)


def recurrent_states(
    k: Float[Array, "B F P N D"],
    v: Float[Array, "B F P N V"] | None,
    beta: Float[Array, "B F P N"],
    decay: Float[Array, "B F N"],
    layout: FrameLayout,
    initial: Float[Array, "B N _ D"] | None = None,
) -> tuple[Float[Array, "B F N _ D"], Float[Array, "B N _ D"]]:
    """The recurrence's states, of tokens as `gdn.frame_transitions` takes them.

    The forward run crosses chunks, the backward run is isolated in each. Without v they are the
    normaliser's, V = 1. On a mesh, `sharding.per_rank` calls it for each rank's frames.

    Args:
      initial: float32, the forward run's state after the chunks before; None is zero.

    Returns:
      float32 states that every frame reads, and the last state of the forward run over the clip.
    """
    if initial is not None:
        check_carry(layout)
    if layout.forced:
        states = teacher_forcing.recurrent_states(k, v, beta, decay)
        return states, states[:, k.shape[1] // 2 - 1]
    options: dict[str, Any] = {"axis_name": None if layout.shards == 1 else CONTEXT}
    if len(layout.starts) > 1:
        last = np.arange(layout.padded) + 1 == layout.ends()
        options["chunk_ends"] = layout.local(last)
    if v is not None:
        return gdn.bidirectional_token_states(k, v, beta, decay, initial, **options)
    maps = gdn.normaliser_transitions(k, beta, decay)
    return gdn.bidirectional_states(maps, initial, **options)
