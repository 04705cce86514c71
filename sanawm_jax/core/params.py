"""Represents a model as a static graph definition and a plain nested dict of arrays.

`nnx` describes the tree of modules. Code that trains, shards, saves, converts or samples uses only
the dict, with plain `jax` transformations. The keys are strings, so every parameter has a dotted
path such as `segments.0.runs.1.attn.qkv.kernel`.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float32, Key

Params = dict[str, Any]  # nested; leaves are arrays or jax.ShapeDtypeStruct
Initializer = Callable[[jax.Array, Sequence[int], DTypeLike], jax.Array]

# Whether a model is built only for its shapes. Random numbers are the largest part of the trace of
# a constructor, and they are not needed for shapes.
_for_shapes = contextvars.ContextVar("for_shapes", default=False)


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(k): _string_keys(v) for k, v in tree.items()}
    return tree


def _graph_keys(tree: Any) -> Any:
    # nnx.List numbers its children with ints
    if isinstance(tree, dict):
        return {int(k) if k.isdigit() else k: _graph_keys(v) for k, v in tree.items()}
    return tree


@functools.lru_cache(maxsize=64)
def build(module: type[nnx.Module], config: Any) -> tuple[nnx.GraphDef, Params]:
    """Returns `(graphdef, abstract parameters)` of `module(config)` without allocating anything.

    Args:
      module: a class built as `module(config, rngs=nnx.Rngs(...))`.
      config: its frozen, hashable configuration.
    """
    return build_with(module, config, lambda model: None)


def build_with(
    module: type[nnx.Module], config: Any, change: Callable[[nnx.Module], None]
) -> tuple[nnx.GraphDef, Params]:
    """Works as `build`, for a model that `change` modifies. `change` sees shapes but no values."""

    def make() -> nnx.Module:
        model = module(config, rngs=nnx.Rngs(0))  # pyright: ignore
        change(model)
        return model

    token = _for_shapes.set(True)
    try:
        graphdef, state = nnx.split(nnx.eval_shape(make))
    finally:
        _for_shapes.reset(token)
    return graphdef, _string_keys(nnx.to_pure_dict(state))


def init(
    module: type[nnx.Module], config: Any, key: Key[Array, ""], *, shardings: Any = None
) -> Params:
    """Random float32 parameters of `module(config)`, made by one compiled function.

    Args:
      module, config: see `build`.
      key: the random key. The values do not depend on the shardings.
      shardings: the sharding of each parameter; by default all are on one device.
    """

    def make(key: jax.Array) -> Params:
        _, state = nnx.split(module(config, rngs=nnx.Rngs(key)))  # pyright: ignore
        return _string_keys(nnx.to_pure_dict(state))

    return jax.jit(make, out_shardings=shardings)(key)


def apply(
    graphdef: nnx.GraphDef, params: Params, *args: Any, method: str = "__call__", **kwargs: Any
) -> Any:
    """Calls `method` of the module that `graphdef` and `params` describe."""
    module = nnx.merge(graphdef, _graph_keys(params))
    return getattr(module, method)(*args, **kwargs)


def draw(init: Initializer, rngs: nnx.Rngs, shape: Sequence[int]) -> Float32[Array, "..."]:
    """A parameter's first value, float32; all that is random in a constructor comes from here.

    Args:
      init: (key, shape, dtype) -> the value.
      rngs: the source of the key.
      shape: the shape of the value.
    """
    if _for_shapes.get():
        return jnp.zeros(shape, jnp.float32)
    return init(rngs.params(), shape, jnp.float32)


def stack(make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs, shape: tuple[int, ...]) -> Any:
    """Builds `prod(shape)` copies of a module as one module with stacked parameters.

    Args:
      make: random keys -> module.
      rngs: the source of one key, which is split over the copies.
      shape: the leading axes of every parameter, outermost first.
    """
    if _for_shapes.get():
        module = make(rngs)
        for _, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Variable):
                node.set_value(lax.broadcast(node[...], shape))
        return module

    def one(key: jax.Array) -> nnx.Module:
        return make(nnx.Rngs(key))

    for _ in shape:
        one = jax.vmap(one)
    return one(jax.random.split(rngs.params(), shape))


def leaves(tree: Params, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields `(dotted path, array)` of every parameter, in the order of the tree."""
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            yield from leaves(value, path)
        else:
            yield path, value


def from_leaves(flat: dict[str, Any]) -> Params:
    """Makes a tree of a dict by path. It is the inverse of `dict(leaves(tree))`."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def cast(params: Params, dtype: Any) -> Params:
    """Casts the floating-point arrays to `dtype`."""

    def one(a: Any) -> Any:
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(one, params)


def count(params: Params) -> int:
    """Returns the number of parameters of a tree, which may be abstract."""
    return sum(int(a.size) for a in jax.tree.leaves(params))
