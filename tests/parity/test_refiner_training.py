"""Training the refiner against PyTorch: gradients of the whole objective, and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers import transformer_sana_wm_refiner as reference_module
from diffusers.pipelines.sana_wm import refiner as reference_pipeline
from diffusers.pipelines.sana_wm.refiner import _pack_latents
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.adapters import load_adapters, save_adapters
from sanawm_jax.checkpoints.export import export_refiner, export_weights
from sanawm_jax.checkpoints.layouts import write_refiner_index
from sanawm_jax.checkpoints.refiner_folder import RefinerFolder
from sanawm_jax.core.lora import LoraConfig, build_adapted, combine, init_adapters
from sanawm_jax.core.params import Params, apply, build, init
from sanawm_jax.refiner.keys import is_audio, refiner_table
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.refiner.rope import video_rope
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.refine import LTX2Refiner
from sanawm_jax.training.objectives import refiner_flow as flow
from sanawm_jax.training.recipes.refiner import make_text_path, new_model
from tests.e2e.tiny_config import get_config
from tests.parity.compare import relative
from tests.parity.refiner_reference import CHANNELS, load_refiner, make_refiner, make_transformer
from tests.parity.test_refiner import FPS, channels_last, draw, load

CPU = torch.device("cpu")
HEIGHT, WIDTH, BATCH = 2, 3, 2
S = 0.909375
SIGMA = torch.tensor([0.3, 0.8])
TARGETS = (r"blocks\.attn\.(q|k|v)",)


def reference_loss(
    model: torch.nn.Module,
    context: torch.Tensor,
    stage1: torch.Tensor,
    truth: torch.Tensor,
    noise: torch.Tensor,
    text: torch.Tensor,
    positions: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> torch.Tensor:
    """Computes the published loss with the reference's module, which predicts v.

    The clean prediction is computed as in the sampler, and the v of the published loss from it.
    """
    sigma = SIGMA[:, None, None, None, None]
    first = (1 - S) * stage1 + S * noise
    noisy = (1 - sigma / S) * truth + sigma / S * first
    tokens = _pack_latents(torch.cat([context, noisy], 2))
    given = context.shape[2] * HEIGHT * WIDTH
    times = (1000 * SIGMA)[:, None].repeat(1, tokens.shape[1])
    times[:, :given] = 0.0
    attend = reference_module.dispatch_attention_fn

    def masked(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        if key.shape[1] == tokens.shape[1]:  # self-attention: given tokens see each other alone
            mask = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool)
            mask[:given, given:] = False
            options["attn_mask"] = mask
        return attend(query, key, value, **options)

    with monkeypatch.context() as patch:
        patch.setattr(reference_module, "dispatch_attention_fn", masked)
        rope = model.build_rotary_emb_for_absolute_positions(
            BATCH, positions, HEIGHT, WIDTH, CPU, FPS
        )
        velocity = model(tokens, text, times, rope, return_dict=False)[0][:, given:]
    velocity = velocity.unflatten(1, (-1, HEIGHT, WIDTH)).permute(0, 4, 1, 2, 3)
    clean = noisy - sigma * velocity
    return torch.mean(((noisy - clean) / sigma - (first - truth) / S) ** 2)


@pytest.mark.parametrize("variant", ["clip", "clip_without_sink", "stream"])
def test_gradients(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient of every parameter of the video half."""
    model = make_transformer(rope_type="split" if variant == "stream" else "interleaved")
    model.save_pretrained(tmp_path)
    config, graphdef, params = load(tmp_path)
    text = draw(BATCH, 5, config.text_width, seed=1)
    if variant == "stream":
        layout = flow.chunk_layouts(13)[-1]  # frames 0, 4..9 and 10..12
        context_frames, positions = list(layout.context), [*layout.context, *layout.current]
        whole = [draw(BATCH, CHANNELS, 13, HEIGHT, WIDTH, seed=s) for s in (2, 3, 4)]
        stage1, truth, noise = (a[:, :, list(layout.current)] for a in whole)
        context = whole[1][:, :, context_frames]
    else:
        sink = 0 if variant == "clip_without_sink" else 1
        positions = list(range(4))
        whole = [draw(BATCH, CHANNELS, 4, HEIGHT, WIDTH, seed=s) for s in (2, 3, 4)]
        stage1, truth, noise = (a[:, :, sink:] for a in whole)
        context = whole[0][:, :, :sink]
    theirs = reference_loss(model, context, stage1, truth, noise, text, positions, monkeypatch)
    theirs.backward()

    rope = video_rope(config, 13, HEIGHT, WIDTH, FPS)
    sigma = jnp.asarray(SIGMA.numpy())
    if variant == "stream":
        arrays = [channels_last(a) for a in (context, stage1, truth, noise)]
        sequence = flow.stream_sequence(*map(jnp.asarray, arrays), sigma, jnp.array(positions))
    else:
        arrays = [channels_last(a) for a in whole]
        sequence = flow.clip_sequence(*map(jnp.asarray, arrays), sigma, sink_frames=sink)

    def loss(params: Params) -> jax.Array:
        return flow.sequence_loss(graphdef, params, sequence, jnp.asarray(text.numpy()), rope)

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(theirs.item(), rel=1e-5)
    table = refiner_table(config)
    ours = keymap.export(table, gradient)
    reference = {k: p.grad for k, p in model.named_parameters() if not is_audio(k)}
    assert ours.keys() == reference.keys()
    bad = {k: e for k in ours if (e := relative(ours[k], _grad(reference[k], ours[k]))) > 1e-3}
    assert not bad, bad
    assert all(np.abs(v).max() > 0 for v in ours.values())


