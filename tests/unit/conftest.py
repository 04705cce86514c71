"""What tests of full-size programs share."""

from __future__ import annotations

from typing import Any

import jax
import pytest


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, attention without a mask never writes its logits to memory."""
    plain = jax.nn.dot_product_attention

    def attention(q: Any, k: Any, v: Any, *, mask: Any = None, **options: Any) -> Any:
        return q if mask is None else plain(q, k, v, mask=mask, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
