"""Cuts a traced program into pieces: layers whose weights are in host memory, and what is between.

A layer is the body of a `lax.scan` over stacked leaves, or one call of `stack.over_layers` for
separate ones. What lies between layers is compiled together. Loops and compiled functions with
layers inside are cut too.

What the caller gives away is written in place, as it would be without the cuts: a piece is given
the memory of its inputs where that is the program's own, nothing reads it later, and a result can
take its place. Such a result is then the program's own as well.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex

from sanawm_jax.core.stack import SEPARATE_LAYER

_FUNCTIONS = ("jit", "pjit")
Function = Callable[..., Any]  # compiled; takes and gives lists of arrays


@dataclasses.dataclass
class Piece:
    """A part of a program.

    Attributes:
      inputs: variables and literals, in the order in which the part takes them.
      outputs: variables.
      dead: variables that nothing reads after this part.
    """

    inputs: Sequence[Any]
    outputs: Sequence[Any]
    dead: list[Any] = dataclasses.field(default_factory=list, init=False)


@dataclasses.dataclass
class Between(Piece):
    """Equations that need no layer."""

    function: Function


@dataclasses.dataclass
class Layer(Piece):
    """One of separate layers."""

    function: Function


@dataclasses.dataclass
class Call(Piece):
    """A compiled function with layers inside."""

    plan: Plan


@dataclasses.dataclass
class Loop(Piece):
    """A scan over layers, or over something else with layers inside.

    Attributes:
      constants, carried: how many of the inputs are that; the others are scanned.
      order: of its turns.
      body: a layer's function, or what a turn runs.
    """

    constants: int
    carried: int
    order: Sequence[int]
    body: Function | Plan


@dataclasses.dataclass
class Plan:
    """A whole program in pieces.

    Attributes:
      jaxpr, consts: the program.
      owned: variables whose memory is the program's own at its end.
    """

    jaxpr: Any
    consts: Sequence[Any]
    pieces: list[Piece]
    owned: set[Any]


def make_plan(closed: Any, hosted: dict[Any, int], donated: Sequence[Any] = ()) -> Plan:
    """Cuts a program at its layers.

    Args:
      closed: the program, a ClosedJaxpr.
      hosted: its inputs that are in host memory, with the number of their stacked axes.
      donated: its inputs whose memory is the program's from now on.

    Raises:
      ValueError: what is in host memory is used outside of a layer.
    """
    return _Cutter(closed, hosted, donated, {}).cut()


class _Cutter:
    """Cuts one program; `compiled` are its layers' functions, shared with programs inside of it."""

    def __init__(
        self,
        closed: Any,
        hosted: dict[Any, int],
        donated: Sequence[Any],
        compiled: dict[Any, tuple[Any, Function]],
    ):
        self.closed, self.jaxpr = closed, closed.jaxpr
        self.hosted, self.owned, self.compiled = hosted, set(donated), compiled
        # position of the equation that reads a variable last; results are read at the end
        self.last_read: dict[Any, int] = {}
        for i, eqn in enumerate(self.jaxpr.eqns):
            self.last_read.update((a, i) for a in eqn.invars if is_variable(a))
        end = len(self.jaxpr.eqns)
        self.last_read.update((a, end) for a in self.jaxpr.outvars if is_variable(a))

    def cut(self) -> Plan:
        pieces: list[Piece] = []
        pending: list[Any] = []

        def add(make: Callable[[Any, int], Piece], what: Any, end: int) -> None:
            piece = make(what, end)
            here = dict.fromkeys(a for a in (*piece.inputs, *piece.outputs) if is_variable(a))
            piece.dead = [v for v in here if not self.is_read(v, end)]
            pieces.append(piece)

        for i, eqn in enumerate(self.jaxpr.eqns):
            if not any(is_variable(a) and a in self.hosted for a in eqn.invars):
                pending.append(eqn)
                continue
            if pending:
                add(self.between, pending, i)
                pending = []
            add(self.piece, eqn, i + 1)
        if pending:
            add(self.between, pending, len(self.jaxpr.eqns))
        if any(is_variable(a) and a in self.hosted for a in self.jaxpr.outvars):
            raise ValueError("layers in host memory are results, outside of a layer")
        return Plan(self.jaxpr, self.closed.consts, pieces, self.owned)

    def is_read(self, variable: Any, end: int) -> bool:
        """Whether a variable is read by the equation at position `end`, or later."""
        return self.last_read.get(variable, -1) >= end

    def between(self, eqns: list[Any], end: int) -> Between:
        made = {v for eqn in eqns for v in eqn.outvars}
        used = dict.fromkeys(a for eqn in eqns for a in eqn.invars if is_variable(a))
        inputs = [v for v in used if v not in made]
        outputs = [v for eqn in eqns for v in eqn.outvars if self.is_read(v, end)]
        info = jex.DebugInfo("jit", "between layers", None, None)
        part = jex.Jaxpr((), inputs, outputs, eqns, debug_info=info)
        given = self.give_away(inputs, outputs, _passed_on(part), end)
        function = jex.jaxpr_as_fun(jex.ClosedJaxpr(part, ()))
        return Between(inputs, outputs, jax.jit(function, donate_argnums=given))

    def piece(self, eqn: Any, end: int) -> Piece:
        """The equation, an input of which is in host memory, as a piece."""
        name, inputs, outputs = eqn.primitive.name, eqn.invars, eqn.outvars
        if name == "scan":
            return self.loop(eqn)
        if name not in _FUNCTIONS:
            raise ValueError(f"layers in host memory are used by {name}, outside of a layer")
        body = eqn.params["jaxpr"]
        hosted = self.hosted_inside(eqn)
        passed_on = _passed_on(body.jaxpr)
        if eqn.params["name"] == SEPARATE_LAYER and not any(hosted.values()):
            given = self.give_away(inputs, outputs, passed_on, end)
            if outputs and self.owned.issuperset(outputs):
                self.owned.discard(outputs[0])  # is never given away: a runner waits for it
            return Layer(inputs, outputs, self.compile(body, given))
        own = [body.jaxpr.invars[i] for i in self.free(inputs, passed_on, end)]
        plan = _Cutter(body, hosted, own, self.compiled).cut()
        results = [r if is_variable(r) else None for r in body.jaxpr.outvars]
        self.owned.update(
            v
            for v, result in zip(outputs, results, strict=True)
            if result in plan.owned and results.count(result) == 1
        )
        return Call(inputs, outputs, plan)

    def loop(self, eqn: Any) -> Loop:
        options = eqn.params
        constants, carried = _scan_sizes(options)
        body = options["jaxpr"]
        scanned = range(constants + carried, len(eqn.invars))
        hosted = self.hosted_inside(eqn, scanned)
        is_layer = not any(hosted.values()) and all(
            i in scanned for i, v in enumerate(body.jaxpr.invars) if v in hosted
        )
        self.disown(eqn.invars, _passed_on(body.jaxpr))
        order = range(options["length"])[:: -1 if options["reverse"] else 1]
        inside = self.compile(body) if is_layer else _Cutter(body, hosted, (), self.compiled).cut()
        return Loop(eqn.invars, eqn.outvars, constants, carried, order, inside)

    def hosted_inside(self, eqn: Any, scanned: Sequence[int] = ()) -> dict[Any, int]:
        """The body's variables in host memory; what is scanned has one stacked axis less there."""
        inside = {}
        pairs = zip(eqn.invars, eqn.params["jaxpr"].jaxpr.invars, strict=True)
        for i, (atom, variable) in enumerate(pairs):
            if is_variable(atom) and atom in self.hosted:
                inside[variable] = self.hosted[atom] - (i in scanned)
        return inside

    def compile(self, body: Any, donated: Sequence[int] = ()) -> Function:
        """The function of a layer; layers with the same body share it."""
        key = id(body), tuple(donated)
        if key not in self.compiled:  # with the body, whose id is another's when it is gone
            function = jax.jit(jex.jaxpr_as_fun(body), donate_argnums=tuple(donated))
            self.compiled[key] = body, function
        return self.compiled[key][1]

    def disown(self, inputs: Sequence[Any], passed_on: Sequence[int | None]) -> None:
        """An input that is a result too has two names from now on, and is never given away."""
        self.owned -= {inputs[i] for i in passed_on if i is not None and is_variable(inputs[i])}

    def free(self, inputs: Sequence[Any], passed_on: Sequence[int | None], end: int) -> list[int]:
        """Positions of the inputs of a piece whose memory it may have."""
        self.disown(inputs, passed_on)
        counts = Counter(id(a) for a in inputs)
        return [
            i
            for i, a in enumerate(inputs)
            if is_variable(a)
            and a in self.owned
            and counts[id(a)] == 1
            and not self.is_read(a, end)
        ]

    def give_away(
        self,
        inputs: Sequence[Any],
        outputs: Sequence[Any],
        passed_on: Sequence[int | None],
        end: int,
    ) -> list[int]:
        """Of the free inputs those whose place a result takes, which becomes the program's own."""
        new = [v for v, source in zip(outputs, passed_on, strict=True) if source is None]
        room = Counter(_kind(v) for v in new)
        given = []
        for i in self.free(inputs, passed_on, end):
            if room[_kind(inputs[i])]:
                room[_kind(inputs[i])] -= 1
                given.append(i)
        taken = {_kind(inputs[i]) for i in given}
        self.owned.update(v for v in new if _kind(v) in taken)
        return given


def is_variable(atom: Any) -> bool:
    return not isinstance(atom, jex.Literal)


def _kind(variable: Any) -> tuple[Any, Any]:
    return variable.aval.shape, variable.aval.dtype


def _passed_on(jaxpr: Any) -> list[int | None]:
    """For every result the position of the input that it merely is, or None.

    A program in pieces does not copy it: input and result are one array.
    """
    source = {v: i for i, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in _FUNCTIONS:
            continue
        for out, i in zip(eqn.outvars, _passed_on(eqn.params["jaxpr"].jaxpr), strict=True):
            atom = None if i is None else eqn.invars[i]
            if atom is not None and is_variable(atom) and atom in source:
                source[out] = source[atom]
    return [source.get(a) if is_variable(a) else None for a in jaxpr.outvars]


def _scan_sizes(options: dict[str, Any]) -> tuple[int, int]:
    """How many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in options:
        return options["num_consts"], options["num_carry"]
    # from JAX 0.12 on a tree of (constants, carry, what is scanned) says so
    constants, carry, _ = options["ft_in"].unpack()
    return len(list(constants)), len(list(carry))