def _grad(reference: torch.Tensor | None, like: np.ndarray) -> torch.Tensor:
    return torch.zeros(like.shape) if reference is None else reference


def adapted_folder(tmp_path: Path, alpha: float | None, rank: int = 3) -> tuple[Any, ...]:
    """A refiner folder of the reference and adapters for it, whose B is not zero."""
    folder = make_refiner(tmp_path)
    refiner = RefinerFolder(folder)
    lora = LoraConfig(rank, TARGETS, alpha)
    _, abstract = build_adapted(Refiner, refiner.config, lora)
    fresh = init_adapters(abstract, jax.random.key(1))
    adapters = jax.tree.map(
        lambda a: a + 0.2 * jax.random.normal(jax.random.key(2), a.shape), fresh
    )
    return folder, refiner, lora, adapters


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_saved_adapters_on_the_reference_s_module(alpha: float | None, tmp_path: Path) -> None:
    """Exported adapters, merged into the PyTorch model by PEFT's names, give our result."""
    folder, refiner, lora, adapters = adapted_folder(tmp_path, alpha)
    config = refiner.config
    save_adapters(folder / "lora", adapters, lora, refiner_table(config), base=str(folder))

    facts = json.loads((folder / "lora" / "adapter_config.json").read_text())
    tensors = load_file(folder / "lora" / "adapter_model.safetensors")
    assert facts["r"] == 3 and facts["lora_alpha"] == (alpha or 3)
    assert facts["base_model_name_or_path"] == str(folder)
    model = make_transformer()
    names = {
        n for n, _ in model.named_modules() if f"base_model.model.{n}.lora_A.weight" in tensors
    }
    assert names == {f"transformer_blocks.{i}.attn1.to_{p}" for i in range(3) for p in "qkv"}
    assert len(tensors) == 2 * len(names)
    for name in names:
        a, b = (tensors[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert a.shape == (3, 32) and b.shape == (32, 3)
        with torch.no_grad():
            model.get_submodule(name).weight += facts["lora_alpha"] / facts["r"] * (b @ a)

    latents, text = draw(1, CHANNELS, 3, HEIGHT, WIDTH), draw(1, 5, config.text_width, seed=1)
    times = torch.full((1, 3 * HEIGHT * WIDTH), 400.0)
    rope = model.build_rotary_emb_for_absolute_positions(1, [0, 1, 2], HEIGHT, WIDTH, CPU, FPS)
    with torch.no_grad():
        theirs = model(_pack_latents(latents), text, times, rope, return_dict=False)[0]

    def forward(graphdef: Any, params: Params) -> jax.Array:
        return jax.jit(lambda p, *args: apply(graphdef, p, *args)[0])(
            params,
            jnp.asarray(channels_last(latents)),
            jnp.full((1, 1, 1), 400.0),
            jnp.asarray(text.numpy()),
            video_rope(config, 3, HEIGHT, WIDTH, FPS),
        ).reshape(theirs.shape)

    merged = forward(*RefinerFolder(folder).load_transformer(None))
    assert relative(merged, theirs) <= 1e-5
    # the folder of adapters alone names its base
    alone = forward(*RefinerFolder(folder / "lora").load_transformer(None))
    np.testing.assert_array_equal(alone, merged)
    # not merged, as training runs them
    graphdef, base = RefinerFolder(folder).load_base(None)
    adapted, _ = build_adapted(Refiner, config, lora)
    assert relative(forward(adapted, combine(base, adapters)), theirs) <= 1e-5
    assert relative(forward(graphdef, base), theirs) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_export_of_adapters_is_one_merged_folder(dtype: str, tmp_path: Path) -> None:
    folder, refiner, lora, adapters = adapted_folder(tmp_path, 6.0)
    levels, scheduler = [0.5, 0.2, 0.0], folder / "scheduler" / "scheduler_config.json"
    facts = {**json.loads(scheduler.read_text()), "distilled_sigmas": levels}
    scheduler.write_text(json.dumps(facts))
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = {k: v.to(getattr(torch, dtype)) for k, v in load_file(file).items()}
    save_file(tensors, file)
    alone = tmp_path / "adapters"
    save_adapters(alone, adapters, lora, refiner_table(refiner.config), base=str(folder))

    assert export_weights(alone, "diffusers", tmp_path / "out") == [tmp_path / "out"]
    merged = RefinerFolder(tmp_path / "out")
    merged.check()
    assert merged.lora is None and merged.sigmas == tuple(levels)
    written = load_file(next((tmp_path / "out" / "transformer").glob("*.safetensors")))
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {
        k: (v.shape, v.dtype) for k, v in tensors.items()
    }
    changed = {k.rpartition(".")[0] for k, v in written.items() if not v.equal(tensors[k])}
    assert changed == {f"transformer_blocks.{i}.attn1.to_{p}" for i in range(3) for p in "qkv"}
    ours, theirs = (f.load_transformer(None)[1] for f in (merged, RefinerFolder(alone)))
    bits = 1e-6 if dtype == "float32" else 2**-8  # a product may round the other way
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=bits, atol=1e-6), ours, theirs)


