"""Decoding a clip in tiles, and encoding one image, ours and diffusers', on the same device.

    python -m benchmarks.vae --latent_frames 13 121
    python -m benchmarks.vae --tiny

The weights are random and have the released size; 704x1280 pixels, bfloat16, tiles of 512x512
pixels and 96 frames.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from typing import Any

from benchmarks import common


def _sizes(given: argparse.Namespace) -> tuple[Any, list[int], tuple[int, int]]:
    from sanawm_jax.checkpoints.sizes import RELEASED, TINY

    if given.tiny:
        return TINY.vae, [2], (2, 2)
    return RELEASED.vae, given.latent_frames, (22, 40)


def ours(given: argparse.Namespace) -> None:
    """Measures the decoder window by window, and the encoder."""
    import jax

    from sanawm_jax.sampling.decode import decode_latents, decode_tiling
    from sanawm_jax.sampling.generate import encode_pixels
    from sanawm_jax.vae.model import VideoDecoder, VideoEncoder
    from sanawm_jax.vae.tiling import decode_windows

    config, lengths, grid = _sizes(given)
    dtype = common.jax_dtype(given.tiny)
    graphdef, params = common.random_params(VideoDecoder, config, dtype)
    tile = functools.partial(decode_latents, graphdef, params)
    for frames in lengths:
        shape = (1, frames, *grid, config.latent_channels)
        latents = jax.random.normal(jax.random.key(0), shape, dtype)

        def decode(latents: Any = latents) -> None:
            tiling = decode_tiling("always", 8 * latents.shape[1])
            for window in decode_windows(tile, latents, config, tiling):
                window.block_until_ready()

        common.report("ours", f"decode {frames} latent frames", decode, given.repeats)
    graphdef, params = common.random_params(VideoEncoder, config, dtype)
    pixels = jax.random.normal(jax.random.key(0), (1, 1, 32 * grid[0], 32 * grid[1], 3), dtype)
    common.report(
        "ours",
        "encode a picture",
        lambda: encode_pixels(graphdef, params, pixels).block_until_ready(),
        given.repeats,
    )


def reference(given: argparse.Namespace) -> None:
    """Measures diffusers' `AutoencoderKLLTX2Video`."""
    import torch
    from diffusers import AutoencoderKLLTX2Video

    config, lengths, grid = _sizes(given)
    device, dtype = common.torch_device(given.tiny)
    model = AutoencoderKLLTX2Video(**dataclasses.asdict(config))
    model = common.fill_reference(model, device, dtype)
    model.enable_tiling()
    model.use_framewise_decoding = model.use_framewise_encoding = True
    model.tile_sample_min_num_frames, model.tile_sample_stride_num_frames = 96, 64
    decoder: Any = torch.compile(model.decode) if given.compile else model.decode
    for frames in lengths:
        shape = (1, config.latent_channels, frames, *grid)
        latents = torch.randn(*shape, device=device, dtype=dtype)

        def decode(latents: Any = latents) -> None:
            with torch.no_grad():
                decoder(latents, return_dict=False)
            common.wait_torch()

        common.report(given.side, f"decode {frames} latent frames", decode, given.repeats)
    pixels = torch.randn(1, 3, 1, 32 * grid[0], 32 * grid[1], device=device, dtype=dtype)

    def encode() -> None:
        with torch.no_grad():
            model.encode(pixels)
        common.wait_torch()

    common.report(given.side, "encode a picture", encode, given.repeats)


def main(arguments: list[str] | None = None) -> None:
    """Runs one command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--latent_frames", type=int, nargs="+", default=[13, 121])
    common.run_sides(parser, {"ours": ours, "reference": reference}, arguments)


if __name__ == "__main__":
    main()
