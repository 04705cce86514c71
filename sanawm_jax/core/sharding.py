"""The mesh, where every parameter lives on it, and constraints on activations by logical names.

A mesh has the axes `data` (replicas), `fsdp` (replicas that share the weights out), `context`
(ranks that share the latent frames out) and `tensor` (ranks that share heads and inner widths
out). Model code names none of them: it calls `shard(x, "B F P C")`, which does nothing without a
mesh. Axis letters as in docs/architecture.md.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from sanawm_jax.runtime.errors import InputError

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


def shard(x: Shaped[Array, "..."], names: str) -> Shaped[Array, "..."]:
    """Constrains an activation's layout on the mesh that is set; without one, x itself.

    Args:
      x: any array.
      names: its axes, `"B F P C"`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, logical_spec(names))


def make_mesh(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over the first `data * fsdp * context * tensor` devices, to enter by `jax.set_mesh`.

    Raises:
      InputError: more ranks than devices, or on several hosts a mesh that leaves some out.
    """
    shape = (data, fsdp, context, tensor)
    size, devices = math.prod(shape), jax.devices()
    if min(shape) < 1:
        raise InputError(f"mesh axes {shape} must each be at least 1")
    text = " x ".join(f"{name} {n}" for name, n in zip(AXES, shape, strict=True))
    if size > len(devices):
        raise InputError(f"mesh of {text} needs {size} devices and there are {len(devices)}")
    if jax.process_count() > 1 and size != len(devices):
        raise InputError(f"mesh of {text} has to use all {len(devices)} devices of the hosts")
    # Auto: the compiler propagates shardings between our constraints
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices[:size])


def plan_mesh(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> AbstractMesh:
    """The shape of a mesh, whatever devices are here: sizes can be planned, nothing can run."""
    return AbstractMesh((data, fsdp, context, tensor), AXES)


# Where parameters live: the first pattern that is found in a dotted path decides, for optimizer
# moments and averages too, whose paths end like the parameter's. A spec is of the last axes; the
# leading ones, along which layers are stacked, stay whole. Kernels into heads or inner widths are
# split by columns over `tensor`, those out of them by rows, so that each pair costs one reduction.
_BLOCK = r"layers\."
PARAMETER_RULES: tuple[tuple[str, P], ...] = (
    (_BLOCK + r"attn\.(qkv|gate|[qkv]_camera)\.kernel$", P("fsdp", "tensor")),
    (_BLOCK + r"attn\.(out|out_camera)\.kernel$", P("tensor", "fsdp")),
    (_BLOCK + r"attn\.(beta|decay)\.kernel$", P("fsdp", None)),
    (_BLOCK + r"cross_attn\.(q|kv)\.kernel$", P("fsdp", "tensor")),
    (_BLOCK + r"cross_attn\.out\.kernel$", P("tensor", "fsdp")),
    (_BLOCK + r"ffn\.(up|fc1)\.kernel$", P("fsdp", "tensor")),
    (_BLOCK + r"ffn\.(down|fc2)\.kernel$", P("tensor", "fsdp")),
    (_BLOCK + r"ffn\.depthwise\.kernel$", P(None, "tensor")),
    (_BLOCK + r"ffn\.temporal\.kernel$", P("fsdp", "tensor")),
    (_BLOCK + r"plucker\.kernel$", P("fsdp", "tensor")),
    (_BLOCK + r"attn\.(gate|[qkv]_camera)\.bias$", P("tensor")),
    (_BLOCK + r"(cross_attn\.(q|kv)|ffn\.(up|fc1|depthwise))\.bias$", P("tensor")),
    (_BLOCK + r"attn\.([qkv]_norm|[qkv]_norm_camera)\.scale$", P("tensor")),
    (_BLOCK + r"attn\.[qkv]_conv(_camera)?\.taps$", P(None, "tensor")),
    # small, or read whole by every rank
    (_BLOCK + r".*(bias|scale|modulation_table|decay_rate_log|decay_step)$", P()),
    (r"(patch_embed|plucker_embed)\.conv\.kernel$", P(None, "fsdp")),
    (r"raymap_embed\.conv\.kernel$", P()),
    (r"(time_in|time_out|modulation)\.kernel$", P("tensor", "fsdp")),
    (r"text_embed\.fc1\.kernel$", P("fsdp", "tensor")),
    (r"text_embed\.fc2\.kernel$", P("tensor", "fsdp")),
    (r"(^|\.)final\.kernel$", P("fsdp", None)),
    (r"(_embed(\.conv|\.fc[12])?|time_in|time_out|modulation|final)\.bias$", P()),
    (r"(text_norm\.scale|final_table)$", P()),
    # the refiner's blocks, and adapters of any model
    (r"(^|\.)lora_[ab]$", P()),
    (r"blocks\.((cross_)?attn\.[qkv]|ffn\.up)\.kernel$", P("fsdp", "tensor")),
    (r"blocks\.((cross_)?attn\.out|ffn\.down)\.kernel$", P("tensor", "fsdp")),
    (r"blocks\.(cross_)?attn\.gate\.kernel$", P("fsdp", None)),
    (r"blocks\..*(bias|scale|modulation_table)$", P()),
    (r"(^|\.)caption\.linear_1\.kernel$", P("fsdp", "tensor")),
    (r"(^|\.)caption\.linear_2\.kernel$", P("tensor", "fsdp")),
    (r"(^|\.)embed\.kernel$", P(None, "fsdp")),
    (r"(^|\.)(embed|caption\.linear_[12])\.bias$", P()),
    # autoencoders are small: every rank holds all of one
    (r"(encoder|decoder)\.|latents_(mean|std)$", P()),
    # of the training state
    (r"(^|\.)(step|count|ns_coeffs)$|^guard\.", P()),
)


def parameter_spec(path: str, shape: tuple[int, ...]) -> P:
    """Layout of one leaf by `PARAMETER_RULES`.

    Raises:
      InputError: no rule knows the path.
    """
    for pattern, spec in PARAMETER_RULES:
        if re.search(pattern, path):
            return P(*[None] * (len(shape) - len(spec)), *spec)
    raise InputError(f"no sharding rule matches {path!r}; add one to core/sharding.py")


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Shardings of every leaf of parameters, optimizer state or a whole training state.

    Args:
      tree: of arrays or `jax.ShapeDtypeStruct`.
      mesh: with the axes `AXES`.

    Raises:
      InputError: a leaf that no rule knows, or an axis that the mesh does not divide.
    """

    def one(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        spec = parameter_spec(name, leaf.shape)
        for size, axis in zip(leaf.shape, spec, strict=False):
            if axis is not None and size % mesh.shape[axis]:
                raise InputError(
                    f"{name} {leaf.shape}: mesh.{axis}={mesh.shape[axis]} does not divide {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def batch_sharding(mesh: Mesh, *, steps: bool = False) -> NamedSharding:
    """Batches are split over their rows, their first axis; frames are split inside the model.

    Args:
      steps: the batches of several steps are stacked on an axis before that.
    """
    return NamedSharding(mesh, logical_spec("K B" if steps else "B"))


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, "B_local"]:
    """Which rows of a batch this process holds, ascending int."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in places.values()]))


def place_batches(batches: Any, mesh: Mesh, batch_size: int) -> Any:
    """Global arrays of the batches of some steps.

    Args:
      batches: arrays (K, rows, ...) of the rows that `local_rows` names.
      batch_size: rows of all processes together.
    """
    sharding = batch_sharding(mesh, steps=True)

    def one(a: np.ndarray) -> jax.Array:
        shape = (a.shape[0], batch_size, *a.shape[2:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(a), shape)

    return jax.tree.map(one, batches)


def place(tree: Any, places: Any) -> Any:
    """Puts a tree that every process has whole onto a mesh.

    Args:
      tree: of arrays.
      places: their shardings, in a tree of the same structure, or one for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def one(a: Any, sharding: NamedSharding) -> jax.Array:
        # `device_put` would first compare what the processes have
        host = np.asarray(a)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(places, NamedSharding):
        return jax.tree.map(lambda a: one(a, places), tree)
    return jax.tree.map(one, tree, places)


def signal_sharding(mesh: Mesh) -> NamedSharding:
    """Of an array that has a row for every rank."""
    return NamedSharding(mesh, P(AXES))


def place_signals(mesh: Mesh, *values: float) -> Float[Array, "_ _"]:
    """What this process has to say, beside what the others say: (ranks, values) float32."""
    row = np.asarray(values, np.float32)

    shape = (mesh.size, len(values))
    return jax.make_array_from_callback(shape, signal_sharding(mesh), lambda _: row[None])


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulation: int = 1) -> None:
    """Every part of a batch has to lie on all replicas alike.

    Raises:
      InputError: it does not.
    """
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (replicas * accumulation):
        raise InputError(
            f"batch_size={batch_size} must be a multiple of mesh.data x mesh.fsdp x accumulation "
            f"= {replicas * accumulation}"
        )


def check_heads(heads: int, ranks: int) -> None:
    """Every rank of the axis `tensor` has whole heads.

    Raises:
      InputError: it has not.
    """
    if heads % ranks:
        raise InputError(f"mesh.tensor={ranks} does not divide the {heads} heads")