def test_adapters_come_back_and_in_diffusers_names(tmp_path: Path) -> None:
    _, refiner, lora, adapters = adapted_folder(tmp_path, 6.0)
    abstract, table = build(Refiner, refiner.config)[1], refiner_table(refiner.config)
    save_adapters(tmp_path / "peft", adapters, lora, table)
    found, back = load_adapters(tmp_path / "peft", abstract, table)
    assert (found.rank, found.alpha, found.scale) == (3, 6.0, 2.0)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    assert jax.tree.structure(build_adapted(Refiner, refiner.config, found)[1]) == (
        jax.tree.structure(back)
    )

    # as diffusers' `save_lora_adapter` names them, without a configuration: alpha is the rank
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "theirs").mkdir()
    renamed = {k.replace("base_model.model.", "transformer."): v for k, v in tensors.items()}
    file = tmp_path / "theirs" / "pytorch_lora_weights.safetensors"
    save_file(renamed, file)
    found, back = load_adapters(tmp_path / "theirs", abstract, table)
    assert (found.rank, found.scale) == (3, 1.0)
    jax.tree.map(np.testing.assert_array_equal, back, adapters)
    # alpha in the metadata, where diffusers keeps it
    facts = json.dumps({"transformer.r": 3, "transformer.lora_alpha": 12})
    save_file(renamed, file, metadata={"format": "pt", "lora_adapter_metadata": facts})
    assert load_adapters(tmp_path / "theirs", abstract, table)[0].scale == 4.0


