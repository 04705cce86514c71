"""Recipes are found by name, and the modules of training have no circular imports."""

from __future__ import annotations

import ast
import graphlib
import importlib
from pathlib import Path

import pytest

import sanawm_jax.training as package
from configs import smoke
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.training.recipes.registry import RECIPES, make_recipe


def test_every_name_leads_to_a_function() -> None:
    for place in RECIPES.values():
        module, function = place.split(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_an_unknown_name_is_one_line(tmp_path: Path) -> None:
    config = smoke.get_config()
    config.task = "gan"
    with pytest.raises(InputError, match=r"^task='gan'; use one of vae, dit, stage1, refiner, "):
        make_recipe(config, tmp_path)


def test_no_circles() -> None:
    """Returns all imports, also those inside functions and those for types."""
    root = Path(package.__path__[0])
    graph = {}
    for file in root.rglob("*.py"):
        name = ".".join((package.__name__, *file.relative_to(root).with_suffix("").parts))
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        graph[name] = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert f"{package.__name__}.recipes.stage1" in graph
    list(graphlib.TopologicalSorter(graph).static_order())
