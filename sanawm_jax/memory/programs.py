"""What a traced function allocates, from its program alone: nothing is compiled or run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as jex

INDEX_LIMIT = 2**31 - 1  # elements that a 32-bit index reaches
_PRODUCTS = ("dot_general", "conv_general_dilated")


def trace(
    function: Callable[..., Any], graphdef: Any, params: Any, *args: Any, **static: Any
) -> Any:
    """The program of a model function, called as `streaming.call` does.

    Args:
      params, args: trees of arrays or `jax.ShapeDtypeStruct`s.
      static: what is not traced.
    """
    inner = getattr(function, "__wrapped__", function)
    return jax.make_jaxpr(lambda p, *a: inner(graphdef, p, *a, **static))(params, *args)


def equations(program: Any) -> Iterator[Any]:
    """All equations, those of loops and inner functions included."""
    jaxpr = getattr(program, "jaxpr", program)
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: isinstance(v, jex.ClosedJaxpr | jex.Jaxpr)
        ):
            if isinstance(value, jex.ClosedJaxpr | jex.Jaxpr):
                yield from equations(value)


def large_arrays(program: Any, limit: int = INDEX_LIMIT) -> dict[tuple[int, ...], set[str]]:
    """Shapes of more than `limit` elements, with the operations that make them."""
    found: dict[tuple[int, ...], set[str]] = {}
    for eqn in equations(program):
        for out in eqn.outvars:
            shape = getattr(out.aval, "shape", ())
            if math.prod(shape) > limit:
                found.setdefault(shape, set()).add(eqn.primitive.name)
    return found


def num_bytes(tree: Any) -> int:
    """Bytes of a tree's arrays; works on abstract trees too."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def least_bytes(program: Any) -> int:
    """A lower bound of a program's temporary memory: its largest product with its operands.

    A compiler may fuse all else, but writes the result of a matrix product or a convolution, and
    reads its operands, from memory.
    """
    return max(
        (
            sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in (*e.invars, *e.outvars))
            for e in equations(program)
            if e.primitive.name in _PRODUCTS
        ),
        default=0,
    )
