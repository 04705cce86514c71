"""Divides a traced program into pieces: the layers with weights in host memory, and the rest.

A layer is the body of a `lax.scan` over stacked parameters, or one call of `stack.over_layers` for
separate ones. The operations between two layers become one compiled function. Loops and compiled
functions that contain layers are divided too.

Donated arguments are overwritten, as they are in the undivided program. The memory of an array
belongs to the program if the caller donated it, or if a piece made it. A piece may reuse the memory
of an input if it belongs to the program, if nothing reads the input later, and if a result of the
piece has its shape and dtype. The memory of that result then belongs to the program as well.
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
Function = Callable[..., Any]  # a compiled function of arrays that returns a list of arrays


@dataclasses.dataclass
class Piece:
    """A part of a program.

    Attributes:
      inputs: variables and literals, in the order of the part's arguments.
      outputs: variables.
      dead: variables that no later part reads.
    """

    inputs: Sequence[Any]
    outputs: Sequence[Any]
    dead: list[Any] = dataclasses.field(default_factory=list, init=False)


@dataclasses.dataclass
class Between(Piece):
    """Equations without a layer."""

    function: Function


@dataclasses.dataclass
class Layer(Piece):
    """One layer whose parameters are separate from those of the other layers."""

    function: Function


@dataclasses.dataclass
class Call(Piece):
    """A compiled function that contains layers."""

    plan: Plan


@dataclasses.dataclass
class Loop(Piece):
    """A scan over layers, or another scan whose body contains layers.

    Attributes:
      constants, carried: numbers of inputs of these two kinds, which come first; the others are
        scanned.
      order: the indices of the iterations, in the order in which they run.
      body: the function of a layer, or the plan of one iteration.
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
      pieces: its parts in the order of execution.
      owned: variables whose memory belongs to the program when it ends.
    """

    jaxpr: Any
    consts: Sequence[Any]
    pieces: list[Piece]
    owned: set[Any]


def make_plan(closed: Any, hosted: dict[Any, int], donated: Sequence[Any] = ()) -> Plan:
    """Divides a program at its layers.

    Args:
      closed: the program, a ClosedJaxpr.
      hosted: its inputs that are in host memory, with the number of their stacked axes.
      donated: its inputs that the caller donates; their memory belongs to the program.

    Raises:
      ValueError: an input in host memory is used outside of a layer.
    """
    return _Cutter(closed, hosted, donated, {}).cut()


class _Cutter:
    """Divides one program. The programs inside it share `compiled`, the functions of the layers."""

    def __init__(
        self,
        closed: Any,
        hosted: dict[Any, int],
        donated: Sequence[Any],
        compiled: dict[Any, tuple[Any, Function]],
    ):
        self.closed, self.jaxpr = closed, closed.jaxpr
        self.hosted, self.owned, self.compiled = hosted, set(donated), compiled
        # The position of the last equation that reads a variable. Results are read at the end.
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
        """Makes a piece of an equation that has an input in host memory."""
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
                self.owned.discard(outputs[0])  # never reused, because the runner waits for it
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
        """Returns the body's variables that are in host memory, with their numbers of stacked axes.

        Inside the body, a scanned variable has one stacked axis less.
        """
        inside = {}
        pairs = zip(eqn.invars, eqn.params["jaxpr"].jaxpr.invars, strict=True)
        for i, (atom, variable) in enumerate(pairs):
            if is_variable(atom) and atom in self.hosted:
                inside[variable] = self.hosted[atom] - (i in scanned)
        return inside

    def compile(self, body: Any, donated: Sequence[int] = ()) -> Function:
        """Returns the function of a layer. Layers with the same body share one function."""
        key = id(body), tuple(donated)
        # The entry also holds the body: if it were deleted, another body could get its id.
        if key not in self.compiled:
            function = jax.jit(jex.jaxpr_as_fun(body), donate_argnums=tuple(donated))
            self.compiled[key] = body, function
        return self.compiled[key][1]

    def disown(self, inputs: Sequence[Any], passed_on: Sequence[int | None]) -> None:
        """Protects inputs that are also results, so that no piece overwrites their memory."""
        self.owned -= {inputs[i] for i in passed_on if i is not None and is_variable(inputs[i])}

    def free(self, inputs: Sequence[Any], passed_on: Sequence[int | None], end: int) -> list[int]:
        """Returns the positions of the inputs of a piece whose memory the piece may reuse."""
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
        """Returns the positions of the free inputs whose memory a result takes.

        The memory of such a result then belongs to the program.
        """
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
    """Returns, for every result that is an unchanged input, that input's position, else None.

    A divided program does not copy such an array: the input and the result are one array.
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
    """Returns how many of a scan's inputs are constants, and how many are carried."""
    if "num_consts" in options:
        return options["num_consts"], options["num_carry"]
    # From JAX 0.12 on, a tree of (constants, carry, scanned inputs) holds these numbers.
    constants, carry, _ = options["ft_in"].unpack()
    return len(list(constants)), len(list(carry))
