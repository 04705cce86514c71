"""The refiner's transformer, KV cache and sampler against diffusers, with weights of our loader."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import LTX2VideoTransformer3DModel, SanaWMLTX2Refiner
from diffusers.models.transformers.transformer_sana_wm_refiner import (
    SanaWMLTX2RefinerTransformer3DModel,
    SanaWMRefinerKVCache,
)
from diffusers.pipelines.sana_wm import refiner as reference_module
from diffusers.pipelines.sana_wm.refiner import STAGE_2_DISTILLED_SIGMA_VALUES, _pack_latents
from diffusers.utils.torch_utils import randn_tensor
from flax import nnx

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.files import SafetensorsFolder, read_config
from sanawm_jax.core.params import Params, apply, build, count, leaves
from sanawm_jax.refiner.config import LTX_2_19B, RefinerConfig
from sanawm_jax.refiner.keys import is_audio, refiner_table
from sanawm_jax.refiner.kv_window import KeyValue, append_block, open_window
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.refiner.rope import frame_window, rotations, video_rope
from sanawm_jax.refiner.sampler import SIGMAS, RefinerText, blocks, refine, refine_block
from sanawm_jax.sampling.refine import LTX2Refiner, RefineOptions
from tests.parity.compare import randomise, relative
from tests.parity.refiner_reference import (
    CAPTIONS,
    CHANNELS,
    TRANSFORMER,
    load_refiner,
    make_refiner,
    make_transformer,
)

ROOT = Path(__file__).parents[2]
FPS = 16.0
CPU = torch.device("cpu")
FRAMES, HEIGHT, WIDTH = 15, 2, 3  # 1 sink, 4 blocks of 3, a last one of 2
PER_FRAME = HEIGHT * WIDTH
WINDOW = 7  # 6 frames of history: trims from the third block on
ROPES = ["interleaved", "split"]


def channels_last(latents: torch.Tensor) -> np.ndarray:
    return latents.permute(0, 2, 3, 4, 1).numpy()


def load(folder: Path, dtype: Any = None) -> tuple[RefinerConfig, nnx.GraphDef, Params]:
    config = RefinerConfig.from_json(read_config(folder))
    graphdef, abstract = build(Refiner, config)
    source = SafetensorsFolder(folder)
    table = refiner_table(config)
    params = keymap.load(table, abstract, source, what="x", dtype=dtype, ignore=is_audio)
    return config, graphdef, params


def run(graphdef: nnx.GraphDef, params: Params, *args: Any, **static: Any) -> Any:
    """The compiled forward pass."""
    arrays = {name: static.pop(name) for name in ("text_mask", "window") if name in static}
    return jax.jit(functools.partial(apply, graphdef, **static))(params, *args, **arrays)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# what the reference's own refiner can run
FIELDS: dict[str, dict[str, Any]] = {
    "interleaved": {},
    "split": dict(rope_type="split"),
    "float32_rope": dict(rope_double_precision=False),
    "gated": dict(gated_attn=True, rope_type="split"),
    "affine_norms": dict(norm_elementwise_affine=True, norm_eps=1e-3),
    "no_biases": dict(attention_bias=False, attention_out_bias=False, ff_bias=False),
    "swiglu": dict(activation_fn="swiglu"),
    "geglu": dict(activation_fn="geglu"),
    "geglu_approximate": dict(activation_fn="geglu-approximate"),
    "linear_silu": dict(activation_fn="linear-silu"),
    "positions": dict(causal_offset=0, vae_scale_factors=(4, 16, 8), rope_theta=50.0),
    "one_head": dict(num_attention_heads=1, attention_head_dim=32, rope_type="split"),
    "unused": dict(perturbed_attn=True, use_keyframes_abs_pos_embedding=True),
}


@pytest.mark.parametrize("case", FIELDS)
def test_forward(case: str, tmp_path: Path) -> None:
    """The velocity with a timestep per token and a text mask."""
    model = make_transformer(**FIELDS[case])
    model.save_pretrained(tmp_path)
    config, graphdef, params = load(tmp_path)
    latents, text = draw(2, CHANNELS, 3, HEIGHT, WIDTH), draw(2, 5, config.text_width, seed=1)
    timesteps = 1000 * torch.rand(2, 3 * PER_FRAME, generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    rope = model.build_rotary_emb_for_absolute_positions(2, [4, 5, 6], HEIGHT, WIDTH, CPU, FPS)
    with torch.no_grad():
        theirs = model(_pack_latents(latents), text, timesteps, rope, mask, return_dict=False)[0]
    ours, _ = run(
        graphdef,
        params,
        channels_last(latents),
        timesteps.reshape(2, 3, PER_FRAME).numpy(),
        text.numpy(),
        frame_window(video_rope(config, 9, HEIGHT, WIDTH, FPS), 4, 3),
        text_mask=mask.numpy(),
    )
    assert relative(ours.reshape(theirs.shape), theirs) <= 1e-5


# what only LTX-2's own transformer runs: its video half, with the audio switched off
LTX_FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cross_attention_modulation": dict(cross_attn_mod=True, audio_cross_attn_mod=True),
    "of_the_video_alone": dict(cross_attn_mod=True, gated_attn=True, rope_type="split"),
    "of_the_audio_alone": dict(audio_cross_attn_mod=True),
    "static_prompt": dict(cross_attn_mod=True, use_prompt_adaln_single=False),
    "no_caption_projection": dict(use_prompt_embeddings=False, cross_attn_mod=True),
    "released_2_3": dict(
        use_prompt_embeddings=False,
        cross_attn_mod=True,
        audio_cross_attn_mod=True,
        gated_attn=True,
        audio_gated_attn=True,
        rope_type="split",
    ),
}


@pytest.mark.parametrize("case", LTX_FIELDS)
def test_forward_of_ltx2(case: str, tmp_path: Path) -> None:
    fields = {**TRANSFORMER, **LTX_FIELDS[case]}
    model: Any = randomise(LTX2VideoTransformer3DModel(**fields), 4)
    model.save_pretrained(tmp_path)
    config, graphdef, params = load(tmp_path)
    audio_text = config.text_width if config.use_prompt_embeddings else 16
    latents, text = draw(2, CHANNELS, 3, HEIGHT, WIDTH), draw(2, 5, config.text_width, seed=1)
    sigma = torch.tensor([700.0, 300.0])
    timesteps = sigma[:, None].repeat(1, 3 * PER_FRAME)
    timesteps[:, :PER_FRAME] = 0.0
    with torch.no_grad():
        theirs = model(
            hidden_states=_pack_latents(latents),
            audio_hidden_states=draw(2, 4, 4, seed=5),
            encoder_hidden_states=text,
            audio_encoder_hidden_states=draw(2, 5, audio_text, seed=6),
            timestep=timesteps,
            audio_timestep=sigma[:, None].repeat(1, 4),
            sigma=sigma,
            num_frames=3,
            height=HEIGHT,
            width=WIDTH,
            fps=FPS,
            audio_num_frames=4,
            isolate_modalities=True,
            return_dict=False,
        )[0]
    ours, _ = run(
        graphdef,
        params,
        channels_last(latents),
        timesteps.reshape(2, 3, PER_FRAME)[..., :1].numpy(),
        text.numpy(),
        video_rope(config, 3, HEIGHT, WIDTH, FPS),
    )
    assert relative(ours.reshape(theirs.shape), theirs) <= 1e-5


@pytest.mark.parametrize("fps", [16.0, 24.0])
@pytest.mark.parametrize("rope_type", ROPES)
def test_rope_at_full_size(rope_type: str, fps: float) -> None:
    """Cosines and sines of the released width at the end of a minute equal the reference's."""
    with torch.device("meta"):
        model = SanaWMLTX2RefinerTransformer3DModel(rope_type=rope_type, num_layers=0)
    theirs = model.build_rotary_emb_for_absolute_positions(1, [0, 119, 120], 4, 5, CPU, fps)
    tables = video_rope(RefinerConfig(rope_type=rope_type), 121, 4, 5, fps)
    picked = tables._replace(frames=tables.frames[[0, 119, 120]])
    for ours, reference in zip(rotations(picked, 32, 128), theirs, strict=True):
        reference = reference[0]
        if rope_type == "split":  # N T D/2
            reference = reference.swapaxes(0, 1)
        else:  # T N*D, every value twice
            reference = reference[:, 0::2].unflatten(1, (32, 64))
        assert relative(ours, reference) <= 1e-6


