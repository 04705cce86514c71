"""Bad input to the refiner gives one clear line, before anything is compiled or loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.refine import LTX2Refiner, RefineOptions
from tests.parity.refiner_reference import CHANNELS, make_refiner
from tests.sample_tiny import sample

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_refiner(tmp_path_factory.mktemp("refiner"))


def clip(frames: int = 4, channels: int = CHANNELS) -> np.ndarray:
    return np.zeros((1, channels, frames, 2, 3), np.float32)


def check(folder: Path, **over: Any) -> None:
    """What the command does before it loads anything."""
    given: dict[str, Any] = dict(latents=clip(), prompt="a room", noise=None, options={})
    given |= over
    refiner = LTX2Refiner.from_pretrained(
        folder, dtype="float32", options=RefineOptions(**given["options"])
    )
    refiner.check(given["latents"].shape, given["prompt"], given["noise"])


def not_finite() -> np.ndarray:
    noise = clip(3)
    noise[0, 0, 1] = np.nan
    return noise


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "channels": (dict(latents=clip(channels=5)), "5 channels, the refiner takes 6"),
    "one_frame": (dict(latents=clip(1)), "latents have 1 frames"),
    "frames": (dict(latents=clip(2), options=dict(sink_size=2)), "latents have 2 frames"),
    "window": (dict(options=dict(refiner_kv_max_frames=3)), "kv_max_frames=3 .* 4 or more"),
    "window_2": (
        dict(options=dict(sink_size=2, refiner_block_size=10)),
        "kv_max_frames=11 .* 12 or more",
    ),
    "no_sink": (dict(options=dict(sink_size=0)), "sink_size=0"),
    "block": (dict(options=dict(refiner_block_size=-1)), "refiner_block_size=-1"),
    "noise_shape": (dict(noise=clip(4)), r"refiner noise have shape .* needs \(1, 6, 3, 2, 3\)"),
    "noise_not_finite": (dict(noise=not_finite()), "refiner noise hold NaN"),
    "noise_file": (dict(noise="nowhere.npy"), "refiner noise: cannot open nowhere.npy"),
    "no_prompt": (dict(prompt=None), "no prompt"),
    "blank_prompt": (dict(prompt=" \n"), "no prompt"),
}


@pytest.mark.parametrize("name", CASES)
def test_input(name: str, folder: Path) -> None:
    overrides, words = CASES[name]
    with pytest.raises(InputError, match=words) as caught:
        check(folder, **overrides)
    assert "\n" not in str(caught.value)


def test_good_input_is_good(folder: Path) -> None:
    check(folder, noise=clip(3))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# part, fields of its configuration that change, words of the message
FOLDERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a_stage_1_transformer": (
        "transformer/config.json",
        dict(_class_name="SanaWMTransformer3DModel"),
        "is a SanaWMTransformer3DModel, not SanaWMLTX2Refiner",
    ),
    "other_connectors": ("connectors/config.json", dict(_class_name="Other"), "is a Other"),
    "unknown_field": ("transformer/config.json", dict(new_field=1), "unknown fields new_field"),
    "patches": ("transformer/config.json", dict(patch_size=2), "patch_size=2"),
    "rope": ("transformer/config.json", dict(rope_type="3d"), "rope_type='3d'"),
    "qk_norm": ("transformer/config.json", dict(qk_norm="layer_norm"), "qk_norm"),
    "activation": ("transformer/config.json", dict(activation_fn="relu"), "activation_fn='relu'"),
    "text_width": ("transformer/config.json", dict(caption_channels=20), "not of one model"),
    "layers": ("transformer/config.json", dict(num_layers=4), r"missing .*transformer_blocks\.3"),
    "gates": ("transformer/config.json", dict(gated_attn=True), "missing .*to_gate_logits"),
    "states": ("connectors/config.json", dict(text_proj_in_factor=5), "text_proj_in_factor is 5"),
    "heads": (
        "connectors/config.json",
        dict(video_connector_attention_head_dim=8),
        "caption_channels=24 must be the 16",
    ),
    "text_encoder": ("text_encoder/config.json", dict(model_type="t5"), "model_type='t5'"),
    "shift": ("scheduler/scheduler_config.json", dict(shift=3.0), "shift=1"),
    "length": ("model_index.json", dict(text_max_sequence_length=18), "multiple of"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder(name: str, folder: Path, tmp_path: Path) -> None:
    file, fields, words = FOLDERS[name]
    copy = shutil.copytree(folder, tmp_path / "copy")
    edit(copy / file, **fields)
    with pytest.raises(InputError, match=words) as caught:
        check(copy)
    assert "\n" not in str(caught.value)


def test_folder_without_a_part(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.rmtree(copy / "connectors")
    with pytest.raises(InputError, match="lacks connectors"):
        check(copy)
    index = json.loads((copy / "model_index.json").read_text())
    del index["connectors"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="has no connectors/; is it a refiner folder"):
        check(copy)


def test_an_unexpected_tensor(folder: Path, tmp_path: Path) -> None:
    """Audio is skipped by name; nothing else is."""
    from safetensors.numpy import load_file, save_file

    copy = shutil.copytree(folder, tmp_path / "copy")
    file = next((copy / "transformer").glob("*.safetensors"))
    save_file({**load_file(file), "proj_in.lora_A.weight": np.ones(2, np.float32)}, file)
    with pytest.raises(InputError, match=r"unexpected 1: proj_in\.lora_A\.weight"):
        check(copy)


def arguments(folder: Path, out: Path, **flags: Any) -> list[str]:
    given = {"refiner_weights": folder, "save_latents": out / "x.npy", "prompt": "a room", **flags}
    return ["--latents_only", *(f"--{k}={v}" for k, v in given.items())]


def test_the_command_exits_with_2(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", clip(1))
    flags = arguments(folder, tmp_path, stage1_latents=tmp_path / "latents.npy")
    done = subprocess.run(
        [sys.executable, "sample.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: latents have 1 frames"), done.stderr
    assert not (tmp_path / "x.npy").exists()


def test_no_refiner_wins(tmp_path: Path) -> None:
    flags = [
        "--no_refiner",
        *arguments(tmp_path / "no_such_refiner", tmp_path),
        "--weights=no/such/w",
    ]
    done = subprocess.run(
        [sys.executable, "sample.py", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "weights no/such/w is neither" in done.stderr, done.stderr


def test_the_refiner_alone_needs_a_prompt_and_no_weights(folder: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", clip())
    given: dict[str, Any] = dict(
        stage1_latents=str(tmp_path / "latents.npy"),
        save_latents=str(tmp_path / "out.npy"),
        latents_only=True,
    )
    with pytest.raises(InputError, match="no prompt"):
        sample(**given, refiner_weights=str(folder))
    with pytest.raises(InputError, match="no weights"):
        sample(**{**given, "latents_only": False})  # decoding needs stage 1's VAE
    with pytest.raises(InputError, match="neither a folder nor a hub name"):
        sample(**given, refiner_weights="no/such/folder", prompt="a room")
