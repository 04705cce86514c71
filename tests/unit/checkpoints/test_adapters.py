"""LoRA files of several trainers: all names, ranks and scales give the same product of factors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sanawm_jax.checkpoints import keymap
from sanawm_jax.checkpoints.adapters import load_adapters
from sanawm_jax.core.lora import merge_lora
from sanawm_jax.core.params import Params, from_leaves
from sanawm_jax.refiner.keys import ORIGINAL_NAMES, is_no_video_layer
from sanawm_jax.runtime.errors import InputError

LAYERS, IN, OUT = 3, 6, 5
ABSTRACT = from_leaves(
    {"blocks.q.kernel": np.zeros((LAYERS, IN, OUT)), "proj_in.kernel": np.zeros((IN, OUT))}
)
TABLE = keymap.table(
    ABSTRACT,
    lambda path, index: (
        f"transformer_blocks.{index[0]}.attn1.to_q.weight" if index else "proj_in.weight"
    ),
    stacked=lambda path: int(path.startswith("blocks")),
)
MODULES = [f"transformer_blocks.{i}.attn1.to_q" for i in range(LAYERS)]
Factors = dict[str, tuple[np.ndarray, np.ndarray]]


def factors(ranks: tuple[int, ...] = (2, 2, 2)) -> Factors:
    rng = np.random.default_rng(0)
    return {
        module: (rng.normal(size=(r, IN)).astype("f4"), rng.normal(size=(OUT, r)).astype("f4"))
        for module, r in zip(MODULES, ranks, strict=True)
    }


def named(given: Factors, rename: Callable[[str], str] = str) -> dict[str, np.ndarray]:
    tensors = {}
    for module, (a, b) in given.items():
        tensors[rename(f"{module}.lora_A.weight")] = a
        tensors[rename(f"{module}.lora_B.weight")] = b
    return tensors


def products(folder: Path) -> np.ndarray:
    """What the adapters of a folder add to the kernels, (LAYERS, IN, OUT)."""
    found = load_adapters(
        folder, ABSTRACT, TABLE, skipped=is_no_video_layer, renamed=ORIGINAL_NAMES
    )
    assert found is not None
    lora, adapters = found
    base: Params = {"blocks": {"q": {"kernel": np.zeros((LAYERS, IN, OUT), np.float32)}}}
    return np.asarray(merge_lora(base, adapters, lora.scale)["blocks"]["q"]["kernel"])


def expected(given: Factors, scales: tuple[float, ...] = (1, 1, 1)) -> np.ndarray:
    rows = zip(given.values(), scales, strict=True)
    return np.stack([scale * a.T @ b.T for (a, b), scale in rows])


def write(folder: Path, tensors: dict[str, np.ndarray], name: str = "x.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, str(folder / name))
    return folder


def kohya(name: str, prefix: str = "lora_unet_") -> str:
    module, factor = re.fullmatch(r"(.*)\.lora_(A|B)\.weight", name).groups()  # pyright: ignore
    return f"{prefix}{module.replace('.', '_')}.lora_{'down' if factor == 'A' else 'up'}.weight"


SPELLINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "peft": lambda n: f"base_model.model.{n}",
    "peft of a named adapter": lambda n: n.replace(".weight", ".default.weight"),
    "diffusers": lambda n: f"transformer.{n}",
    "comfyui": lambda n: f"diffusion_model.{n}",
    "checkpoint": lambda n: f"model.diffusion_model.{n}",
    "kohya": kohya,
    "kohya of a transformer": lambda n: kohya(n, "lora_transformer_"),
    "down and up": lambda n: n.replace("lora_A", "lora_down").replace("lora_B", "lora_up"),
    "old diffusers": lambda n: n.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "older diffusers": lambda n: n.replace(".lora_A", "_lora.down").replace(".lora_B", "_lora.up"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings(spelling: str, tmp_path: Path) -> None:
    given = factors()
    write(tmp_path, named(given, SPELLINGS[spelling]), "ltx-2-my-style.safetensors")
    np.testing.assert_allclose(products(tmp_path), expected(given), atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_number_formats(dtype: str, tmp_path: Path) -> None:
    import ml_dtypes

    kind = np.float16 if dtype == "float16" else getattr(ml_dtypes, dtype)
    given = {k: (a.astype(kind), b.astype(kind)) for k, (a, b) in factors().items()}
    write(tmp_path, named(given))
    wide = {k: (a.astype("f4"), b.astype("f4")) for k, (a, b) in given.items()}
    np.testing.assert_allclose(products(tmp_path), expected(wide), atol=1e-5)


def test_mixed_ranks_and_scales(tmp_path: Path) -> None:
    given = factors((2, 4, 1))
    write(tmp_path / "a", named(given))
    np.testing.assert_allclose(products(tmp_path / "a"), expected(given), atol=1e-6)
    alphas = {f"{m}.alpha": np.array(v, np.float32) for m, v in zip(MODULES, (1, 8, 3))}  # noqa: B905
    write(tmp_path / "b", named(given) | alphas)
    scaled = expected(given, (0.5, 2, 3))
    np.testing.assert_allclose(products(tmp_path / "b"), scaled, atol=1e-5)
    flat = {f"lora_unet_{m.replace('.', '_')}.alpha": a for m, a in zip(MODULES, alphas.values())}  # noqa: B905
    write(tmp_path / "c", named(given, kohya) | flat)
    np.testing.assert_allclose(products(tmp_path / "c"), scaled, atol=1e-5)
    config = {"r": 2, "lora_alpha": 4, "rank_pattern": {"blocks.1.attn1.to_q": 4, r".*\.2\..*": 1}}
    config["alpha_pattern"] = {"transformer_blocks.1.attn1.to_q": 2}
    write(tmp_path / "d", named(given), "adapter_model.safetensors")
    (tmp_path / "d" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"does not fit rank 2"):  # PEFT's rule: after a dot
        products(tmp_path / "d")
    config["rank_pattern"] = {"transformer_blocks.1.attn1.to_q": 4, r"\w+\.2\..*": 1}
    (tmp_path / "d" / "adapter_config.json").write_text(json.dumps(config))
    np.testing.assert_allclose(products(tmp_path / "d"), expected(given, (2, 0.5, 4)), atol=1e-5)
    config = {"r": 2, "lora_alpha": 4, "use_rslora": True}
    write(tmp_path / "d", named(factors()), "adapter_model.safetensors")
    (tmp_path / "d" / "adapter_config.json").write_text(json.dumps(config))
    found = expected(factors(), (4 / 2**0.5,) * 3)
    np.testing.assert_allclose(products(tmp_path / "d"), found, atol=1e-5)


def test_some_layers_alone(tmp_path: Path) -> None:
    given = factors()
    del given[MODULES[1]]
    write(tmp_path, named(given))
    found = products(tmp_path)
    assert not found[1].any()
    np.testing.assert_allclose(found[[0, 2]], expected(given, (1, 1)), atol=1e-6)


def test_audio_and_connectors_are_left_out_with_a_note(tmp_path: Path) -> None:
    given = factors()
    a, b = given[MODULES[0]]
    others = {}
    for layer in (
        "transformer_blocks.0.audio_attn1.to_q",
        "transformer_blocks.1.video_to_audio_attn.to_k",
        "audio_patchify_proj",
        "av_ca_video_scale_shift_adaln_single.linear",
        "connectors.audio_connector.transformer_blocks.0.attn1.to_k",
        "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q",
    ):
        others |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    write(tmp_path / "a", named(given, SPELLINGS["comfyui"]) | others)
    with pytest.warns(UserWarning, match="adapters of 6 layers .* left out, and 3 are used"):
        np.testing.assert_allclose(products(tmp_path / "a"), expected(given), atol=1e-6)
    flat = {kohya(name): value for name, value in list(others.items())[:6]}
    write(tmp_path / "b", named(given, kohya) | flat)
    with pytest.warns(UserWarning, match="adapters of 3 layers"):
        np.testing.assert_allclose(products(tmp_path / "b"), expected(given), atol=1e-6)
    write(tmp_path / "c", others)
    with pytest.warns(UserWarning, match="and 0 are used"):
        assert load_adapters(tmp_path / "c", ABSTRACT, TABLE, skipped=is_no_video_layer) is None


def test_original_names(tmp_path: Path) -> None:
    (a, b), *_ = factors().values()
    tensors = {"diffusion_model.patchify_proj.lora_A.weight": a}
    write(tmp_path, tensors | {"diffusion_model.patchify_proj.lora_B.weight": b})
    found = load_adapters(tmp_path, ABSTRACT, TABLE, renamed=ORIGINAL_NAMES)
    assert found is not None and found[0].targets == ("proj_in",)
    np.testing.assert_array_equal(found[1]["proj_in"]["lora_a"], a.T)


def test_what_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    given = factors()
    a, b = given[MODULES[0]]
    whole = named(given)
    cases = {
        "layers that the base lacks: other.lora_A.weight": {"other.lora_A.weight": a},
        "lacks: .*to_q.lora_B.weight": {f"{MODULES[0]}.lora_A.weight": a},
        "LoKr": {f"{MODULES[0]}.lokr_w1": a},
        "LoHa": {f"{MODULES[0]}.hada_w1_a": a},
        "DoRA": whole | {f"{MODULES[0]}.lora_magnitude_vector.weight": a},
        "full-difference": whole | {f"{MODULES[0]}.diff": a},
        "two tensors lora_A": whole | {f"transformer.{MODULES[0]}.lora_A.weight": a},
        "does not fit rank": whole | {f"{MODULES[0]}.lora_B.weight": b[:, :1].copy()},
        "not a positive number": whole | {f"{MODULES[0]}.alpha": np.array(-1, np.float32)},
        "layers that the base lacks: .*bias": whole | {f"{MODULES[0]}.lora_B.bias": a},
    }
    for words, tensors in cases.items():
        write(tmp_path, tensors)
        with pytest.raises(InputError, match=words) as caught:
            load_adapters(tmp_path, ABSTRACT, TABLE)
        assert "\n" not in str(caught.value)
    write(tmp_path, whole, "y.safetensors")
    with pytest.raises(InputError, match="and 2 other"):
        load_adapters(tmp_path, ABSTRACT, TABLE)
