"""Runs a network whose stacked layers stay in host memory, one layer on the device at a time.

A model here is a function whose layers are stacked and run by `lax.scan`. `Streamer` traces that
function as it is, and runs its program piece by piece: what lies between the scans is compiled as
usual, and a scan over layers that are in host memory becomes a loop that brings one layer, runs the
scan's own body, and brings the next layer meanwhile. So there is one definition of every model.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from sanawm_jax.core.params import Params

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
# leading stacked axes of the models' leaves, by what their paths begin with
_STACKED = {"segments.": 2, "blocks.": 1, "layers.": 1}


def stacked_axes(path: str) -> int:
    """Leading stacked axes of a leaf of any of the models, 0 outside of their layers."""
    return next((d for start, d in _STACKED.items() if path.startswith(start)), 0)


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


class HostStack:
    """A stacked leaf in host memory, cut into the arrays that the device gets.

    The arrays are in page-locked memory where the backend has it, so that copying them to the
    device runs beside computation; else they are numpy's.

    Args:
      array: the stacked leaf.
      depth: number of its leading stacked axes.
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


def upload(part: Any) -> jax.Array:
    """Starts the copy of a layer's leaf to the device."""
    return jax.device_put(part, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


@dataclasses.dataclass(frozen=True)
class _Slice:
    """A part of a stack, after some of its stacked axes."""

    stack: HostStack
    index: tuple[int, ...] = ()

    def at(self, i: int) -> _Slice:
        return _Slice(self.stack, (*self.index, i))


@dataclasses.dataclass
class _Group:
    """Equations that need no layer, compiled together."""

    inputs: list[Any]
    outputs: list[Any]
    function: Callable[..., Any]


@dataclasses.dataclass
class _Call:
    """A compiled function inside the program, run piece by piece too."""

    eqn: Any
    plan: _Plan


@dataclasses.dataclass
class _Scan:
    """A loop over layers, or over something else with such a loop inside."""

    eqn: Any
    plan: _Plan | None  # None: the body is one layer
    function: Callable[..., Any]


@dataclasses.dataclass
class _Plan:
    jaxpr: Any
    consts: Sequence[Any]
    steps: list[_Group | _Call | _Scan]


def _is_variable(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


def _evaluate(
    eqns: list[Any], inputs: list[Any], outputs: list[Any], donated: Sequence[int]
) -> Callable[..., Any]:
    """The equations as a compiled function of their inputs."""
    info = jex.DebugInfo("jit", "between scans", None, None)
    part = jex.Jaxpr((), inputs, outputs, eqns, debug_info=info)
    return jax.jit(jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ())), donate_argnums=donated)


def _group(eqns: list[Any], later: set[Any], donated: frozenset[Any]) -> _Group:
    made = {v for eqn in eqns for v in eqn.outvars}
    used = dict.fromkeys(a for eqn in eqns for a in eqn.invars if _is_variable(a))
    inputs = [v for v in used if v not in made]
    outputs = [v for eqn in eqns for v in eqn.outvars if v in later]
    # of what the caller gives away: what nothing reads later, and a result can take the place of
    room = Counter(str(v.aval) for v in outputs)
    given_up = []
    for i, v in enumerate(inputs):
        if v in donated and v not in later and room[str(v.aval)]:
            room[str(v.aval)] -= 1
            given_up.append(i)
    return _Group(inputs, outputs, _evaluate(eqns, inputs, outputs, given_up))


def _make_plan(closed: Any, hosted: set[Any], donated: frozenset[Any] = frozenset()) -> _Plan:
    """Cuts a program at the scans over `hosted`, variables that are in host memory.

    Args:
      donated: variables whose memory is the program's from now on.
    """
    jaxpr = closed.jaxpr
    steps: list[Any] = []
    pending: list[Any] = []
    for i, eqn in enumerate([*jaxpr.eqns, None]):
        is_hosted = eqn is not None and any(_is_variable(a) and a in hosted for a in eqn.invars)
        if eqn is not None and not is_hosted:
            pending.append(eqn)
            continue
        if pending:
            later = {a for e in jaxpr.eqns[i:] for a in e.invars if _is_variable(a)}
            later |= {a for a in jaxpr.outvars if _is_variable(a)}
            steps.append(_group(pending, later, donated))
            pending = []
        if eqn is not None:
            steps.append(_make_step(eqn, hosted))
    return _Plan(jaxpr, closed.consts, steps)


def _make_step(eqn: Any, hosted: set[Any]) -> _Call | _Scan:
    name = eqn.primitive.name
    if name not in ("scan", "jit", "pjit"):
        raise ValueError(f"layers in host memory are used by {name}, outside of a scan")
    body = eqn.params["jaxpr"]
    pairs = zip(eqn.invars, body.jaxpr.invars, strict=True)
    inner = {v for a, v in pairs if _is_variable(a) and a in hosted}
    if name != "scan":
        return _Call(eqn, _make_plan(body, inner))
    has_loop = any(
        e.primitive.name in ("scan", "jit", "pjit")
        and any(_is_variable(a) and a in inner for a in e.invars)
        for e in body.jaxpr.eqns
    )
    return _Scan(
        eqn, _make_plan(body, inner) if has_loop else None, jax.jit(jex.jaxpr_as_fun(body))
    )