def test_names_and_shapes_of_the_released_transformer() -> None:
    with torch.device("meta"):
        model = SanaWMLTX2RefinerTransformer3DModel(rope_type="split")
    theirs = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    _, abstract = build(Refiner, LTX_2_19B)
    shapes = {path: leaf.shape for path, leaf in leaves(abstract)}
    ours = {}
    for entry in refiner_table(LTX_2_19B):
        shape = shapes[entry.path][len(entry.index) :]
        ours[entry.source] = shape[::-1] if entry.layout == keymap.LINEAR else shape
    assert ours == {k: v for k, v in theirs.items() if not is_audio(k)}
    # without its audio and cross-modal layers the reference still holds four tables of theirs,
    # which no line of the video's forward pass reads
    tables = [k for k in theirs if is_audio(k) and k.endswith("scale_shift_table")]
    unread = sum(model.get_parameter(k).numel() for k in tables)
    assert count(abstract) == 13_041_520_768
    assert count(abstract) + unread == 13_043_589_248


def test_an_unexpected_tensor_is_an_error() -> None:
    assert is_audio("transformer_blocks.3.audio_attn1.to_q.weight")
    for key in ("transformer_blocks.3.attn3.to_q.weight", "proj_in.audio_bias", "my_audio_x"):
        assert not is_audio(key)


