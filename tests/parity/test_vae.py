"""The video autoencoder equals diffusers' `AutoencoderKLLTX2Video` on random weights."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLLTX2Video
from diffusers.models.autoencoders import autoencoder_kl_ltx2 as reference_file
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.sana_wm.pipeline_sana_wm import SanaWMPipeline
from flax import nnx

from sanawm_jax.checkpoints import files, keymap
from sanawm_jax.core import params as params_lib
from sanawm_jax.vae import latents as latents_lib
from sanawm_jax.vae import tiling as tiling_lib
from sanawm_jax.vae.config import SMALL_WORLD_VAE, VAEConfig
from sanawm_jax.vae.decoder import draw_noise
from sanawm_jax.vae.keys import key_table
from sanawm_jax.vae.model import VideoVAE
from tests.parity.compare import relative
from tests.parity.vae_reference import (
    CASES,
    CONDITIONED,
    PUBLISHED,
    STRIDED,
    TWO_BLOCKS,
    Pair,
    draw_video,
    from_torch,
    make_pair,
    to_torch,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory):
    return functools.cache(lambda cfg: make_pair(cfg, tmp_path_factory.mktemp("vae")))


def conditions(
    pair: Pair, latents: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Our decoder's timesteps and noise; the reference is made to draw the same noise."""
    temb = [np.linspace(0.05, 0.4, len(latents), dtype=np.float32)]
    noise = draw_noise(jax.random.key(1, impl="rbg"), pair.cfg, *latents.shape[2:4])
    drawn = iter(jax.tree.leaves(noise))

    def randn(shape, **_):
        field = torch.from_numpy(np.array(next(drawn)))
        assert tuple(shape) == field.shape
        return field

    fake = SimpleNamespace(**{**vars(torch), "randn": randn})
    monkeypatch.setattr(reference_file, "torch", fake)
    return (temb if pair.cfg.timestep_conditioning else []), {"noise": noise}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_encode_and_decode(case, pair, rng, monkeypatch):
    cfg, shape = CASES[case]
    p = pair(cfg)
    video = draw_video(rng, shape)
    expected = p.reference.encode(to_torch(video)).latent_dist
    mean, logvar = p.encode(video)
    assert mean.shape[1:4] == cfg.latent_shape(*shape)
    assert relative(mean, from_torch(expected.mean)) <= 1e-5
    assert relative(logvar, from_torch(expected.logvar)) <= 1e-5

    latents = from_torch(expected.mean).contiguous().numpy()
    temb, how = conditions(p, latents, monkeypatch)
    decoded = p.reference.decode(to_torch(latents), *map(torch.from_numpy, temb)).sample
    ours = p.decode(latents, *temb, **how)
    assert ours.shape[1:4] == cfg.video_shape(*latents.shape[1:4])
    assert relative(ours, from_torch(decoded)) <= 1e-5


@torch.no_grad()
def test_one_frame(pair, rng):
    p = pair(PUBLISHED)
    image = draw_video(rng, (1, 64, 64))
    expected = p.reference.encode(to_torch(image)).latent_dist
    mean, _ = p.encode(image)
    assert mean.shape == (2, 1, 2, 2, 8)
    assert relative(mean, from_torch(expected.mean)) <= 1e-5
    decoded = p.reference.decode(expected.mean).sample
    ours = p.decode(np.array(mean))
    assert ours.shape == image.shape
    assert relative(ours, from_torch(decoded)) <= 1e-5


@torch.no_grad()
def test_small_world(pair, rng):
    """The configuration that we train also runs in the reference, with the same results."""
    p = pair(SMALL_WORLD_VAE)
    video = draw_video(rng, (9, 64, 64), batch=1)
    expected = p.reference.encode(to_torch(video)).latent_dist
    mean, logvar = p.encode(video)
    assert mean.shape == (1, 2, 8, 8, 48)
    assert relative(mean, from_torch(expected.mean)) <= 1e-5
    assert relative(logvar, from_torch(expected.logvar)) <= 1e-5
    decoded = p.reference.decode(expected.mean).sample
    assert relative(p.decode(np.array(mean)), from_torch(decoded)) <= 1e-5
    assert p.reference.spatial_compression_ratio == SMALL_WORLD_VAE.spatial_ratio == 8
    assert p.reference.temporal_compression_ratio == SMALL_WORLD_VAE.temporal_ratio == 8