class Streamer:
    """Runs one network; at most two of its layers are on the device.

    The order of the layers is the same in every run, so from the second run on the next layer is
    known across the ends of loops too.
    """

    def __init__(self) -> None:
        self._plans: dict[Any, tuple[_Plan, Any]] = {}
        self._next: dict[Any, list[_Slice]] = {}
        self._ready: dict[Any, list[jax.Array]] = {}
        self._last: Any = None
        self._running: Any = None  # what the last layer gives, and its weights

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
          ValueError: the function uses such a leaf outside of a scan over its stacked axes.
        """
        values, tree = jax.tree.flatten((params, args))
        avals = [jax.ShapeDtypeStruct(np.shape(v), _dtype(v)) for v in values]
        hosted = tuple(isinstance(v, HostStack) for v in values)
        key = (function, graphdef, tuple(sorted(static.items())), tree, hosted)
        key = (*key, tuple((a.shape, a.dtype) for a in avals))
        if key not in self._plans:
            abstract, rest = jax.tree.unflatten(tree, avals)
            traced: Any = function.trace(graphdef, abstract, *rest, **static)  # pyright: ignore
            closed, donations = traced.jaxpr, jax.tree.leaves(traced.args_info)
            inputs = closed.jaxpr.invars
            variables = {v for v, h in zip(inputs, hosted, strict=True) if h}
            donated = frozenset(v for v, d in zip(inputs, donations, strict=True) if d.donated)
            plan = _make_plan(closed, variables, donated)
            self._plans[key] = plan, jax.tree.structure(traced.out_info)
        plan, out_tree = self._plans[key]
        given = [_Slice(v) if isinstance(v, HostStack) else v for v in values]
        return jax.tree.unflatten(out_tree, self._run(plan, given))

    def _run(self, plan: _Plan, values: Sequence[Any]) -> list[Any]:
        env = dict(zip(plan.jaxpr.constvars, plan.consts, strict=True))
        env.update(zip(plan.jaxpr.invars, values, strict=True))

        def read(atoms: Iterable[Any]) -> list[Any]:
            return [env[a] if _is_variable(a) else a.val for a in atoms]

        for step in plan.steps:
            if isinstance(step, _Group):
                env.update(zip(step.outputs, step.function(*read(step.inputs)), strict=True))
                continue
            given = read(step.eqn.invars)
            if isinstance(step, _Call):
                out = self._run(step.plan, given)
            else:
                out = self._scan(step, given)
            env.update(zip(step.eqn.outvars, out, strict=True))
        return read(plan.jaxpr.outvars)

    def _scan(self, step: _Scan, given: list[Any]) -> list[Any]:
        options = step.eqn.params
        (first, count), length = _scan_sizes(options), options["length"]
        consts, carry, xs = given[:first], given[first : first + count], given[first + count :]
        order = range(length)[:: -1 if options["reverse"] else 1]
        collected: list[Any] = [None] * length
        for i, neighbour in zip(order, [*order[1:], None], strict=True):
            values = [*consts, *carry, *(x.at(i) if isinstance(x, _Slice) else x[i] for x in xs)]
            if step.plan is not None:
                out = self._run(step.plan, values)
            else:
                out = self._layer(step.function, values, neighbour)
            carry, collected[i] = out[:count], out[count:]
        return [*carry, *(jnp.stack(y) for y in zip(*collected, strict=True))]

    def _layer(
        self, function: Callable[..., Any], values: list[Any], neighbour: int | None
    ) -> list[Any]:
        slices = [v for v in values if isinstance(v, _Slice)]
        key = _key(slices)
        if self._last is not None:
            self._next[self._last] = slices
        self._last = key
        if self._running is not None:
            # the layer before is done, and its weights free, before another one is brought
            jax.block_until_ready(self._running[0])
            self._running = None
        weights = self._ready.pop(key, None) or self._bring(slices)
        ready = iter(weights)
        out = function(*(next(ready) if isinstance(v, _Slice) else v for v in values))
        self._running = out, weights
        following = self._next.get(key)
        if following is None and neighbour is not None:
            following = [_Slice(s.stack, (*s.index[:-1], neighbour)) for s in slices]
        self._ready.clear()
        if following is not None:
            self._ready[_key(following)] = self._bring(following)
        return out

    def _bring(self, slices: list[_Slice]) -> list[jax.Array]:
        return [upload(s.stack.part(s.index)) for s in slices]


def _scan_sizes(options: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in options:
        return options["num_consts"], options["num_carry"]
    # from JAX 0.12 on a tree of (constants, carry, what is scanned) says so
    constants, carry, _ = options["ft_in"].unpack()
    return len(list(constants)), len(list(carry))


def _key(slices: list[_Slice]) -> tuple[Any, ...]:
    return tuple((id(s.stack), s.index) for s in slices)


def _dtype(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else jnp.result_type(value)
