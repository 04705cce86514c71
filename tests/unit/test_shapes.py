"""Shapes in annotations: complete, in the letters of the legend, and checked when tests run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from kernels_pallas.conv_glu import conv_glu
from kernels_pallas.gdn import frame_transitions, scan_states
from kernels_pallas.ucpe import rotate
from sanawm_jax.camera.rays import camera_conditions
from sanawm_jax.core.attention import attention
from sanawm_jax.core.frames import FrameLayout, neighbours
from sanawm_jax.dit.ucpe import ray_matrices
from sanawm_jax.refiner.connectors import pack_states
from sanawm_jax.vae.latents import normalise
from tests.shapes import CHECKED

ROOT = Path(__file__).parents[2]
LEGEND = ROOT / "docs" / "architecture.md"
OF_SHAPES = ("Bool", "Float", "Float32", "Float64", "Int", "Key", "Num", "Shaped")
# axes that stand for any number of axes
MANY = ("rest", "space", "space_out")


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for name in CHECKED:
        path = ROOT / name.replace(".", "/")
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]:
            yield file, ast.parse(file.read_text(encoding="utf-8"))


def legend() -> set[str]:
    table = LEGEND.read_text(encoding="utf-8").split("## Axis letters")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE)
    letters = [letter for row in rows for letter in re.findall(r"`(\w+)`", row)]
    assert len(letters) == len(set(letters)), "a letter has two rows"
    return set(letters)


def shapes(tree: ast.AST) -> Iterator[str]:
    """The text of every shape annotation."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in OF_SHAPES:
            _, shape = node.slice.elts  # pyright: ignore[reportAttributeAccessIssue]
            yield ast.literal_eval(shape)


def test_every_axis_is_in_the_legend() -> None:
    known, unknown, seen = legend(), set(), 0
    for file, tree in modules():
        for shape in shapes(tree):
            seen += 1
            # expressions in braces are arguments of the function
            for axis in re.findall(r"[A-Za-z]\w*", re.sub(r"\{.*?\}", "", shape)):
                if axis not in MANY and axis.split("_")[0] not in known:
                    unknown.add(f"{axis} in {file.relative_to(ROOT)}")
    assert not unknown
    assert seen > 300


def has_bare_array(annotation: ast.expr) -> bool:
    """Whether an annotation names an array without its shape."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) in (
        *OF_SHAPES,
        "Callable",
    ):
        return False
    if ast.unparse(annotation) in ("Array", "jax.Array", "np.ndarray"):
        return True
    return any(has_bare_array(a) for a in ast.iter_child_nodes(annotation))  # pyright: ignore


def public_functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node.name, node
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for child in node.body:
                if not isinstance(child, ast.FunctionDef):
                    continue
                if child.name == "__call__" or not child.name.startswith("_"):
                    yield f"{node.name}.{child.name}", child


def test_arrays_of_public_functions_have_shapes() -> None:
    bare, seen = [], 0
    for file, tree in modules():
        for name, function in public_functions(tree):
            given = function.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            found = {a.arg: a.annotation for a in arguments if a.arg not in ("self", "cls")}
            found["return"] = function.returns
            seen += 1
            bare += [
                f"{file.relative_to(ROOT)}: {name}: {argument}"
                for argument, annotation in found.items()
                if annotation is None or has_bare_array(annotation)
            ]
    assert not bare
    assert seen > 150


def wrong_shapes() -> dict[str, tuple]:
    x = jnp.zeros((1, 2, 6, 2, 8))  # B F P N D
    tokens = jnp.zeros((1, 2, 6, 4))  # B F P C
    poses = np.tile(np.eye(4), (9, 1, 1))
    maps = frame_transitions(x, x, x[..., 0], x[:, :, 0, :, 0])
    return {
        "values of fewer tokens than keys": (attention, x[0], x[0], x[0, :, :4]),
        "frames without a head axis": (rotate, x[..., 0], jnp.zeros((2, 6, 4))),
        "angles of a whole head": (rotate, x, jnp.zeros((2, 6, 8))),
        "a decay for each token": (frame_transitions, x, x, x[..., 0], x[..., 0]),
        "a state without heads": (scan_states, maps, jnp.zeros((1, 8, 8))),
        "a bias of half the channels": (
            conv_glu,
            jnp.zeros((1, 4, 4, 8)),
            jnp.zeros(4),
            jnp.zeros((3, 3, 1, 8)),
            jnp.zeros(8),
        ),
        "tokens in one axis": (neighbours, tokens.reshape(1, 12, 4), 1, FrameLayout(2)),
        "poses as matrices": (ray_matrices, jnp.zeros((1, 2, 4, 4)), (2, 3)),
        "statistics of fewer channels": (normalise, tokens, jnp.zeros(3), jnp.ones(3)),
        "a mask of other tokens": (pack_states, jnp.zeros((3, 1, 5, 4)), jnp.ones((1, 6))),
        "arrays of JAX for the camera": (camera_conditions, jnp.asarray(poses), poses, 32, 32),
        "poses of three rows": (camera_conditions, poses[:, :3], np.ones((9, 4)), 32, 32),
    }


@pytest.mark.parametrize("case", wrong_shapes())
def test_wrong_shapes_are_refused(case: str) -> None:
    function, *arguments = wrong_shapes()[case]
    with pytest.raises(jaxtyping.TypeCheckError):
        function(*arguments)


def test_shapes_are_checked_while_tracing() -> None:
    x = jnp.zeros((1, 6, 2, 8))
    with pytest.raises(jaxtyping.TypeCheckError, match="key_mask"):
        jax.eval_shape(lambda q: attention(q, q, q, key_mask=jnp.ones((1, 5), bool)), x)