def test_peft_loads_the_file(tmp_path: Path) -> None:
    """If PEFT is installed, diffusers' own loader reads the adapters and alpha."""
    pytest.importorskip("peft")
    _, refiner, lora, adapters = adapted_folder(tmp_path, 1.5)
    save_adapters(tmp_path / "peft", adapters, lora, refiner_table(refiner.config))
    model = make_transformer()
    model.load_lora_adapter(
        str(tmp_path / "peft"), weight_name="adapter_model.safetensors", prefix="base_model.model"
    )
    adapted = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert len(adapted) == 9 and not any("audio" in n for n in adapted)
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as file:
        a, b = (
            file.get_tensor(f"base_model.model.transformer_blocks.1.attn1.to_k.lora_{x}.weight")
            for x in "AB"
        )
    layer = model.get_submodule("transformer_blocks.1.attn1.to_k")
    x = draw(4, 32)
    with torch.no_grad():
        delta = layer(x) - layer.base_layer(x)
    assert relative(0.5 * x @ a.T @ b.T, delta) <= 1e-5


def rename(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {k.replace(old, new): v for k, v in tensors.items()}


BROKEN: dict[str, tuple[Any, dict[str, Any], str]] = {
    "rank": (None, dict(r=4), "does not fit rank 4"),
    "dora": (None, dict(use_dora=True), "use_dora=True is not supported"),
    "layer": (lambda t: rename(t, "attn1.to_q", "attn3.to_q"), {}, "layers that the base lacks"),
    "half": (
        lambda t: {k: v for k, v in t.items() if "blocks.1.attn1.to_q.lora_A" not in k},
        {},
        "lacks: transformer_blocks.1.attn1.to_q.lora_A.weight",
    ),
    "width": (
        lambda t: {k: v[:, :16].clone() if "lora_A" in k else v for k, v in t.items()},
        {},
        r"does not fit rank 3 on the base's 32 to 32 channels",
    ),
    "empty": (lambda t: {}, {}, "holds no tensors"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, refiner, lora, adapters = adapted_folder(tmp_path_factory.mktemp("good"), None)
    save_adapters(folder / "lora", adapters, lora, refiner_table(refiner.config))
    RefinerFolder(folder).check()
    return folder


@pytest.mark.parametrize("case", BROKEN)
def test_adapters_that_do_not_fit_are_one_line(case: str, good: Path) -> None:
    """Sampling finds the problem in its first check, before anything is compiled."""
    change, facts, words = BROKEN[case]
    weights, config = (
        good / "lora" / n for n in ("adapter_model.safetensors", "adapter_config.json")
    )
    before = weights.read_bytes(), config.read_text()
    try:
        if change:
            save_file(change(load_file(weights)), weights)
        config.write_text(json.dumps({**json.loads(before[1]), **facts}))
        with pytest.raises(InputError, match=words) as caught:
            RefinerFolder(good).check()
        assert "\n" not in str(caught.value)
    finally:
        weights.write_bytes(before[0])
        config.write_text(before[1])


def test_adapters_alone_without_a_base_are_one_line(good: Path) -> None:
    with pytest.raises(InputError, match="names no base_model_name_or_path"):
        RefinerFolder(good / "lora")


def test_the_reference_runs_an_exported_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exported folder of a training run: its text path, its weights, and a refined clip."""
    config = get_config("refiner")
    config.export_dtype = "float32"
    model = new_model(config, CHANNELS)
    make_text_path(config, ["a green house", "a yellow tree by the lake"], tmp_path)
    params = init(Refiner, model, jax.random.key(0))
    export_refiner(model, params, tmp_path / "transformer", "float32")
    write_refiner_index(tmp_path, config.text.length)

    noises = [draw(1, CHANNELS, 3, HEIGHT, WIDTH, seed=s) for s in (6, 7)]
    queue = iter(noises)
    monkeypatch.setattr(reference_pipeline, "randn_tensor", lambda *args, **options: next(queue))
    clip, prompt = draw(1, CHANNELS, 7, HEIGHT, WIDTH, seed=5), "a green tree"
    theirs = load_refiner(tmp_path)(clip, prompt, fps=FPS, output_type="latent")
    ours = LTX2Refiner.from_pretrained(tmp_path, dtype="float32")(
        clip.numpy(), prompt, fps=FPS, noise=torch.cat(noises, 2).numpy(), progress=False
    )
    assert relative(ours, theirs) <= 1e-4
