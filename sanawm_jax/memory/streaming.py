"""Runs a network whose layers are in host memory. As many layers as fit stay on the device.

A model is a function whose layers are stacked and run by `lax.scan`, or separate and run by
`stack.over_layers`. `Streamer` traces this function without changes, and runs its program piece by
piece (`program_pieces`). The operations between layers are compiled as usual. A layer in host
memory is copied to the device while earlier layers run. Every model therefore has only one
definition.
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
    """Calls a jitted model function directly. A `Streamer` has the same signature.

    Args:
      function: a jitted `function(graphdef, params, *args, **static)`.
      graphdef, params: the model.
      args: arrays and trees of arrays.
      static: the arguments that are not traced.
    """
    return function(graphdef, params, *args, **static)


Runner = Callable[..., Any]  # `call`, or a `Streamer`


def keep_layers(path: str, array: np.ndarray) -> Any:
    """Places one parameter: stacked layers stay in host memory, others go to the device.

    Args:
      path: its dotted path.
      array: its values.
    """
    depth = stacked_axes(path)
    return HostStack(array, depth) if depth else jax.device_put(array)


def separate_layers(path: str, array: np.ndarray) -> Any:
    """Places a parameter on the device; one stacked axis becomes a tuple; see `stack.over_layers`.

    Args:
      path, array: see `keep_layers`.
    """
    if stacked_axes(path) != 1:
        return jax.device_put(array)
    return tuple(jax.device_put(layer) for layer in array)


def keep_separate_layers(path: str, array: np.ndarray) -> Any:
    """Works as `keep_layers`, but one stacked axis becomes a tuple; see `stack.over_layers`.

    Args:
      path, array: see `keep_layers`.
    """
    if stacked_axes(path) != 1:
        return keep_layers(path, array)
    return tuple(HostStack(layer, 0) for layer in array)


class HostStack:
    """A parameter in host memory, divided into one array per layer.

    If the backend has page-locked memory, the arrays are there, so that the device can compute
    while they are copied to it. Otherwise they are numpy arrays.

    Args:
      array: the parameter, of one layer or of stacked layers.
      depth: number of its leading stacked axes, 0 for a parameter of one layer.
    """

    def __init__(self, array: np.ndarray, depth: int):
        self.shape, self.dtype, self.depth = array.shape, array.dtype, depth
        index = itertools.product(*(range(n) for n in self.shape[:depth]))
        self._parts = {i: _pinned(array[i]) for i in index}

    def part(self, index: tuple[int, ...]) -> Any:
        """Returns the host's array of one layer."""
        return self._parts[index]


def _pinned(array: np.ndarray) -> Any:
    device = jax.devices()[0]
    if PINNED not in {memory.kind for memory in device.addressable_memories()}:
        return array
    return jax.device_put(array, jax.sharding.SingleDeviceSharding(device, memory_kind=PINNED))


