"""Runs a network whose layers wait in host memory; those that the device has room for stay on it.

A model here is a function whose layers are stacked and run by `lax.scan`, or separate and run by
`stack.over_layers`. `Streamer` traces that function as it is, and runs its program piece by piece
(`program_pieces`): what lies between layers is compiled as usual, and a layer in host memory is
brought to the device while the layers before it run. So there is one definition of every model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sanawm_jax.core.params import Params
from sanawm_jax.core.stack import stacked_axes
from sanawm_jax.memory import program_pieces as pieces

PINNED = "pinned_host"


def call(
    function: Callable[..., Any], graphdef: Any, params: Params, *args: Any, **static: Any
) -> Any:
    """Runs a compiled model function as it is; `Streamer` has the same signature.

    Args:
      function: jitted, `function(graphdef, params, *args, **static)`.
      args: arrays and trees of them.
      static: all that is not traced.
    """
    return function(graphdef, params, *args, **static)


Runner = Callable[..., Any]  # `call`, or a `Streamer`


def keep_layers(path: str, array: np.ndarray) -> Any:
    """Places a leaf: stacked layers stay in host memory, all else goes to the device.

    Args:
      path: dotted path of the leaf.
      array: the leaf.
    """
    depth = stacked_axes(path)
    return HostStack(array, depth) if depth else jax.device_put(array)


def separate_layers(path: str, array: np.ndarray) -> Any:
    """Places a leaf on the device, layers with one stacked axis separate; see `stack.over_layers`.

    Args:
      path, array: see `keep_layers`.
    """
    if stacked_axes(path) != 1:
        return jax.device_put(array)
    return tuple(jax.device_put(layer) for layer in array)


def keep_separate_layers(path: str, array: np.ndarray) -> Any:
    """`keep_layers`, but layers with one stacked axis are separate; see `stack.over_layers`.

    Args:
      path, array: see `keep_layers`.
    """
    if stacked_axes(path) != 1:
        return keep_layers(path, array)
    return tuple(HostStack(layer, 0) for layer in array)


class HostStack:
    """A leaf in host memory, of stacked layers or of one, cut into the arrays that the device gets.

    The arrays are in page-locked memory where the backend has it, so that copying them to the
    device runs beside computation; else they are numpy's.

    Args:
      array: the leaf.
      depth: number of its leading stacked axes, 0 for the leaf of one layer.
    """

    def __init__(self, array: np.ndarray, depth: int):
        self.shape, self.dtype, self.depth = array.shape, array.dtype, depth
        index = itertools.product(*(range(n) for n in self.shape[:depth]))
        self._parts = {i: _pinned(array[i]) for i in index}

    def part(self, index: tuple[int, ...]) -> Any:
        """The host's array of one layer."""
        return self._parts[index]


def _pinned(array: np.ndarray) -> Any:
    device = jax.devices()[0]
    if PINNED not in {memory.kind for memory in device.addressable_memories()}:
        return array
    return jax.device_put(array, jax.sharding.SingleDeviceSharding(device, memory_kind=PINNED))


