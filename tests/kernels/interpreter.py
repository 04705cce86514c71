"""Adds operations that the Hopper kernels use to Pallas' interpreter of Mosaic GPU.

The interpreter runs the program of a kernel operation by operation on a CPU, and simulates memory,
copies, barriers and warpgroups. It does not have accumulators with an initial value, left factors
in registers, and semaphores between blocks. `teach` adds these operations, so that the kernels' own
code runs completely, with products and semaphores.

Only a card shows three things: the order in which the matrix unit adds, its asynchronous execution,
and blocks that run at the same time. Here the blocks run one after the other.
"""

from __future__ import annotations

import collections
import functools
import threading
from typing import Any

import jax
import jax.numpy as jnp
import pytest

FIRST_VERSION = (0, 12)  # of JAX whose interpreter this is for


class Semaphores:
    """The values of the semaphores of one kernel, by index."""

    def __init__(self) -> None:
        self.counts: collections.Counter[tuple[int, ...]] = collections.Counter()
        self.waits: set[tuple[int, ...]] = set()
        self._lock = threading.Lock()

    def signal(self, token: Any, index: Any, value: Any) -> Any:
        with self._lock:
            self.counts[tuple(map(int, index))] += int(value)
        return token

    def wait(self, token: Any, index: Any, value: Any) -> Any:
        """Raises if a block has to wait: blocks run one after the other, so it would never end."""
        place = tuple(map(int, index))
        with self._lock:
            self.waits.add(place)
            if self.counts[place] < int(value):
                raise RuntimeError(f"a block waits for {place}, which no block before it signals")
        return token


def teach(monkeypatch: pytest.MonkeyPatch) -> Semaphores:
    """Adds the operations to the interpreter, and returns the semaphores of the next kernel."""
    from jax._src import callback
    from jax._src.pallas import core as pallas_core
    from jax._src.pallas import primitives as pallas_primitives
    from jax._src.pallas.mosaic_gpu import core as mosaic
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
    from jax._src.state import discharge

    semaphores = Semaphores()
    interpreter = jaxpr_interpret.JaxprInterpreter
    interpret = interpreter.interpret

    def is_accumulator(variable: Any) -> bool:
        return isinstance(variable.aval, mosaic.WGMMAAbstractAccumulatorRef)

    def run_with_sums(self: Any, equation: Any, token: Any, values: list[Any]) -> Any:
        """A scope with accumulators, which become values, as in the lowering for a card."""
        jaxpr = equation.params["jaxpr"]
        if equation.primitive is discharge.run_state_p:
            whole = [v.aval for v in equation.outvars]
            becomes_value = [isinstance(a, jax.core.ShapedArray) for a in whole]
            plain = discharge.discharge_state(
                jaxpr, should_discharge=becomes_value, strip_memory_space=True
            )
            token, out = self.interpret(plain, token, *values)
            found = iter(out)
            return token, [
                next(found) if b else v for b, v in zip(becomes_value, values, strict=True)
            ]
        assert all(map(is_accumulator, jaxpr.invars)), jaxpr
        zeros = [jnp.zeros(v.aval.shape, v.aval.dtype) for v in jaxpr.invars]
        # what is closed over comes as constants, which are not to be discharged
        open_jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
        becomes_value = [False] * len(values) + [True] * len(zeros)
        plain = discharge.discharge_state(
            open_jaxpr, should_discharge=becomes_value, strip_memory_space=True
        )
        token, out = self.interpret(plain, token, *values, *zeros)
        return token, out[: len(equation.outvars)]

    def multiply(self: Any, equation: Any, token: Any, values: list[Any]) -> Any:
        """sum + a b, both factors as bfloat16 and the products and the sum in float32."""
        total, a, b, *leaves = values
        trees = [equation.params[f"{name}_transforms_tree"] for name in ("acc", "a", "b")]
        assert trees[0] is None or not trees[0].num_leaves
        empty = jax.tree.structure(())
        _, of_a, of_b = jax.tree.unflatten(
            jax.tree_util.treedef_tuple([tree or empty for tree in trees]), leaves
        )

        def read(token: Any, i: int, key: Any, transforms: Any) -> Any:
            aval = equation.invars[i].aval
            if isinstance(aval, jax.core.ShapedArray):
                return token, key  # in registers
            part = pallas_core.TransformedRef(aval, tuple(transforms))
            key, transforms = jaxpr_interpret.resolve_ref(aval, key, transforms)
            return gpu_callbacks.call_get(
                token=token,
                result_shape_and_dtype=jax.ShapeDtypeStruct(part.shape, part.dtype),
                mesh_location=self.mesh_location,
                thread=self.thread,
                allocation_key_as_array=key,
                transforms=transforms,
                source_info=equation.source_info,
            )

        token, a = read(token, 1, a, of_a)
        token, b = read(token, 2, b, of_b)
        assert a.dtype == b.dtype == jnp.bfloat16, equation
        product = jnp.dot(
            a.astype(jnp.float32), b.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        return token, total + product

    def at_semaphore(action: Any, equation: Any, token: Any, values: list[Any]) -> Any:
        _, transforms, value, *_ = jax.tree.unflatten(equation.params["args_tree"], values)
        (indexer,) = transforms
        index = jnp.stack([jnp.asarray(i, jnp.int32) for i in indexer.indices])
        token = callback.io_callback(action, gpu_callbacks.TOKEN_SHAPE_DTYPE, token, index, value)
        return token, []

    def special(equation: Any) -> Any:
        scope = equation.params.get("jaxpr")
        if equation.primitive is discharge.run_state_p:
            return run_with_sums
        if equation.primitive is pallas_primitives.run_scoped_p and any(
            map(is_accumulator, scope.invars)
        ):
            return run_with_sums
        if equation.primitive is primitives.wgmma_p:
            return multiply
        if equation.primitive is primitives.wgmma_accumulator_deref_p and not is_accumulator(
            equation.invars[0]
        ):
            return lambda self, equation, token, values: (token, values[0])
        if equation.primitive is pallas_primitives.get_global_p:
            return lambda self, equation, token, values: (token, jnp.zeros((), jnp.int32))
        for name in ("signal", "wait"):
            if equation.primitive in (
                getattr(primitives, f"semaphore_{name}_p"),
                getattr(pallas_primitives, f"semaphore_{name}_p"),
            ):
                action = functools.partial(at_semaphore, getattr(semaphores, name))
                return lambda self, *args: action(*args)
        return None

    def piecewise(self: Any, jaxpr: Any, token: Any, *args: Any) -> Any:
        """Works as `interpret`, and runs the missing operations here."""
        if not any(special(equation) for equation in jaxpr.eqns):
            return interpret(self, jaxpr, token, *args)
        env = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

        def read(variables: Any) -> list[Any]:
            literal = jax.extend.core.Literal
            return [v.val if isinstance(v, literal) else env[v] for v in variables]

        for equation in jaxpr.eqns:
            action = special(equation)
            values = read(equation.invars)
            if action is not None:
                token, out = action(self, equation, token, values)
                out = out if equation.primitive.multiple_results else [out]
            else:
                free = [v for v in equation.invars if not isinstance(v, jax.extend.core.Literal)]
                free = list(dict.fromkeys(free))
                outvars = [v for v in equation.outvars]
                one = jaxpr.replace(
                    constvars=[], invars=free, outvars=outvars, eqns=[equation], debug_info=None
                )
                token, out = interpret(self, one, token, *read(free))
            env.update(zip(equation.outvars, out, strict=True))
        return token, read(jaxpr.outvars)

    monkeypatch.setattr(interpreter, "interpret", piecewise)
    return semaphores