@pytest.mark.parametrize("rope_type", ROPES)
def test_captured_keys_and_values_and_a_window(rope_type: str, tmp_path: Path) -> None:
    """Keys before and after rotation, and a forward pass that attends to them."""
    model = make_transformer(rope_type=rope_type)
    model.save_pretrained(tmp_path)
    config, graphdef, params = load(tmp_path)
    text = draw(1, 5, config.text_width, seed=1)
    sink, old, new = (draw(1, CHANNELS, n, HEIGHT, WIDTH, seed=n) for n in (1, 2, 3))
    cache = SanaWMRefinerKVCache(config.num_layers)

    def reference(latents: torch.Tensor, first: int, mode: str) -> torch.Tensor:
        positions = list(range(first, first + latents.shape[2]))
        rope = model.build_rotary_emb_for_absolute_positions(1, positions, HEIGHT, WIDTH, CPU, FPS)
        tokens = _pack_latents(latents)
        with torch.no_grad():
            return model(
                tokens,
                text,
                torch.full(tokens.shape[:2], 300.0),
                rope,
                kv_cache=cache,
                kv_cache_mode=mode,
                return_dict=False,
            )[0]

    def check(ours: KeyValue, theirs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for layer, pair in enumerate(theirs):
            for a, b in zip((ours.k, ours.v), pair, strict=True):
                assert relative(a[layer].reshape(b.shape), b) <= 1e-5

    layers = [cache.get(i) for i in range(config.num_layers)]
    reference(sink, 0, "capture_pre_rope")
    sink_theirs = [layer.get_captured_pre_rope() for layer in layers]
    for layer, pair in zip(layers, sink_theirs, strict=True):
        layer.store_sink(*pair)
    cache.sink_pe = model.build_rotary_emb_for_absolute_positions(1, [0], HEIGHT, WIDTH, CPU, FPS)
    reference(old, 1, "inject_and_capture_post_rope")
    old_theirs = [layer.get_captured_post_rope() for layer in layers]
    for layer, pair in zip(layers, old_theirs, strict=True):
        layer.store_history(*pair)
    theirs = reference(new, 3, "inject")

    tables = video_rope(config, 9, HEIGHT, WIDTH, FPS)

    def forward(latents: torch.Tensor, first: int, **options: Any) -> Any:
        time = np.full((1, 1, 1), 300.0, np.float32)
        rope = frame_window(tables, first, latents.shape[2])
        return run(graphdef, params, channels_last(latents), time, text.numpy(), rope, **options)

    def turn(k: jax.Array, start: Any = 0) -> jax.Array:
        return apply(graphdef, params, k, frame_window(tables, start, 1), method="turn")

    _, sink_ours = forward(sink, 0, capture=True)
    check(sink_ours, sink_theirs)
    # There is room for 4 frames of history. First none, then 2 are filled; the others are not read.
    window = open_window(sink_ours, turn, history_slots=4)
    junk = jax.tree.map(lambda a: a.at[:, :, 1:].set(1e4), window.keys)
    window = dataclasses.replace(window, keys=junk)
    _, old_ours = forward(old, 1, window=window, capture=True)
    check(old_ours, old_theirs)
    window = append_block(window, old_ours, 2, turn)
    ours, _ = forward(new, 3, window=window)
    assert relative(ours.reshape(theirs.shape), theirs) <= 1e-5


@pytest.fixture(scope="module", params=ROPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_refiner(tmp_path_factory.mktemp("refiner"), rope_type=request.param)


def reference_noise(frames: int, sink: int, block: int, seed: int) -> torch.Tensor:
    """Returns the noise that the reference draws, block by block."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [
            torch.randn(1, CHANNELS, last - first, HEIGHT, WIDTH, generator=generator)
            for first, last in blocks(frames, sink, block)
        ],
        2,
    )


def reference_clip(
    pipeline: SanaWMLTX2Refiner,
    frames: int,
    sink: int,
    block: int,
    window: int,
    *,
    seed: int = 7,
    prompt: str = CAPTIONS[0],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Stage-1 latents, noise, and the reference's result."""
    latents = draw(1, CHANNELS, frames, HEIGHT, WIDTH, seed=9)
    refined = pipeline(
        latents,
        prompt,
        fps=FPS,
        sink_size=sink,
        block_size=block,
        kv_max_frames=window,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    )
    assert relative(refined.float(), latents) > 0.3  # else nothing would be proven
    return latents, reference_noise(frames, sink, block, seed), refined


def test_a_whole_clip(folder: Path) -> None:
    """Refines from a prompt on. The KV cache becomes full, and the last block is short."""
    latents, noise, theirs = reference_clip(load_refiner(folder), FRAMES, 1, 3, WINDOW)
    programs: Any = refine_block
    before = programs._cache_size()
    refiner = LTX2Refiner.from_pretrained(
        folder, dtype="float32", options=RefineOptions(refiner_kv_max_frames=WINDOW)
    )
    ours = refiner(latents.numpy(), CAPTIONS[0], fps=FPS, noise=noise.numpy(), progress=False)
    assert relative(ours, theirs) <= 1e-4
    np.testing.assert_array_equal(ours[:, :, :1], latents[:, :, :1])
    # one program however full the window is, and one for the short block
    assert programs._cache_size() - before == 2


# (frames, sink, block, window); block 0 is all frames at once
CUTS: dict[str, tuple[int, int, int, int]] = {
    "window_of_one_block": (10, 1, 3, 4),
    "window_cuts_a_block": (13, 1, 3, 6),
    "window_never_full": (10, 1, 3, 40),
    "two_sink_frames": (14, 2, 4, 8),
    "at_once": (8, 1, 0, 0),
    "at_once_after_two": (6, 2, 0, 0),
    "shorter_than_a_block": (3, 1, 3, 7),
}


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """Ours and the reference with one text, so that only the sampler is compiled again."""
    folder = make_refiner(tmp_path_factory.mktemp("clip"), rope_type="split", num_layers=2)
    pipeline = load_refiner(folder)
    with torch.no_grad():
        text, _ = pipeline._encode_prompt(CAPTIONS[0], device=CPU, dtype=torch.float32)
    return pipeline, *load(folder / "transformer"), RefinerText(jnp.asarray(text.numpy()))


@pytest.mark.parametrize("case", CUTS)
def test_cuts(case: str, clip_model: tuple[Any, ...]) -> None:
    pipeline, config, graphdef, params, text = clip_model
    frames, sink, block, window = CUTS[case]
    whole = block or frames - sink
    latents, noise, theirs = reference_clip(
        pipeline, frames, sink, whole, window if block else frames
    )
    ours = refine(
        graphdef,
        params,
        jnp.asarray(channels_last(latents)),
        text,
        video_rope(config, frames, HEIGHT, WIDTH, FPS),
        noise=jnp.asarray(channels_last(noise)),
        sink_frames=sink,
        block_frames=block,
        window_frames=window,
        dtype=jnp.float32,
        progress=False,
    )
    assert relative(ours, channels_last(theirs)) <= 1e-4


@pytest.mark.parametrize("folder", ["split"], indirect=True)  # as released
def test_bfloat16_is_no_worse_than_the_reference(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The errors are averaged, because for one short prompt either side may be closer by chance."""

    def float32_noise(shape: Any, dtype: torch.dtype, **options: Any) -> torch.Tensor:
        return randn_tensor(shape, dtype=torch.float32, **options).to(dtype)

    # a generator gives bfloat16 other numbers than float32
    monkeypatch.setattr(reference_module, "randn_tensor", float32_noise)
    pipelines = [load_refiner(folder, dtype) for dtype in (torch.float32, torch.bfloat16)]
    refiner = LTX2Refiner.from_pretrained(
        folder, dtype="bfloat16", options=RefineOptions(refiner_kv_max_frames=WINDOW)
    )
    error = allowed = 0.0
    for prompt in (*CAPTIONS, "trees at dusk"):
        (latents, noise, exact), (_, _, theirs) = (
            reference_clip(p, 10, 1, 3, WINDOW, prompt=prompt) for p in pipelines
        )
        ours = refiner(latents.numpy(), prompt, fps=FPS, noise=noise.numpy(), progress=False)
        error += relative(ours, exact)
        allowed += relative(theirs.float(), exact)
    assert error <= 1.05 * allowed < 0.1


def test_sigmas() -> None:
    assert SIGMAS == STAGE_2_DISTILLED_SIGMA_VALUES


def test_sample_py(folder: Path, tmp_path: Path) -> None:
    """The command line: latents in, refined latents out, no stage-1 folder."""
    latents = draw(1, CHANNELS, FRAMES, HEIGHT, WIDTH, seed=9)
    np.save(tmp_path / "stage1.npy", latents.numpy())
    np.save(tmp_path / "noise.npy", reference_noise(FRAMES, 1, 3, 8).numpy())
    command = [
        *(sys.executable, "sample.py", "--latents_only", "--dtype=float32", "--fps=16"),
        *("--stage1_latents", str(tmp_path / "stage1.npy")),
        *("--refiner_latents", str(tmp_path / "noise.npy")),
        *("--refiner_weights", str(folder), "--prompt", CAPTIONS[1]),
        *("--refiner_kv_max_frames", str(WINDOW)),
        *("--save_latents", str(tmp_path / "refined.npy")),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == str(tmp_path / "refined.npy")
    pipeline: SanaWMLTX2Refiner = load_refiner(folder)
    theirs = pipeline(
        latents,
        CAPTIONS[1],
        fps=FPS,
        kv_max_frames=WINDOW,
        generator=torch.Generator().manual_seed(8),
        output_type="latent",
    )
    assert relative(np.load(tmp_path / "refined.npy"), theirs) <= 1e-4
