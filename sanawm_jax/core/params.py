"""Models as a static graph definition plus a plain nested dict of arrays.

`nnx` describes a module tree once; everything that trains, shards, saves, converts or samples
sees only the dict, under plain `jax` transforms. Keys are strings, so a leaf has one dotted path
such as `segments.0.runs.1.attn.qkv.kernel`.
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

# Whether a model is built for its shapes alone. Random numbers are most of what there is to trace
# in a constructor, and then nobody looks at them.
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
    """`build` of a model to which `change` adds parameters; it sees shapes, no numbers."""

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
      key: decides the values, whatever the shardings.
      shardings: where each leaf is made; by default all on one device.
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
      rngs: gives the key.
      shape: of the value.
    """
    if _for_shapes.get():
        return jnp.zeros(shape, jnp.float32)
    return init(rngs.params(), shape, jnp.float32)


def stack(make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs, shape: tuple[int, ...]) -> Any:
    """Builds `prod(shape)` copies of a module as one, its parameters stacked on leading axes.

    Args:
      make: random keys -> module.
      rngs: one of its keys is split over the copies.
      shape: leading axes of every parameter, outermost first.
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
    """Yields `(dotted path, leaf)` in the tree's order."""
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict):
            yield from leaves(value, path)
        else:
            yield path, value


def from_leaves(flat: dict[str, Any]) -> Params:
    """Inverse of `dict(leaves(tree))`."""
    tree: Params = {}
    for path, value in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree


def cast(params: Params, dtype: Any) -> Params:
    """Casts the floating leaves to `dtype`."""

    def one(a: Any) -> Any:
        return a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a

    return jax.tree.map(one, params)


def count(params: Params) -> int:
    """Number of parameters; works on abstract trees too."""
    return sum(int(a.size) for a in jax.tree.leaves(params))
