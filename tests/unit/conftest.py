"""Shared parts of the tests of full-size programs."""

from __future__ import annotations

from typing import Any

import jax
import pytest


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention without a mask does not write its logits to memory, as on an accelerator."""
    plain = jax.nn.dot_product_attention

    def attention(q: Any, k: Any, v: Any, *, mask: Any = None, **options: Any) -> Any:
        return q if mask is None else plain(q, k, v, mask=mask, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
