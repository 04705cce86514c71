"""The device mesh, the sharding of every parameter, and the sharding of activations by axis names.

A mesh has four axes. `data`: each rank is a replica. `fsdp`: each rank is a replica, and the ranks
divide the weights. `context`: the ranks divide the latent frames. `tensor`: the ranks divide the
heads and the inner widths. Model code does not use these names. It calls `shard(x, "B F P C")`,
which does nothing without a mesh. docs/architecture.md explains the axis letters.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Shaped

from kernels_pallas.choice import is_partitioned
from sanawm_jax.runtime.errors import InputError

AXES = ("data", "fsdp", "context", "tensor")
CONTEXT = "context"

# Axes with other letters are not sharded.
_LOGICAL = {"B": ("data", "fsdp"), "F": "context", "N": "tensor"}


# The axes of the mesh that `undivided` hides.
_hidden = contextvars.ContextVar("hidden", default=frozenset[str]())


@contextlib.contextmanager
def undivided(name: str) -> Iterator[None]:
    """Traces a part of a program in which the ranks of an axis divide nothing and do the same."""
    token = _hidden.set(_hidden.get() | {name})
    try:
        yield
    finally:
        _hidden.reset(token)


def axis_size(name: str) -> int:
    """Returns the number of ranks along an axis of the current mesh, or 1 without a mesh.

    It is 1 too where `undivided` hides the axis.
    """
    if name in _hidden.get():
        return 1
    return dict(jax.sharding.get_abstract_mesh().shape).get(name, 1)


def logical_spec(names: str, *, divides_batch: bool = True) -> P:
    """Returns the spec of an array with axes such as "B F P N D". "(N D)" is one merged axis.

    Args:
      names: the axes.
      divides_batch: without it, every rank has the whole batch.
    """
    axes = [token.strip("() ").split()[0] for token in re.findall(r"\([^)]*\)|\S+", names)]
    found = [_LOGICAL.get(a) if divides_batch or a != "B" else None for a in axes]
    return P(*(None if axis in _hidden.get() else axis for axis in found))


def shard(x: Shaped[Array, "..."], names: str) -> Shaped[Array, "..."]:
    """Constrains an activation's layout on the mesh that is set.

    Without a mesh, and in a `jax.shard_map` over all of its axes, it returns x itself.

    Args:
      x: any array.
      names: its axes, such as `"B F P C"`.
    """
    return jax.lax.with_sharding_constraint(x, logical_spec(names)) if is_partitioned() else x


def per_rank(
    function: Callable[..., Any],
    inputs: Sequence[str],
    outputs: str | tuple[str, ...],
    *,
    whole_width: bool = False,
) -> Callable[..., Any]:
    """Makes each rank of the mesh run `function` on its own part of the arrays.

    The compiler cannot divide the call of a Pallas kernel, so this is how kernels run on a mesh. It
    is also how frames see each other there: `function` may communicate over the axis `CONTEXT`.
    Without a mesh, on one device, and inside another such function, it is `function` itself. If the
    ranks do not divide the batch evenly, each has all of it.

    Args:
      function: takes arrays, trees of arrays whose leaves have the same axes, or None.
      inputs: the axes of each argument, such as `"B F P N D"`; see `logical_spec`.
      outputs: the axes of the results.
      whole_width: `function` needs all heads and channels, and does not communicate. Where the axis
        `tensor` divides them, it stays with the compiler, and XLA runs in place of a Pallas kernel.
    """
    if not is_partitioned() or (whole_width and axis_size("tensor") > 1):
        return function

    def run(*args: Any) -> Any:
        replicas = math.prod(axis_size(name) for name in _LOGICAL["B"])
        batches = [
            leaf.shape[names.split().index("B")]
            for names, arg in zip(inputs, args, strict=True)
            if "B" in names.split()
            for leaf in jax.tree.leaves(arg)
        ]
        divides_batch = all(size % replicas == 0 for size in batches)

        def spec(names: str) -> P:
            return logical_spec(names, divides_batch=divides_batch)

        # Pallas kernels do not say over which axes their results vary
        mapped = jax.shard_map(
            function,
            in_specs=tuple(map(spec, inputs)),
            out_specs=jax.tree.map(spec, outputs),
            check_vma=False,
        )
        return mapped(*args)

    return run


def make_mesh(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh of the first `data * fsdp * context * tensor` devices, for `jax.set_mesh`.

    Raises:
      InputError: there are more ranks than devices, or fewer ranks than devices on several hosts.
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
    # With Auto, the compiler propagates shardings between our constraints.
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices[:size])


def plan_mesh(data: int = 1, fsdp: int = 1, context: int = 1, tensor: int = 1) -> AbstractMesh:
    """Returns a mesh without devices. It serves to plan sizes, and no program can run on it."""
    return AbstractMesh((data, fsdp, context, tensor), AXES)


# The sharding of parameters. The first pattern that is found in a dotted path decides. The paths of
# optimizer moments and averages end with the parameter's path, so the same rules apply to them. A
# spec describes the last axes; the leading axes, along which layers are stacked, are not divided.
# Over `tensor`, a kernel whose result is heads or an inner width is divided by columns, and the
# kernel that reads this result by rows. Each such pair of kernels needs only one reduction.
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
    # These are small, or every rank reads them as a whole.
    (_BLOCK + r".*(bias|scale|modulation_table|decay_rate_log|decay_step)$", P()),
    (r"(patch_embed|plucker_embed)\.conv\.kernel$", P(None, "fsdp")),
    (r"raymap_embed\.conv\.kernel$", P()),
    (r"(time_in|time_out|modulation)\.kernel$", P("tensor", "fsdp")),
    (r"text_embed\.fc1\.kernel$", P("fsdp", "tensor")),
    (r"text_embed\.fc2\.kernel$", P("tensor", "fsdp")),
    (r"(^|\.)final\.kernel$", P("fsdp", None)),
    (r"(_embed(\.conv|\.fc[12])?|time_in|time_out|modulation|final)\.bias$", P()),
    (r"(text_norm\.scale|final_table)$", P()),
    # The refiner's blocks, and the adapters of any model.
    (r"(^|\.)lora_[ab]$", P()),
    (r"blocks\.((cross_)?attn\.[qkv]|ffn\.up)\.kernel$", P("fsdp", "tensor")),
    (r"blocks\.((cross_)?attn\.out|ffn\.down)\.kernel$", P("tensor", "fsdp")),
    (r"blocks\.(cross_)?attn\.gate\.kernel$", P("fsdp", None)),
    (r"blocks\..*(bias|scale|modulation_table)$", P()),
    (r"(^|\.)caption\.linear_1\.kernel$", P("fsdp", "tensor")),
    (r"(^|\.)caption\.linear_2\.kernel$", P("tensor", "fsdp")),
    (r"(^|\.)embed\.kernel$", P(None, "fsdp")),
    (r"(^|\.)(embed|caption\.linear_[12])\.bias$", P()),
    # Autoencoders are small, so every rank holds a whole one.
    (r"(encoder|decoder)\.|latents_(mean|std)$", P()),
    # Parts of the training state.
    (r"(^|\.)(step|count|ns_coeffs)$|^guard\.", P()),
)


def parameter_spec(path: str, shape: tuple[int, ...]) -> P:
    """Returns the sharding of one array by `PARAMETER_RULES`.

    Raises:
      InputError: no rule matches the path.
    """
    for pattern, spec in PARAMETER_RULES:
        if re.search(pattern, path):
            return P(*[None] * (len(shape) - len(spec)), *spec)
    raise InputError(f"no sharding rule matches {path!r}; add one to core/sharding.py")


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the shardings of parameters, of an optimizer state or of a whole training state.

    Args:
      tree: tree of arrays or of `jax.ShapeDtypeStruct`.
      mesh: a mesh with the axes `AXES`.

    Raises:
      InputError: no rule matches a path, or an axis of the mesh does not divide the array's axis.
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
    """Returns the sharding of a batch. Its rows, the first axis, are divided over the ranks.

    Frames are divided inside the model.

    Args:
      mesh: the mesh.
      steps: whether the batches of several steps are stacked on an axis before the rows.
    """
    return NamedSharding(mesh, logical_spec("K B" if steps else "B"))


def local_rows(mesh: Mesh, batch_size: int) -> Int[np.ndarray, "B_local"]:
    """Which rows of a batch this process holds, ascending int."""
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    return np.unique(np.concatenate([np.arange(batch_size)[rows] for rows in places.values()]))


def place_batches(batches: Any, mesh: Mesh, batch_size: int) -> Any:
    """Makes global arrays of the batches of several steps.

    Args:
      batches: arrays (K, rows, ...) with the rows of `local_rows` in K batches.
      mesh: the mesh.
      batch_size: rows of all processes together.
    """
    sharding = batch_sharding(mesh, steps=True)

    def one(a: np.ndarray) -> jax.Array:
        shape = (a.shape[0], batch_size, *a.shape[2:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(a), shape)

    return jax.tree.map(one, batches)


def place(tree: Any, places: Any) -> Any:
    """Puts a tree onto a mesh. Every process has the whole tree.

    Args:
      tree: tree of arrays.
      places: their shardings, in a tree with the same structure, or one sharding for all.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def one(a: Any, sharding: NamedSharding) -> jax.Array:
        # `device_put` would first compare the arrays of all processes.
        host = np.asarray(a)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(places, NamedSharding):
        return jax.tree.map(lambda a: one(a, places), tree)
    return jax.tree.map(one, tree, places)


def signal_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that has one row per rank."""
    return NamedSharding(mesh, P(AXES))


def place_signals(mesh: Mesh, *values: float) -> Float[Array, "_ _"]:
    """What this process has to say, beside what the others say: (ranks, values) float32."""
    row = np.asarray(values, np.float32)

    shape = (mesh.size, len(values))
    return jax.make_array_from_callback(shape, signal_sharding(mesh), lambda _: row[None])


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, accumulation: int = 1) -> None:
    """Checks that every part of a batch can be divided evenly over all replicas.

    Raises:
      InputError: it cannot.
    """
    replicas = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size < 1 or accumulation < 1:
        raise InputError(
            f"batch_size={batch_size} and accumulation={accumulation} must be at least 1"
        )
    if batch_size % (replicas * accumulation):
        raise InputError(
            f"batch_size={batch_size} must be a multiple of mesh.data x mesh.fsdp x accumulation "
            f"= {replicas * accumulation}"
        )


def check_heads(heads: int, ranks: int) -> None:
    """Checks that every rank of the axis `tensor` gets a whole number of heads.

    Raises:
      InputError: it does not.
    """
    if heads % ranks:
        raise InputError(f"mesh.tensor={ranks} does not divide the {heads} heads")
