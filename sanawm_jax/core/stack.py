"""Stacks of layers whose kind repeats with a period, run by nested `lax.scan`.

`plan` cuts a list of kinds into segments; a segment repeats a group of runs, and a run is a
number of layers of one kind. The released DiT is one segment: 5 x (3 GDN, then 1 softmax).

Layers of one kind alone may also be separate, see `over_layers`.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Shaped


@dataclasses.dataclass(frozen=True)
class Segment:
    """`repeats` copies of the group `runs`, each run `(kind, number of layers)`."""

    repeats: int
    runs: tuple[tuple[Any, int], ...]

    @property
    def group_size(self) -> int:
        return sum(length for _, length in self.runs)


def plan(kinds: Sequence[Hashable], period: int) -> tuple[Segment, ...]:
    """Cuts `kinds` into groups of `period` layers and joins equal neighbours into segments."""
    groups = []
    for start in range(0, len(kinds), period):
        group = itertools.groupby(kinds[start : start + period])
        groups.append(tuple((kind, len(list(run))) for kind, run in group))
    return tuple(Segment(len(list(same)), runs) for runs, same in itertools.groupby(groups))


def layer_index(
    segments: Sequence[Segment], segment: int, run: int, repeat: int, position: int
) -> int:
    """Number, from 0, of the layer at `position` of a run in a segment's `repeat`."""
    before = sum(s.repeats * s.group_size for s in segments[:segment])
    runs_before = sum(length for _, length in segments[segment].runs[:run])
    return before + repeat * segments[segment].group_size + runs_before + position


# The layers of every model by what stands in the dotted path of a leaf, and their stacked axes:
# (repeats, length) of the DiT's runs, (layers,) of the refiner, the connectors and the text towers.
# Layers of an `nnx.List`, as `blocks.0.`, are separate modules and not stacked.
_STACKED = (
    (re.compile(r"(^|\.)segments\.\d+\.runs\.\d+\."), 2),
    (re.compile(r"(^|\.)(blocks|layers)\.(?!\d)"), 1),
)


def stacked_axes(path: str) -> int:
    """Number of leading axes along which layers are stacked, 0 for a leaf outside of the layers.

    Args:
      path: dotted path of a parameter, of an adapter's factor, or of an optimizer's moment; the
        tree of the model may be nested in another one (`params.blocks.attn.q.kernel`).
    """
    return next((axes for pattern, axes in _STACKED if pattern.search(path)), 0)


SEPARATE_LAYER = "separate_layer"  # a program calls each of separate layers by this name
Layers = jax.Array | tuple[jax.Array, ...]  # a leaf of all layers: stacked, or one array a layer


def over_layers(
    layer: Callable[[jax.Array, Any], tuple[jax.Array, Any]], x: Shaped[Array, "*rest"], layers: Any
) -> tuple[Shaped[Array, "*rest"], Any]:
    """Runs a layer's function over all layers, as `lax.scan` does.

    A scan compiles one layer, and copies the weights of each out of the stack before it runs.
    Separate layers are read where they are and can be updated in place; all of them are compiled.

    Args:
      layer: (x, that layer's leaves) -> (x, its outputs).
      layers: a tree without tuples but for its leaves: `Layers`, all of one form.

    Returns:
      x, and the outputs with leaves of the form of `layers`.
    """

    def is_separate(leaf: Any) -> bool:
        return isinstance(leaf, tuple)

    leaves = jax.tree.leaves(layers, is_leaf=is_separate)
    if not is_separate(leaves[0]):
        return lax.scan(layer, x, layers)

    def named(x: jax.Array, one: Any) -> tuple[jax.Array, Any]:
        return layer(x, one)

    named.__name__ = SEPARATE_LAYER
    traced = jax.jit(named)  # once for all layers; it is inlined when it is compiled
    outputs = []
    for i in range(len(leaves[0])):
        one = jax.tree.map(lambda leaf: leaf[i], layers, is_leaf=is_separate)  # noqa: B023
        x, output = traced(x, one)
        outputs.append(output)
    return x, jax.tree.map(lambda *parts: parts, *outputs)


_KEPT = "kept of a layer"
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "parts": jax.checkpoint_policies.save_only_these_names(_KEPT),
}


def part(
    function: Callable[[jax.Array], Any], remat: str, *, keep: bool = False
) -> Callable[[jax.Array], Any]:
    """A part of a layer, which `remat="parts"` recomputes on its own.

    Args:
      function: x -> x, or a tree of arrays.
      remat: of the layer, see `scan_runs`.
      keep: also keep the result, of a part that is too slow to run a third time.
    """
    if remat != "parts":
        return function
    # not together with the layer's own recomputation, which is in the same body of the loop
    again = jax.checkpoint(function, prevent_cse=True)
    if not keep:
        return again
    return lambda x: jax.tree.map(lambda a: checkpoint_name(a, _KEPT), again(x))


def scan_runs(
    runs: Sequence[Any],
    x: Shaped[Array, "*rest"],
    step: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]],
    carries: Sequence[Any] | None = None,
    *,
    remat: str = "none",
    unroll: bool = False,
) -> tuple[Shaped[Array, "*rest"], tuple[Any, ...]]:
    """Runs one segment: parameters of every run are stacked (repeats, length, ...).

    A carry is what one layer hands on from this call to the next one, for instance from one chunk
    of a stream to the next chunk.

    Args:
      runs: stacked modules, one per run.
      step: (layer, x, the layer's carry) -> (x, the layer's new carry).
      carries: stacked like the modules, one per run; None gives every layer None.
      remat: what the backward pass keeps of a layer: none (everything), full (its input only),
        dots (matrix products too) or parts (its input, and what a `part` keeps). A layer that is
        computed again has all its arrays in memory at once, with parts those of one `part`; the
        others run a third time, to give the last its input. Without a `part` it is full.
      unroll: compile every layer on its own. Slower to compile, and faster to train where layers
        are small: a loop copies what the backward pass needs into and out of stacked arrays.

    Returns:
      x, and the new carries, stacked like the modules, one per run; a tree without arrays where
      the layers return None.
    """
    if remat not in REMAT:
        raise ValueError(f"remat={remat!r}; use one of {', '.join(REMAT)}")
    body = step
    if remat != "none":
        body = jax.checkpoint(step, prevent_cse=False, policy=REMAT[remat])

    def layer(x: jax.Array, pair: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        module, carry = pair
        return body(module, x, carry)

    def group(x: jax.Array, pairs: Sequence[tuple[Any, Any]]) -> tuple[jax.Array, Any]:
        found = []
        for pair in pairs:
            x, carry = lax.scan(layer, x, pair, unroll=unroll)
            found.append(carry)
        return x, tuple(found)

    pairs = tuple(zip(runs, carries or [None] * len(runs), strict=True))
    return lax.scan(group, x, pairs, unroll=unroll)
