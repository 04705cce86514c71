"""The mesh, where every parameter lives on it, and constraints on activations by logical names.

A mesh has the axes `data` (replicas), `fsdp` (replicas that share the weights out), `context`
(ranks that share the latent frames out) and `tensor` (ranks that share heads and inner widths
out). Model code names none of them: it calls `shard(x, "B F P C")`, which does nothing without a
mesh. Axis letters as in docs/architecture.md.
"""

from __future__ import annotations

import re

import jax
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "context", "tensor")

# a letter that is not here is not sharded
_LOGICAL = {"B": ("data", "fsdp"), "F": "context", "N": "tensor"}


def axis_size(name: str) -> int:
    """Ranks along an axis of the mesh that is set, 1 without one."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def logical_spec(names: str) -> P:
    """`"B F P N D"` -> the spec of an array with these axes; `(N D)` is one axis, heads merged."""
    tokens = re.findall(r"\([^)]*\)|\S+", names)
    return P(*(_LOGICAL.get(token.strip("() ").split()[0]) for token in tokens))


def shard(x: jax.Array, names: str) -> jax.Array:
    """Constrains an activation's layout on the mesh that is set; without one, x itself.

    Args:
      x: any array.
      names: its axes, `"B F P C"`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, logical_spec(names))
