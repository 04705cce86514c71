"""Finds what a traced function allocates. It reads the program and compiles or runs nothing."""

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
    """Returns the program of a model function that is called as in `streaming.call`.

    Args:
      function: a jitted model function.
      graphdef: see `params.build`.
      params, args: trees of arrays or of `jax.ShapeDtypeStruct`.
      static: arguments that are not traced.
    """
    inner = getattr(function, "__wrapped__", function)
    return jax.make_jaxpr(lambda p, *a: inner(graphdef, p, *a, **static))(params, *args)


def equations(program: Any) -> Iterator[Any]:
    """Yields all equations, also those inside loops and inner functions."""
    jaxpr = getattr(program, "jaxpr", program)
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: isinstance(v, jex.ClosedJaxpr | jex.Jaxpr)
        ):
            if isinstance(value, jex.ClosedJaxpr | jex.Jaxpr):
                yield from equations(value)


def large_arrays(program: Any, limit: int = INDEX_LIMIT) -> dict[tuple[int, ...], set[str]]:
    """Returns the shapes with more than `limit` elements, and the operations that make them."""
    found: dict[tuple[int, ...], set[str]] = {}
    for eqn in equations(program):
        for out in eqn.outvars:
            shape = getattr(out.aval, "shape", ())
            if math.prod(shape) > limit:
                found.setdefault(shape, set()).add(eqn.primitive.name)
    return found


def num_bytes(tree: Any) -> int:
    """Returns the bytes of the arrays in a tree, which may be abstract."""
    return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def least_bytes(program: Any) -> int:
    """Returns a lower bound of a program's temporary memory: its largest product with its operands.

    A compiler may fuse all other operations. But a matrix product or a convolution reads its
    operands from memory, and writes its result there.
    """
    return max(
        (
            sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in (*e.invars, *e.outvars))
            for e in equations(program)
            if e.primitive.name in _PRODUCTS
        ),
        default=0,
    )
