"""All kernels of the recurrence for Hopper, forward and backward, at the released frame size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from kernels_pallas import choice, gdn
from kernels_pallas.gdn import api, gpu_states_hopper

TOKENS = 880  # of a frame
PROGRAMS = ("maps", "states", "rows", "read", "camera read")


def pretend(monkeypatch: pytest.MonkeyPatch, capability: float = choice.HOPPER) -> None:
    """Makes this machine choose what a card chooses."""
    monkeypatch.setattr(choice, "capability", lambda: capability)
    monkeypatch.setattr(choice, "interpret", lambda: False)
    monkeypatch.setattr(gpu_states_hopper, "CHAINS", 1)


def program(name: str, size: int) -> tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]:
    """One of `PROGRAMS`: a function of `gdn.Tiles` and arrays, and the arrays' shapes.

    Args:
      size: D of a head.
    """
    batch, frames, heads = 1, 2, 2

    def like(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, frames, *shape), dtype)

    token = like(TOKENS, heads, size, dtype=jnp.bfloat16)
    matrix, row = like(heads, size, size), like(heads, 1, size)
    initial = jax.ShapeDtypeStruct((batch, heads, size, size), jnp.float32)
    beta, decay = like(TOKENS, heads), like(heads)

    def maps(tiles: gdn.Tiles, k: Any, v: Any, beta: Any, decay: Any, w: Any, u: Any) -> Any:
        saved = (k, v, beta, decay)
        found = api._maps(tiles, False, *saved)
        return found, [a for a in api._maps_backward(tiles, False, saved, (w, u)) if a is not None]

    def states(tiles: gdn.Tiles, k: Any, v: Any, beta: Any, decay: Any, initial: Any) -> Any:
        def run(*saved: Any) -> Any:
            bidirectional = gdn.bidirectional_token_states(*saved, tiles=tiles, impl="pallas")
            return gdn.token_states(*saved, initial, tiles=tiles, impl="pallas"), bidirectional

        found, vjp = jax.vjp(run, k, v, beta, decay)
        return found, vjp(found)

    def rows(tiles: gdn.Tiles, k: Any, beta: Any, decay: Any, w: Any, u: Any) -> Any:
        return maps(tiles, k, None, beta, decay, w, u)[1]

    def read(tiles: gdn.Tiles, states: Any, q: Any, z: Any, dy: Any) -> Any:
        static, saved = (tiles, False, 1e-8), (states, q, z, q)
        return api._read(static, *saved), api._read_backward(static, saved, dy)

    def camera_read(tiles: gdn.Tiles, states: Any, q: Any, dy: Any) -> Any:
        static, saved = (tiles, False, None), (states, q, None, None)
        return api._read(static, *saved), api._read_backward(static, saved, dy)[:2]

    programs = {
        "maps": (maps, (token, token, beta, decay, matrix, matrix)),
        "states": (states, (token, token, beta, decay, initial)),
        "rows": (rows, (token, beta, decay, matrix, row)),
        "read": (read, (matrix, token, row, token)),
        "camera read": (camera_read, (matrix, token, token)),
    }
    return programs[name]