@pytest.mark.parametrize("case", ["published", "strided"])
@torch.no_grad()
def test_every_block(case, pair, rng):
    """Each resnet and resampler alone, on the activations that the reference gives it."""
    cfg, shape = CASES[case]
    p = pair(cfg)
    seen: list[tuple[str, dict, torch.Tensor, torch.Tensor]] = []

    def hook(module, args, kwargs, output, name=""):
        seen.append((name, kwargs, args[0], output))

    handles = [
        module.register_forward_hook(functools.partial(hook, name=name), with_kwargs=True)
        for name, module in p.reference.named_modules()
        if any(part in type(module).__name__ for part in ("Resnet", "sampler", "CausalConv"))
    ]
    p.reference.decode(p.reference.encode(to_torch(draw_video(rng, shape))).latent_dist.mean)
    for handle in handles:
        handle.remove()

    def resolve(model: nnx.Module, name: str) -> Any:
        path = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        step = lambda m, part: m[int(part)] if part.isdigit() else getattr(m, part)  # noqa: E731
        return functools.reduce(step, path.split("."), model)

    @jax.jit
    def ours(params, inputs):
        model = nnx.merge(p.graphdef, params_lib._graph_keys(params))
        calls = zip(seen, inputs, strict=True)
        return [resolve(model, name)(x, **kwargs) for (name, kwargs, *_), x in calls]

    outputs = ours(p.params, [np.array(from_torch(x)) for _, _, x, _ in seen])
    for (name, _, _, expected), output in zip(seen, outputs, strict=True):
        assert relative(output, from_torch(expected)) <= 1e-5, name
    kinds = {name.rsplit(".", 1)[0] for name, *_ in seen}
    assert len(kinds) >= 6


@pytest.mark.parametrize(
    ("mode", "causal"),
    [
        ("zeros", True),
        ("zeros", False),
        ("reflect", None),
        ("replicate", True),
        ("circular", None),
    ],
)
@torch.no_grad()
def test_padding(mode, causal, pair, rng):
    """Every padding mode. `causal` can make a configuration causal, but not the reverse."""
    base = dataclasses.replace(TWO_BLOCKS, layers_per_block=(0, 0, 0), encoder_causal=False)
    base = dataclasses.replace(base, decoder_layers_per_block=(0, 0, 0), decoder_causal=True)
    p = pair(
        dataclasses.replace(
            base, encoder_spatial_padding_mode=mode, decoder_spatial_padding_mode=mode
        )
    )
    video = draw_video(rng, (3, 16, 16), batch=1)
    expected = p.reference.encode(to_torch(video), causal=causal).latent_dist.mean
    assert relative(p.encode(video, causal=causal)[0], from_torch(expected)) <= 1e-5
    decoded = p.reference.decode(expected, causal=causal).sample
    latents = from_torch(expected).contiguous().numpy()
    assert relative(p.decode(latents, causal=causal), from_torch(decoded)) <= 1e-5


@pytest.mark.parametrize(("case", "remat"), [("strided", True), ("conditioned", False)])
def test_gradients(case, remat, pair, rng, monkeypatch):
    cfg, shape = CASES[case]
    p = pair(cfg)
    video = draw_video(rng, shape)
    size = (2, *cfg.latent_shape(*shape), cfg.latent_channels)
    draw = rng.standard_normal(size).astype(np.float32)
    temb, how = conditions(p, draw, monkeypatch)

    posterior = p.reference.encode(to_torch(video)).latent_dist
    latents = posterior.mean + posterior.std * to_torch(draw)
    decoded = p.reference.decode(latents, *map(torch.from_numpy, temb)).sample
    loss = torch.mean((decoded - 0.5) ** 2) + 0.1 * torch.mean(
        posterior.mean**2 + posterior.var - 1 - posterior.logvar
    )
    p.reference.zero_grad()
    loss.backward()

    @jax.jit
    def ours(params):
        call = functools.partial(params_lib.apply, p.graphdef, params, remat=remat)
        mean, logvar = call(jnp.asarray(video), method="encode")
        z = latents_lib.sample_posterior(mean, logvar, jnp.asarray(draw))
        times = map(jnp.asarray, temb)
        error = jnp.mean((call(z, *times, method="decode", **how) - 0.5) ** 2)
        kl = latents_lib.kl_divergence(mean, logvar)
        return error + 0.2 * jnp.mean(kl) / cfg.latent_channels

    value, grads = jax.value_and_grad(ours)(p.params)
    assert abs(float(value) - loss.item()) <= 1e-5 * abs(loss.item())
    named = keymap.export(key_table(cfg), grads)
    total = np.sqrt(sum(float((g.grad**2).sum()) for g in p.reference.parameters()))
    for name, parameter in p.reference.named_parameters():
        error = np.linalg.norm(named[name] - parameter.grad.numpy())
        # a gradient that is zero but for rounding is held to the whole
        assert error <= 1e-4 * np.linalg.norm(parameter.grad.numpy()) + 1e-6 * total, name
    assert not named["latents_mean"].any() and not named["latents_std"].any()


