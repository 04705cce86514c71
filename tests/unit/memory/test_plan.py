"""The estimate of the device memory that a run needs, at released sizes and without a device."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sanawm_jax.checkpoints.random_weights import write_random
from sanawm_jax.checkpoints.sizes import RELEASED, TINY
from sanawm_jax.memory import plan as memory_plan
from sanawm_jax.memory.plan import check_fits, dit_need, peak, refiner_need, text_need
from sanawm_jax.runtime.errors import InputError
from tests.sample_tiny import sample

GIB = 2**30
BF16 = np.dtype(jnp.bfloat16)
LATENTS = (1, 128, 121, 22, 40)  # 961 frames of 704x1280


@pytest.mark.usefixtures("flash")
def test_released_sizes() -> None:
    dit = dit_need(RELEASED.dit, LATENTS, 2, 300, BF16)
    assert dit.weights / GIB == pytest.approx(4.96, abs=0.01)
    assert dit.streamed / dit.weights == pytest.approx(2 / 20, abs=0.03)  # 2 of 20 blocks
    assert 2 < dit.other / GIB < 10
    # the feed-forward: its input, its output and the matrix between, one clip at a time
    token = 48 * 4096 * 2  # of keys, in 48 layers
    window = (2 * 11 + 1) * 22 * 40 * token  # 1 + 10 frames, and the sink before rotation
    text = 2 * 1024 * token
    refiner = refiner_need(
        RELEASED.refiner, LATENTS, sink=1, block=3, window=11, text_length=1024, dtype=BF16
    )
    # 24.3 but for the layers that have read the text
    assert refiner.weights / GIB == pytest.approx(21.3, abs=0.1)
    assert refiner.streamed / GIB == pytest.approx(21.3 * 2 / 48, abs=0.3)
    assert window + text < refiner.other < 1.1 * (window + text)
    gemma = text_need(RELEASED.refiner_text, BF16)
    assert gemma.weights / GIB == pytest.approx(21.9, abs=0.1)
    assert 1.9 * GIB < gemma.streamed < 3 * GIB  # the embeddings stay


def test_the_flag_that_makes_it_fit() -> None:
    first, second = (memory_plan.Need(10 * GIB, 1 * GIB, 4 * GIB) for _ in range(2))
    assert [peak([first, second], name) / GIB for name in ("none", "model", "block")] == [24, 14, 5]

    def check(offload: str, limit: float) -> None:
        check_fits(lambda: [[first, second], []], offload, int(limit * GIB))

    check("none", 24)
    with pytest.raises(InputError, match=r"24\.0 GiB .* has 20\.0; --offload=model needs 14\.0$"):
        check("none", 20)
    with pytest.raises(InputError, match=r"--offload=block needs 5\.0$"):
        check("none", 6)
    with pytest.raises(InputError, match=r"14\.0 GiB .* has 6\.0; --offload=block"):
        check("model", 6)
    with pytest.raises(InputError, match="fewer --num_frames"):
        check("block", 4)
    check_fits(lambda: pytest.fail("asked for"), "none")  # a CPU reports no memory


def test_a_run_that_cannot_fit_ends_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage1, refiner = write_random(tmp_path / "w", part="all", sizes=TINY)
    given = {"prompt": "a", "output_dir": str(tmp_path / "out"), "weights": str(stage1)}
    np.save(tmp_path / "latents.npy", np.zeros((1, 8, 4, 2, 2), np.float32))
    given |= {"stage1_latents": str(tmp_path / "latents.npy"), "refiner_weights": str(refiner)}
    monkeypatch.setattr(memory_plan, "device_bytes", lambda: 1000)
    with pytest.raises(InputError, match=r"this run needs at least .* GiB of device memory"):
        sample(**given)
    from PIL import Image

    Image.new("RGB", (64, 64)).save(tmp_path / "image.png")
    del given["stage1_latents"]
    given |= {"image": str(tmp_path / "image.png"), "action": "w-16"}
    with pytest.raises(InputError, match=r"this run needs at least .* GiB of device memory"):
        sample(**given)
    assert not list((tmp_path / "out").iterdir())
