"""Names of the weights that belong to the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

from sanawm_jax.checkpoints.folder import find_weights
from sanawm_jax.checkpoints.upstream_folder import open_refiner
from sanawm_jax.runtime import shipped
from sanawm_jax.runtime.errors import InputError


@pytest.mark.parametrize("name", shipped.SHIPPED)
def test_a_name_is_its_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "ASSETS", tmp_path)
    (tmp_path / name).mkdir()
    (tmp_path / name / "README.md").write_text("a card")  # the folder has no model
    for find in (find_weights, open_refiner):
        with pytest.raises(InputError, match=f"weights of {name} are not in this checkout"):
            find(name)
    (tmp_path / name / "model_index.json").write_text("{}")
    assert find_weights(name) == tmp_path / name
