"""float32 sets the precision of one model's matrix products, and of nothing else in the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.checkpoints.sizes import TINY
from sanawm_jax.sampling import decode, generate, refine
from sanawm_jax.sampling.generate import SanaWM
from sanawm_jax.sampling.latents import channels_last
from sanawm_jax.sampling.precision import matmul_precision
from sanawm_jax.sampling.refine import LTX2Refiner

CALLS = {
    generate: ("denoise", "encode_prompt", "_encode"),
    decode: ("_decode",),
    refine: ("refine", "read_text", "encode_texts"),
}


@pytest.fixture(autouse=True)
def plain_process() -> Iterator[None]:
    """The tests run at the highest precision; a user's process does not."""
    with jax.default_matmul_precision(None):  # pyright: ignore[reportArgumentType]
        yield


def current() -> str | None:
    return jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]


def products(dtype: Any) -> str:
    x = jnp.ones((4, 4), dtype)
    with matmul_precision(dtype):
        return str(jax.make_jaxpr(lambda x: x @ x)(x))


def test_the_context_decides_the_products() -> None:
    assert "HIGHEST" in products(jnp.float32)
    assert "HIGHEST" not in products(jnp.bfloat16)
    assert current() is None


def test_two_models_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage1, stage2 = write_random(tmp_path / "w", part="all", sizes=TINY)
    seen: dict[str, set[str | None]] = {}

    def watch(module: Any, name: str) -> None:
        function = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, set()).add(current())
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    for module, names in CALLS.items():
        for name in names:
            watch(module, name)
    models = {
        dtype: (
            SanaWM.from_pretrained(stage1, dtype=dtype),
            LTX2Refiner.from_pretrained(stage2, dtype=dtype),
        )
        for dtype in ("float32", "bfloat16")
    }
    image = Image.new("RGB", (64, 64), (200, 30, 30))
    for dtype, expected in (("float32", "highest"), ("bfloat16", None)):
        seen.clear()
        model, refiner = models[dtype]
        video = model(
            image, "a room", action="w-16", intrinsics="60,60,32,32", num_frames=17, height=64,
            width=64, steps=1, text_length=8, decode=False, progress=False,
        )  # fmt: skip
        refined = refiner(video.latents, "a room", progress=False)
        for window in model.decode_stream(jnp.asarray(channels_last(refined))):
            assert current() is None  # also while the caller of a stream works
            assert np.isfinite(window).all()
        assert seen == {name: {expected} for names in CALLS.values() for name in names}
        assert current() is None