TILED = dataclasses.replace(TWO_BLOCKS, layers_per_block=(0, 0, 0), encoder_causal=False)
TILED = dataclasses.replace(
    TILED,
    decoder_layers_per_block=(0, 0, 0),
    decoder_causal=False,
    decoder_spatial_padding_mode="replicate",  # torch cannot reflect the tiles that are one wide
)


@pytest.mark.parametrize(
    ("shape", "settings", "framewise"),
    [
        ((3, 40, 40), (24, 24, 16, 16, 4, 2), False),  # shorter last tiles on both sides
        ((3, 24, 48), (24, 24, 16, 24, 4, 2), False),  # no overlap along the columns
        ((15, 16, 16), (512, 512, 448, 448, 6, 4), True),
        ((9, 24, 24), (16, 24, 8, 24, 4, 2), True),  # an overlap of two strides
    ],
)
@torch.no_grad()
def test_tiling(shape, settings, framewise, pair, rng):
    p = pair(TILED)
    names = [
        f"tile_sample_{part}_{axis}"
        for part, axis in itertools.product(("min", "stride"), ("height", "width"))
    ]
    names += ["tile_sample_min_num_frames", "tile_sample_stride_num_frames"]
    how = dict(zip(names, settings, strict=True))
    video = draw_video(rng, shape, batch=1)
    encode = jax.jit(functools.partial(params_lib.apply, p.graphdef, p.params, method="encode"))
    decode = jax.jit(functools.partial(params_lib.apply, p.graphdef, p.params, method="decode"))
    tiling = tiling_lib.Tiling(use_tiling=True, use_framewise=framewise, **how)
    plain = p.reference.encode(to_torch(video)).latent_dist.mean
    plain_video = p.reference.decode(plain).sample
    try:
        p.reference.enable_tiling(**how)
        p.reference.use_framewise_decoding = framewise
        expected = p.reference.encode(to_torch(video)).latent_dist
        decoded = p.reference.decode(plain).sample
    finally:
        p.reference.use_tiling = p.reference.use_framewise_decoding = False

    mean, logvar = tiling_lib.tiled_encode(encode, jnp.asarray(video), p.cfg, tiling)
    assert relative(mean, from_torch(expected.mean)) <= 1e-5
    assert relative(logvar, from_torch(expected.logvar)) <= 1e-5
    latents = jnp.asarray(from_torch(plain).contiguous().numpy())
    ours = tiling_lib.tiled_decode(decode, latents, p.cfg, tiling)
    assert ours.shape == video.shape
    assert relative(ours, from_torch(decoded)) <= 1e-5
    # the case is only worth something if tiling changes the result
    assert relative(mean, from_torch(plain)) > 1e-3
    assert relative(ours, from_torch(plain_video)) > 1e-3