def upload(parts: list[Any]) -> list[jax.Array]:
    """Starts to copy the parameters of a layer to the device."""
    return jax.device_put(parts, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A part of a stack, selected by indices of its first stacked axes."""

    stack: HostStack
    index: tuple[int, ...] = ()

    def at(self, i: int) -> _Slice:
        return _Slice(self.stack, (*self.index, i))


_Layer = tuple[_Slice, ...]  # all parameters of one layer that are in host memory


def memory_stats() -> dict[str, int]:
    """Returns the backend's report on the device's memory, in bytes; empty if there is none."""
    return jax.devices()[0].memory_stats() or {}


def _spread(layers: Sequence[_Layer], room: int) -> list[_Layer]:
    """Selects as many of these layers as fit into `room` bytes, spread evenly over their order."""
    count = len(layers)
    sizes = [sum(s.stack.part(s.index).nbytes for s in layer) for layer in layers]
    for streamed in range(count):
        # Every (count / streamed)-th layer is left out.
        stay = [i for i in range(count) if (i + 1) * streamed // count == i * streamed // count]
        if sum(sizes[i] for i in stay) <= room:
            return [layers[i] for i in stay]
    return []


@dataclasses.dataclass
class _Memory:
    """The device memory of a call with two layers on the device, in bytes.

    Attributes:
      sizes: bytes of each argument that is on the device.
      before: bytes in use when the call began, without layers.
      peak: most bytes that the process has used so far; None if this is not known yet.
    """

    sizes: tuple[int, ...]
    before: int = 0
    peak: int | None = None

    def peak_of(self, other: _Memory) -> int | None:
        """Returns an upper bound for another call; None if one of its arguments is larger."""
        is_larger = any(a > b for a, b in zip(other.sizes, self.sizes, strict=True))
        if self.peak is None or is_larger:
            return None
        return self.peak + max(0, other.before - self.before)


@dataclasses.dataclass
class _Program:
    """A function, traced and divided for certain shapes of its arguments.

    Attributes:
      plan: its pieces.
      out_tree: tree structure of its results.
      identity: everything that selects this program, except the shapes of arguments on the device.
      memory: the memory that it takes.
      layers: its layers, in the order in which they first ran.
    """

    plan: pieces.Plan
    out_tree: Any
    identity: Any
    memory: _Memory
    layers: tuple[_Layer, ...] = ()


_measured: dict[Any, list[_Memory]] = {}  # measurements in this process, by a program's identity


class Streamer:
    """Runs one network, and keeps as many of its layers on the device as the memory allows.

    A program is a function together with the shapes of its arguments. The first call of a program
    has two layers on the device: one that runs, and one that is being copied or waits for its
    execution. This call measures how much memory everything else needs. From the second call on,
    the layers that fit into the remaining memory stay on the device. They are spread evenly over
    the order of execution, so that several layers run while one of the other layers is copied.

    A backend reports one peak of memory for the whole process, and this number never decreases. It
    is therefore read only after first calls, and before such a call all layers that stayed are
    released. If a later program has a smaller peak than an earlier one, the earlier peak is used
    for it. The estimate of the remaining memory is then too small, but never too large. A program
    is not measured, and nothing is released for it, if this process has already measured it, or has
    measured the same function for arguments that were at least as large. Its need is then the
    measured one, plus the growth of the memory in use since that measurement.

    Args:
      stays: False for a network that runs too few times for layers to stay on the device.
    """

    def __init__(self, *, stays: bool = True) -> None:
        self._stays = stays
        self._programs: dict[Any, _Program] = {}
        self._unmeasured: _Program | None = None  # had its first call, but the peak is not yet read
        self._stay: set[_Layer] = set()  # the layers that stay on the device in this call
        self._resident: dict[_Layer, list[jax.Array]] = {}
        self._order: dict[_Layer, None] = {}  # the layers of this call, in the order of execution
        # The results and the weights of the last streamed layers.
        self._running: deque[tuple[list[Any], Any]] = deque()
        self._following: dict[_Layer, _Layer] = {}  # the next streamed layer, by the last call
        self._ready: dict[_Layer, list[jax.Array]] = {}  # the next one, copied or being copied

    def __call__(
        self,
        function: Callable[..., Any],
        graphdef: Any,
        params: Params,
        *args: Any,
        **static: Any,
    ) -> Any:
        """Calls the function as `call` does. Parameters in host memory are `HostStack`s.

        Raises:
          ValueError: the function uses such a parameter outside of a layer.
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
        # After the last layer comes the first one, in the next pass or the next call.
        after = [*streamed[1:], *streamed[:1]]
        self._following = dict(zip(streamed, after, strict=True)) if len(streamed) > 1 else {}
        self._order = {}
        out = self._run(program.plan, given)
        program.layers = tuple(self._order)
        if is_measured:
            jax.block_until_ready(out)  # after this, the peak of the call has been reached
            self._unmeasured = program
        return jax.tree.unflatten(program.out_tree, out)

    def _make_room(self, program: _Program) -> bool:
        """Decides which layers stay on the device in a call, and releases the others.

        Returns:
          Whether the call measures the need of the program.
        """
        stats, memory = memory_stats() if self._stays else {}, program.memory
        if not stats:
            return False
        # The peak is read now and not at the end of that call, so that it also includes what the
        # caller did in between.
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
            # The allocator loses a part of the memory to fragmentation.
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
        """Runs one layer while the weights of the next streamed layer are copied.

        In a backend, a copy waits for all computation that was started before it. So the copy is
        started first, and then this layer and the layers before the next streamed one. They run
        during the copy.
        """
        layer = tuple(v for v in values if isinstance(v, _Slice))
        self._order.setdefault(layer)
        weights = self._resident.get(layer)
        is_streamed = weights is None and layer not in self._stay
        if is_streamed:
            weights = self._ready.pop(layer, None)
            self._ready.clear()  # the prepared layer, if there is one, is not the one that runs
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
        """Waits for all streamed layers but the last `count`, and releases their weights."""
        while len(self._running) > count:
            out, _ = self._running.popleft()
            # A result whose memory a later layer has reused is deleted; one cannot wait for it.
            jax.block_until_ready([a for a in out if not a.is_deleted()])

    def _bring(self, layer: _Layer) -> list[jax.Array]:
        return upload([s.stack.part(s.index) for s in layer])


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
