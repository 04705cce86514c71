"""The refiner, ours and diffusers': one forward pass with a full KV cache, and a whole clip.

    python -m benchmarks.refiner
    python -m benchmarks.refiner --tiny

The KV cache of the forward pass holds 1 sink frame and 7 frames of history. The pass has 3 active
frames of 22x40 tokens and 1024 text tokens. The clip has 1 sink frame and 120 other frames, in
blocks of 3, and its history grows to 10 frames. The weights are random, those of the video half of
LTX-2, in bfloat16.

Both measurements start after the text is encoded, which happens once per clip. Our side keeps the
keys and values of the text tokens, and has released the layers that compute them. The reference
computes them in every forward pass. Both sides keep the keys and values of earlier frames. Ours
rotates the keys of the sink once per block, to their position in the window. A forward pass
computes everything else.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

from benchmarks import common

SINK, HISTORY, ACTIVE, WINDOW = 1, 7, 3, 11
_AUDIO = ("audio", "av_cross", "video_to_audio", "video_a2v", "a2v", "v2a")


def sizes(given: argparse.Namespace) -> tuple[Any, int, tuple[int, int], int]:
    """Returns configuration, refined frames, latent rows and columns, and text tokens."""
    from sanawm_jax.checkpoints.sizes import RELEASED, TINY

    if given.tiny:
        return TINY.refiner, 6, (2, 2), 8
    return RELEASED.refiner, given.frames, (22, 40), 1024


def window(config: Any, frames: int, grid: tuple[int, int], length: int, dtype: Any) -> Any:
    """Returns the transformer as sampling uses it, with random weights and a full KV cache.

    Args:
      config: the refiner's.
      frames: latent frames after the sink for which there are rotary positions.
      grid: latent rows and columns.
      length: text tokens.
      dtype: of weights and activations.

    Returns:
      Graph definition, parameters, prompt, rotary tables, and a tuple. The tuple holds a jitted
      function that returns the velocity, and its arguments after graph definition and parameters:
      prompt, latents and KV cache.
    """
    import jax
    import jax.numpy as jnp

    from sanawm_jax.core.params import apply
    from sanawm_jax.refiner.kv_window import KeyValue, KVWindow
    from sanawm_jax.refiner.model import Refiner
    from sanawm_jax.refiner.rope import frame_window, video_rope
    from sanawm_jax.refiner.sampler import RefinerText, read_text

    graphdef, params = common.random_params(Refiner, config, dtype, draw=common.random_layers)
    rope = video_rope(config, SINK + max(frames, HISTORY + ACTIVE), *grid, 16.0)

    def normal(seed: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed), shape, dtype)

    text = RefinerText(normal(0, 1, length, config.text_width))
    params, text = read_text(graphdef, params, text, dtype=dtype)

    def keys(seed: int, count: int) -> tuple[jax.Array, ...]:
        shape = (1, count, grid[0] * grid[1], config.num_attention_heads, config.attention_head_dim)
        return tuple(normal(seed + i, *shape) for i in range(config.num_layers))

    buffers = KeyValue(keys(100, SINK + HISTORY), keys(200, SINK + HISTORY))
    full = KVWindow(keys(300, SINK), buffers, jnp.int32(HISTORY))
    here = frame_window(rope, SINK + HISTORY, ACTIVE)
    latents = normal(3, 1, ACTIVE, *grid, config.in_channels)

    @functools.partial(jax.jit, static_argnums=0)
    def forward(
        graphdef: Any, params: Any, text: RefinerText, latents: jax.Array, window: KVWindow
    ) -> jax.Array:
        times = jnp.full((1, 1, 1), 725.0)
        return apply(
            graphdef,
            params,
            latents,
            times,
            text.embeddings,
            here,
            text_keys=text.keys,
            window=window,
        )[0]

    return graphdef, params, text, rope, (forward, text, latents, full)


def ours(given: argparse.Namespace) -> None:
    """Measures the transformer with a KV cache, and `refiner.sampler.refine`."""
    import jax
    import jax.numpy as jnp

    from sanawm_jax.refiner.sampler import refine

    config, frames, grid, length = sizes(given)
    dtype = common.jax_dtype(given.tiny)
    graphdef, params, text, rope, call = window(config, frames, grid, length, dtype)
    forward = functools.partial(call[0], graphdef, params, *call[1:])
    common.report(
        "ours",
        "forward of the window",
        lambda forward=forward: forward().block_until_ready(),
        given.repeats,
    )
    del call, forward  # the clip has its own KV cache
    shape = (1, SINK + frames, *grid, config.in_channels)
    clip = jax.random.normal(jax.random.key(4), shape, jnp.float32)
    common.report(
        "ours",
        f"refine {frames} frames",
        lambda: refine(
            graphdef, params, clip, text, rope, sink_frames=SINK, block_frames=ACTIVE,
            window_frames=WINDOW, dtype=dtype, progress=False,
        ).block_until_ready(),
        1,
    )  # fmt: skip


def reference(given: argparse.Namespace) -> None:
    """Measures diffusers' transformer with its cache, and `SanaWMLTX2Refiner`."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaWMLTX2Refiner
    from diffusers.models.transformers.transformer_sana_wm_refiner import (
        SanaWMLTX2RefinerTransformer3DModel,
        SanaWMRefinerKVCache,
    )

    config, frames, grid, length = sizes(given)
    device, dtype = common.torch_device(given.tiny)
    with torch.device("meta"):
        model = SanaWMLTX2RefinerTransformer3DModel(**dataclasses.asdict(config))
    # The audio half never runs, so it is removed, except the modules of its rotary tables.
    for module in (model, *model.transformer_blocks):
        for name, _ in list(module.named_children()):
            if name.startswith(_AUDIO) and not name.endswith("rope"):
                setattr(module, name, None)
    model = common.fill_reference(model, device, dtype)
    if given.compile:
        for i, block in enumerate(model.transformer_blocks):
            model.transformer_blocks[i] = torch.compile(block)  # type: ignore[assignment]
    tokens, width = grid[0] * grid[1], config.width

    def rope(positions: list[int]) -> Any:
        made = model.build_rotary_emb_for_absolute_positions(
            1, positions, *grid, torch.device(device), 16.0
        )
        return tuple(part.to(device) for part in made)

    options = {"device": device, "dtype": dtype}
    cache = SanaWMRefinerKVCache(config.num_layers)
    for i in range(config.num_layers):
        for store, count in (("store_sink", SINK), ("store_history", HISTORY)):
            pair = (torch.randn(1, count * tokens, width, **options) for _ in range(2))
            getattr(cache.get(i), store)(*pair)
    cache.sink_pe = rope(list(range(SINK)))
    text = torch.randn(1, length, config.text_width, **options)
    mask = torch.ones(1, length, **options)
    inputs = dict(
        hidden_states=torch.randn(1, ACTIVE * tokens, config.in_channels, **options),
        encoder_hidden_states=text,
        timestep=torch.full((1, ACTIVE * tokens), 725.0, device=device),
        video_rotary_emb=rope(list(range(SINK + HISTORY, SINK + HISTORY + ACTIVE))),
        encoder_attention_mask=mask,
        kv_cache=cache,
        kv_cache_mode="inject",
        return_dict=False,
    )

    def forward() -> None:
        with torch.no_grad():
            model(**inputs)
        common.wait_torch()

    common.report(given.side, "forward of the window", forward, given.repeats)
    del cache, inputs["kv_cache"]
    pipeline: Any = SanaWMLTX2Refiner(
        transformer=model,
        connectors=None,  # type: ignore[arg-type]
        tokenizer=None,  # type: ignore[arg-type]
        text_encoder=None,  # type: ignore[arg-type]
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline._encode_prompt = lambda *_, **__: (text, mask)
    clip = torch.randn(1, config.in_channels, SINK + frames, *grid, **options)

    def refine() -> None:
        with torch.no_grad():
            pipeline(
                clip, "", fps=16.0, sink_size=SINK, block_size=ACTIVE, kv_max_frames=WINDOW,
                output_type="latent",
            )  # fmt: skip
        common.wait_torch()

    common.report(given.side, f"refine {frames} frames", refine, 1)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=120, help="refined latent frames of the clip")
    common.run_sides(parser, {"ours": ours, "reference": reference}, arguments)


if __name__ == "__main__":
    main()
