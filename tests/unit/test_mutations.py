"""The table of mutations fits the code; `python -m tests.mutations` tries them, by hand."""

from __future__ import annotations

import ast

import pytest

from tests.mutations import ROOT, Mutation, mutate, read_tables

MUTATIONS = read_tables()


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 30


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_fits_the_code(mutation: Mutation) -> None:
    """Its text stands there once, what it becomes can be parsed, and its tests exist."""
    before = (ROOT / mutation.file).read_text(encoding="utf-8")
    after = mutate(before, mutation)
    assert after != before and ast.dump(ast.parse(after)) != ast.dump(ast.parse(before))
    for test in mutation.tests:
        file, _, name = test.partition("::")
        text = (ROOT / file).read_text(encoding="utf-8")
        assert not name or f"def {name.partition('[')[0]}(" in text


def test_a_text_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 times, not once"):
        mutate("x = 2", Mutation("name", "file.py", "x = 1", "x = 3", ()))
