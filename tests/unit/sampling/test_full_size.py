"""For 961 frames of 704x1280, no array is too large for a 32-bit index. The programs are traced.

XLA and its libraries use 32-bit indices in many operations. A larger array fails or gives wrong
numbers, often in an operation far from the one that made it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from sanawm_jax.checkpoints.sizes import RELEASED
from sanawm_jax.core.params import apply, build
from sanawm_jax.dit.model import DiT
from sanawm_jax.memory.programs import INDEX_LIMIT, large_arrays, trace
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.refiner.rope import video_rope
from sanawm_jax.refiner.sampler import RefinerText, capture_sink, refine_block
from sanawm_jax.sampling.decode import decode_latents, decode_tiling, to_unit
from sanawm_jax.sampling.generate import encode_pixels
from sanawm_jax.sampling.stage1 import Conditions, denoise_step
from sanawm_jax.vae.model import VideoDecoder, VideoEncoder
from sanawm_jax.vae.tiling import decode_windows

pytestmark = pytest.mark.usefixtures("flash")
BF16, F32 = jnp.bfloat16, jnp.float32
FRAMES, ROWS, COLUMNS = 121, 22, 40  # latents of 961 frames of 704x1280
PIXELS = (961, 704, 1280)


def array(*shape: int, dtype: Any = BF16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def network(module: Any, config: Any) -> tuple[Any, Any]:
    graphdef, params = build(module, config)
    return graphdef, jax.tree.map(lambda a: array(*a.shape), params)


def assert_fits(program: Any) -> None:
    assert not large_arrays(program)


def conditions(batch: int) -> Conditions:
    return Conditions(
        array(batch, 300, 2304),
        array(batch, 300, dtype=jnp.int32),
        array(1, FRAMES, 20, dtype=F32),
        array(1, FRAMES, ROWS, COLUMNS, 48, dtype=F32),
    )


def test_stage1_with_guidance() -> None:
    graphdef, params = network(DiT, RELEASED.dit)
    latents, sigma = array(1, FRAMES, ROWS, COLUMNS, 128, dtype=F32), array(dtype=F32)
    scalars = (sigma, sigma, sigma)
    step = trace(denoise_step, graphdef, params, latents, conditions(2), *scalars, dtype=BF16)
    assert_fits(step)
    assert step.out_avals[0].shape == latents.shape
    # both halves at once would not: the feed-forward is 6 times as wide as the network
    whole = trace(
        lambda graphdef, params, x, text, mask: apply(
            graphdef, params, x, jnp.zeros((2, FRAMES)), text, mask
        ),
        graphdef, params, array(2, FRAMES, ROWS, COLUMNS, 128), *conditions(2)[:2],
    )  # fmt: skip
    assert (2, FRAMES, ROWS * COLUMNS, 13440) in large_arrays(whole)


@pytest.mark.parametrize("form", ["separate", "stacked"])
def test_refiner(form: str) -> None:
    config = RELEASED.refiner
    graphdef, params = network(Refiner, config)
    rope = video_rope(config, FRAMES, ROWS, COLUMNS, 16.0)
    text = RefinerText(array(1, 1024, config.text_width))
    if form == "separate":
        params["blocks"] = jax.tree.map(
            lambda a: (array(*a.shape[1:]),) * config.num_layers, params["blocks"]
        )
    sink = array(1, 1, ROWS, COLUMNS, 128, dtype=F32)
    static = dict(history_slots=10, dtype=BF16)
    assert_fits(trace(capture_sink, graphdef, params, sink, text, rope, **static))
    window = jax.eval_shape(
        lambda *args: capture_sink(graphdef, *args, **static), params, sink, text, rope
    )
    assert len(jax.tree.leaves(window.keys)) == (2 * 48 if form == "separate" else 2)
    block, sigmas = array(1, 3, ROWS, COLUMNS, 128, dtype=F32), array(4, dtype=F32)
    args = (params, window, block, block, text, rope, sigmas)
    assert_fits(trace(refine_block, graphdef, *args, dtype=BF16))
    refined, after = jax.eval_shape(lambda *args: refine_block(graphdef, *args, dtype=BF16), *args)
    assert refined.shape == block.shape
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, window)


def decode(tiling: str) -> tuple[list[Any], Any]:
    """Returns the shapes of the windows of the whole video, and the program that decodes them."""
    config = RELEASED.vae
    graphdef, params = network(VideoDecoder, config)
    shapes: list[Any] = []

    def film(graphdef: Any, params: Any, latents: jax.Array) -> list[jax.Array]:
        def tile(part: jax.Array) -> jax.Array:
            return decode_latents.__wrapped__(graphdef, params, part)

        how = decode_tiling(tiling, PIXELS[0])
        windows = list(decode_windows(tile, latents, config, how))
        shapes.extend(w.shape for w in windows)
        return [to_unit(w) for w in windows]

    latents = array(1, FRAMES, ROWS, COLUMNS, 128)
    return shapes, trace(film, graphdef, params, latents)


def test_decode_window_by_window() -> None:
    shapes, program = decode("auto")
    assert_fits(program)
    assert len(shapes) > 10 and sum(shape[1] for shape in shapes) == PIXELS[0]
    assert all(shape[2:] == (*PIXELS[1:], 3) for shape in shapes)


def test_decode_at_once_is_noticed() -> None:
    _, program = decode("none")
    found = large_arrays(program)
    assert (1, *PIXELS, 3) in found, "the film itself has 2.6e9 numbers"
    assert 961 * 704 * 1280 * 3 > INDEX_LIMIT


def test_encode_the_first_frame() -> None:
    graphdef, params = network(VideoEncoder, RELEASED.vae)
    assert_fits(trace(encode_pixels, graphdef, params, array(1, 1, *PIXELS[1:], 3)))


def test_guidance_in_halves_is_the_same() -> None:
    """If a clip is too long for a batch of both prompts, they run one after the other."""
    from sanawm_jax.checkpoints.sizes import TINY
    from sanawm_jax.core.params import init
    from sanawm_jax.sampling import stage1

    graphdef, _ = build(DiT, TINY.dit)
    params = init(DiT, TINY.dit, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 8))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape)

    params["final"]["kernel"] = normal(*params["final"]["kernel"].shape)
    given = Conditions(normal(2, 4, 32), jnp.ones((2, 4)), normal(1, 2, 20), normal(1, 2, 2, 2, 48))
    given = given._replace(camera=jnp.zeros((1, 2, 20)).at[..., [0, 5, 10, 15, 16, 17]].set(1.0))
    latents, levels = normal(1, 2, 2, 2, 8), (jnp.float32(0.9), jnp.float32(0.5), jnp.float32(3.0))

    def step() -> jax.Array:
        return denoise_step.__wrapped__(graphdef, params, latents, given, *levels, dtype=F32)

    both = step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "INDEX_LIMIT", 100)
        halves = step()
    assert jnp.abs(both - latents).max() > 0.1
    assert jnp.allclose(both, halves, rtol=0, atol=1e-5 * float(jnp.abs(both).max()))