@torch.no_grad()
def test_normalisation(pair, rng):
    """Encoding the first frame and decoding as the reference's pipeline does."""
    p = pair(STRIDED)
    parts = SimpleNamespace(vae=p.reference, _execution_device="cpu")
    vae = nnx.merge(p.graphdef, params_lib._graph_keys(p.params))
    image = draw_video(rng, (1, 16, 16), batch=1)
    mean, _ = p.encode(image)
    z = vae.normalise(mean)
    pixels = to_torch(image)[:, :, 0]
    expected = SanaWMPipeline._encode_first_frame(parts, pixels, "cpu", torch.float32)
    assert relative(z, from_torch(expected)) <= 1e-5
    frames = SanaWMPipeline._decode_latents(parts, to_torch(z))
    ours = p.decode(np.array(vae.denormalise(z)))
    assert relative(ours, from_torch(frames)) <= 1e-5


def test_posterior(rng):
    moments = rng.standard_normal((2, 3, 4, 4, 10)).astype(np.float32) * 30
    moments[0, 0] *= 0.01  # some within the clipping range, some beyond
    noise = rng.standard_normal((2, 3, 4, 4, 5)).astype(np.float32)
    reference = DiagonalGaussianDistribution(to_torch(moments))
    mean, logvar = jnp.split(jnp.asarray(moments), 2, axis=-1)
    expected = reference.mean + reference.std * to_torch(noise)
    ours = latents_lib.sample_posterior(mean, logvar, jnp.asarray(noise))
    assert relative(ours, from_torch(expected)) <= 1e-6
    assert relative(latents_lib.mode_posterior(mean, logvar), from_torch(reference.mode())) == 0
    kl = latents_lib.kl_divergence(mean, logvar).sum((1, 2, 3))
    assert relative(kl, reference.kl().sum(-1)) <= 1e-6


@torch.no_grad()
def test_bfloat16_is_no_worse(pair):
    """Our bfloat16 error against float32 is not larger than the reference's bfloat16 error."""
    p = pair(PUBLISHED)
    half = AutoencoderKLLTX2Video(**dataclasses.asdict(p.cfg))
    half.load_state_dict(p.reference.state_dict())
    half = half.to(torch.bfloat16).eval()
    ours, theirs = 0.0, 0.0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        latents = rng.standard_normal((1, 2, 3, 3, 8)).astype(np.float32)
        exact = from_torch(p.reference.decode(to_torch(latents)).sample)
        rounded = half.decode(to_torch(latents).bfloat16()).sample
        decoded = p.decode(jnp.asarray(latents, jnp.bfloat16))
        assert decoded.dtype == jnp.bfloat16
        theirs += relative(from_torch(rounded.float()), exact)
        ours += relative(np.asarray(decoded, np.float32), exact)
    assert ours <= theirs


def test_round_trip_is_exact(pair):
    for cfg in (CONDITIONED, STRIDED):
        p = pair(cfg)
        tensors = keymap.export(key_table(cfg), p.params)
        state = p.reference.state_dict()
        assert tensors.keys() == state.keys()
        for name, value in state.items():
            np.testing.assert_array_equal(tensors[name], value.numpy(), err_msg=name)
        _, abstract = params_lib.build(VideoVAE, cfg)
        again = keymap.load(key_table(cfg), abstract, files.Tensors(tensors), what="copy")
        jax.tree.map(np.testing.assert_array_equal, again, p.params)


@pytest.mark.parametrize(
    "change",
    [{}, {"timestep_conditioning": True, "decoder_inject_noise": True}],
    ids=["published", "conditioned"],
)
def test_full_size_names_and_shapes(change):
    cfg = VAEConfig(**change)
    _, abstract = params_lib.build(VideoVAE, cfg)
    with torch.device("meta"):
        state = AutoencoderKLLTX2Video(**change).state_dict()
    shapes = {name: np.broadcast_to(np.float32(0), t.shape) for name, t in state.items()}
    keymap.check(key_table(cfg), abstract, files.Tensors(shapes), what="reference")
    assert params_lib.count(abstract) == sum(t.numel() for t in state.values())


def test_fields_and_defaults():
    signature = inspect.signature(AutoencoderKLLTX2Video.__init__).parameters
    theirs = {k: v.default for k, v in signature.items() if k != "self"}
    assert {f.name: f.default for f in dataclasses.fields(VAEConfig)} == theirs
    with torch.device("meta"):
        reference = AutoencoderKLLTX2Video()
    assert VAEConfig().spatial_ratio == reference.spatial_compression_ratio
    assert VAEConfig().temporal_ratio == reference.temporal_compression_ratio