def upload(parts: list[Any]) -> list[jax.Array]:
    """Starts the copies of a layer's leaves to the device."""
    return jax.device_put(parts, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A part of a stack, after some of its stacked axes."""

    stack: HostStack
    index: tuple[int, ...] = ()

    def at(self, i: int) -> _Slice:
        return _Slice(self.stack, (*self.index, i))


_Layer = tuple[_Slice, ...]  # all that one layer has in host memory


def memory_stats() -> dict[str, int]:
    """What the backend reports of the device's memory, in bytes; empty if it reports nothing."""
    return jax.devices()[0].memory_stats() or {}


def _spread(layers: Sequence[_Layer], room: int) -> list[_Layer]:
    """As many of these layers as `room` bytes hold, spread evenly over their order."""
    count = len(layers)
    sizes = [sum(s.stack.part(s.index).nbytes for s in layer) for layer in layers]
    for streamed in range(count):
        # every (count / streamed)-th layer is not among them
        stay = [i for i in range(count) if (i + 1) * streamed // count == i * streamed // count]
        if sum(sizes[i] for i in stay) <= room:
            return [layers[i] for i in stay]
    return []


@dataclasses.dataclass
class _Memory:
    """Bytes of the device, when a function was called with two layers on it.

    Attributes:
      sizes: of each argument that is on the device.
      before: in use when the call began, without layers.
      peak: in use at most, in the process so far; None: not known yet.
    """

    sizes: tuple[int, ...]
    before: int = 0
    peak: int | None = None

    def peak_of(self, other: _Memory) -> int | None:
        """What another call can need at most, by this one; None if its arguments are larger."""
        is_larger = any(a > b for a, b in zip(other.sizes, self.sizes, strict=True))
        if self.peak is None or is_larger:
            return None
        return self.peak + max(0, other.before - self.before)


@dataclasses.dataclass
class _Program:
    """A function, cut for arguments of some shapes.

    Attributes:
      plan: its pieces.
      out_tree: of its results.
      identity: all that its results depend on, but for the shapes of what is on the device.
      memory: that it takes.
      layers: in the order in which they first ran.
    """

    plan: pieces.Plan
    out_tree: Any
    identity: Any
    memory: _Memory
    layers: tuple[_Layer, ...] = ()


_measured: dict[Any, list[_Memory]] = {}  # in this process, by a program's identity


class Streamer:
    """Runs one network, whose layers are on the device as far as its memory goes.

    The first call of a program (a function, for arguments of some shapes) has two layers on the
    device: one that runs, and one that is brought or waits. It shows how much memory the rest
    needs. From the second call on, layers stay that fit beside that; they are spread evenly over
    the order of execution, so that the copy of each of the others hides behind several layers.

    A backend reports one peak for the whole process, which never falls. So it is read only after
    first calls, for which everything that stayed was dropped. A later program whose own peak is
    below what an earlier one reached, with its layers, is taken to need that much: it has less room
    than there is, perhaps none, but never more. A program that was measured in this process, or one
    of the same function for arguments that were no smaller, is not measured again, and nothing is
    dropped for it: it needs what that needed, and what has come to be on the device since.

    Args:
      stays: False for a network that runs too few times for layers to stay.
    """

    def __init__(self, *, stays: bool = True) -> None:
        self._stays = stays
        self._programs: dict[Any, _Program] = {}
        self._unmeasured: _Program | None = None  # had its first call, and nothing stayed since
        self._stay: set[_Layer] = set()  # what is to stay in this call
        self._resident: dict[_Layer, list[jax.Array]] = {}
        self._order: dict[_Layer, None] = {}  # of this call
        # what the last two streamed layers give, and their weights
        self._running: deque[tuple[list[Any], Any]] = deque()
        self._following: dict[_Layer, _Layer] = {}  # the order of streamed layers, as it was
        self._ready: dict[_Layer, list[jax.Array]] = {}  # the next one, there or on its way

    def __call__(
        self,
        function: Callable[..., Any],
        graphdef: Any,
        params: Params,
        *args: Any,
        **static: Any,
    ) -> Any:
        """See `call`; the leaves of `params` that stay in host memory are `HostStack`s.

        Raises:
          ValueError: the function uses such a leaf outside of a layer.
        """
        values, tree = jax.tree.flatten((params, args))
        avals = [jax.ShapeDtypeStruct(np.shape(v), _dtype(v)) for v in values]
        hosted = [v.depth if isinstance(v, HostStack) else None for v in values]
        types = [(a.shape, a.dtype) for a in avals]
        waiting = tuple((h, t) for h, t in zip(hosted, types, strict=True) if h is not None)
        identity = function, graphdef, tuple(sorted(static.items())), tree, waiting
        key = identity, tuple(hosted), tuple(types)
        if key not in self._programs:
            abstract, rest = jax.tree.unflatten(tree, avals)
            traced: Any = function.trace(graphdef, abstract, *rest, **static)  # pyright: ignore
            closed, donations = traced.jaxpr, jax.tree.leaves(traced.args_info)
            inputs = closed.jaxpr.invars
            depths = {v: h for v, h in zip(inputs, hosted, strict=True) if h is not None}
            donated = [v for v, d in zip(inputs, donations, strict=True) if d.donated]
            plan = pieces.make_plan(closed, depths, donated)
            there = zip(avals, hosted, strict=True)
            sizes = tuple(a.size * a.dtype.itemsize for a, h in there if h is None)
            out_tree = jax.tree.structure(traced.out_info)
            self._programs[key] = _Program(plan, out_tree, identity, _Memory(sizes))
        program = self._programs[key]
        given = [_Slice(v) if isinstance(v, HostStack) else v for v in values]
        is_measured = self._make_room(program)
        streamed = [layer for layer in program.layers if layer not in self._stay]
        # the first comes after the last: in the next pass, or call
        after = [*streamed[1:], *streamed[:1]]
        self._following = dict(zip(streamed, after, strict=True)) if len(streamed) > 1 else {}
        self._order = {}
        out = self._run(program.plan, given)
        program.layers = tuple(self._order)
        if is_measured:
            jax.block_until_ready(out)  # all that it needed was allocated
            self._unmeasured = program
        return jax.tree.unflatten(program.out_tree, out)

    def _make_room(self, program: _Program) -> bool:
        """Decides what stays in a call, and drops what does not.

        Returns:
          Whether the call is to show what the program needs.
        """
        stats, memory = memory_stats() if self._stays else {}, program.memory
        if not stats:
            return False
        # read now, and not when that call ended: the caller's own work since then counts too
        if self._unmeasured is not None:
            self._unmeasured.memory.peak = stats["peak_bytes_in_use"]
            _measured.setdefault(self._unmeasured.identity, []).append(self._unmeasured.memory)
            self._unmeasured = None
        if memory.peak is None:
            layers = [*self._resident.values(), *self._ready.values()]
            layers += [weights for _, weights in self._running]
            memory.before = stats["bytes_in_use"] - sum(a.nbytes for w in layers for a in w)
            known = [m.peak_of(memory) for m in _measured.get(program.identity, ())]
            memory.peak = min((peak for peak in known if peak is not None), default=None)
            same = (p for p in self._programs.values() if p.identity == program.identity)
            program.layers = next((p.layers for p in same if p.layers), ())
        self._stay = set()
        if memory.peak is not None:
            # the allocator cannot use all: a part is lost to fragmentation
            room = stats["bytes_limit"] - memory.peak - stats["bytes_limit"] // 32
            self._stay = set(_spread(program.layers, room))
        for layer in self._resident.keys() - self._stay:
            del self._resident[layer]
        return memory.peak is None

    def _run(self, plan: pieces.Plan, values: Sequence[Any]) -> list[Any]:
        env = dict(zip(plan.jaxpr.constvars, plan.consts, strict=True))
        env.update(zip(plan.jaxpr.invars, values, strict=True))

        def read(atoms: Iterable[Any]) -> list[Any]:
            return [env[a] if pieces.is_variable(a) else a.val for a in atoms]

        for piece in plan.pieces:
            given = read(piece.inputs)
            if isinstance(piece, pieces.Between):
                out = piece.function(*given)
            elif isinstance(piece, pieces.Layer):
                out = self._layer(piece.function, given)
            elif isinstance(piece, pieces.Call):
                out = self._run(piece.plan, given)
            else:
                assert isinstance(piece, pieces.Loop)
                out = self._loop(piece, given)
            env.update(zip(piece.outputs, out, strict=True))
            for variable in piece.dead:
                env.pop(variable, None)
        return read(plan.jaxpr.outvars)

    def _loop(self, loop: pieces.Loop, given: list[Any]) -> list[Any]:
        first, count = loop.constants, loop.carried
        consts, carry, xs = given[:first], given[first : first + count], given[first + count :]
        collected: list[Any] = [None] * len(loop.order)
        for i in loop.order:
            values = [*consts, *carry, *(x.at(i) if isinstance(x, _Slice) else x[i] for x in xs)]
            if isinstance(loop.body, pieces.Plan):
                out = self._run(loop.body, values)
            else:
                out = self._layer(loop.body, values)
            carry, collected[i] = out[:count], out[count:]
        return [*carry, *(jnp.stack(y) for y in zip(*collected, strict=True))]

    def _layer(self, function: pieces.Function, values: list[Any]) -> list[Any]:
        """Runs one layer; the copy of the next streamed one's weights runs beside it.

        A backend lets a copy wait for all computation that was started before it. So the copy comes
        first, then the layer, then those up to the next streamed one, which the copy runs beside.
        """
        layer = tuple(v for v in values if isinstance(v, _Slice))
        self._order.setdefault(layer)
        weights = self._resident.get(layer)
        is_streamed = weights is None and layer not in self._stay
        if is_streamed:
            weights = self._ready.pop(layer, None)
            self._ready.clear()  # another layer than was expected
            if weights is None:
                self._wait(1)
                weights = self._bring(layer)
            following = self._following.get(layer)
            if following is not None:
                self._wait(0)
                self._ready[following] = self._bring(following)
        elif weights is None:
            weights = self._resident[layer] = self._bring(layer)
        ready = iter(weights or ())
        out = function(*(next(ready) if isinstance(v, _Slice) else v for v in values))
        if is_streamed:
            self._running.append((out, weights))
        return out

    def _wait(self, count: int) -> None:
        """Frees the weights of all streamed layers but the last `count`, when they have run."""
        while len(self._running) > count:
            out, _ = self._running.popleft()
            # what was given away since then cannot be waited for
            jax.block_until_ready([a for a in out if not a.is_deleted()])

    def _bring(self, layer: _Layer) -> list[jax.Array]:
        return upload([s.stack.part(s.index) for s in layer])


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
