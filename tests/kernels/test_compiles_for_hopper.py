"""Compiles the kernels to an H100's machine code on a machine that has no GPU.

XLA compiles for a card that it only has a description of, and ptxas assembles. So CI sees what
lowering does not show: layouts that the compiler refuses, shared memory that does not fit, and
registers that are spilled. It needs `make test-hopper`'s environment, which has the CUDA plugin
without the CUDA libraries.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from kernels_pallas import gdn, ucpe
from tests.kernels import hopper_programs
from tests.kernels.lowering import target

pytest.importorskip("jax_plugins.xla_cuda13", reason="make test-hopper has what compiles for CUDA")
H100 = Path(__file__).with_name("h100.txtpb")
# Bytes of registers that the worst kernel of each program spills today. Most are of the gradient of
# the main branch's read-out, whose two warpgroups hold two matrices beside the normaliser.
SPILLED = {"maps": 64, "states": 64, "rows": 0, "read": 1060, "camera read": 0}


@pytest.fixture(scope="module")
def card() -> Any:
    """An H100 to compile for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # there is no driver and no cuDNN
        topology = topologies.get_topology_desc(
            "h100",
            platform="cuda",
            target_config=H100.read_text(encoding="utf-8"),
            topology="1x1x1",
        )
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compiled(card: Any, function: Any, *args: jax.ShapeDtypeStruct) -> str:
    """The optimised program for the card."""
    placed = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=card) for a in args]
    with target():
        traced = jax.jit(function).trace(*placed)
        return traced.lower(lowering_platforms=("cuda",)).compile().as_text()


@pytest.mark.parametrize("name", SPILLED)
def test_mosaic_kernels(name: str, card: Any, monkeypatch: Any, capfd: Any) -> None:
    hopper_programs.pretend(monkeypatch)
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    function, args = hopper_programs.program(name, 112)
    text = compiled(card, functools.partial(function, gdn.Tiles()), *args)
    assert 'custom_call_target="mosaic_gpu' in text
    said = capfd.readouterr()
    reports = (said.out + said.err).split("Compiling entry function")[1:]
    assert reports and all("for 'sm_90a'" in report for report in reports)
    spilled = [int(re.findall(r"(\d+) bytes spill stores", report)[0]) for report in reports]
    assert max(spilled) <= SPILLED[name], spilled


@pytest.mark.parametrize("name", SPILLED)
def test_triton_kernels(name: str, card: Any, monkeypatch: Any) -> None:
    hopper_programs.pretend(monkeypatch)
    function, args = hopper_programs.program(name, 112)
    text = compiled(card, functools.partial(function, gdn.Tiles(mosaic=())), *args)
    assert "gdn_" in text  # names of the kernels


def test_ucpe_kernels(card: Any) -> None:
    """The rotation of heads and their way to ray space, with norm and ReLU in front."""
    from kernels_pallas.ucpe import gpu

    token, angle = (1, 2, hopper_programs.TOKENS), (hopper_programs.TOKENS,)
    shapes = {
        "x": jax.ShapeDtypeStruct((*token, 2, 112), jnp.bfloat16),
        "matrices": jax.ShapeDtypeStruct((*token, 4, 4), jnp.float32),
        "weight": jax.ShapeDtypeStruct((224,), jnp.float32),
        "inverse": jax.ShapeDtypeStruct((*token, 1), jnp.float32),
        "angles": jax.ShapeDtypeStruct((2, *angle, 56), jnp.float32),
    }
    forms = {
        "ucpe_bounded_featured": gpu.Form(True, bounded=True, featured=True, relu=True),
        "rope_plain_featured": gpu.Form(plain=True, featured=True, relu=True),
    }

    def run(*given: Any) -> list[Any]:
        arrays = dict(zip(shapes, given, strict=True))
        angles = arrays.pop("angles")
        found = []
        for form in forms.values():
            table = angles[..., :28] if form.moves else angles
            tables = {"cos": table, "sin": table}
            found.append(gpu.run(form, arrays | tables, ucpe.Tiles(), interpret=False))
        return found

    text = compiled(card, run, *shapes.values())
    assert all(name in text for name in forms)


def test_conv_glu_kernels(card: Any) -> None:
    """Forward and backward, at the released width and grid."""
    from kernels_pallas.conv_glu import gpu

    x = jax.ShapeDtypeStruct((2, 22, 40, 2, 6720), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((3, 3, 2, 6720), jnp.float32)
    b = jax.ShapeDtypeStruct((2, 2, 6720), jnp.float32)
    dy = jax.ShapeDtypeStruct((2, 22, 40, 6720), jnp.bfloat16)

    def both(x: Any, w: Any, b: Any, dy: Any) -> Any:
        tiles = gpu.Tiles()
        y = gpu.forward(x, w, b, tiles, interpret=False)
        return y, gpu.backward(x, w, b, dy, tiles, interpret=False)

    text = compiled(card, both, x, w, b, dy)
    assert all(name in text for name in ("conv_glu_forward", "conv_glu_gate", "conv_glu_dx"))
