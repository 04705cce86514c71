"""Both published layouts can be loaded and exported, and no value changes."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import yaml
from diffusers import SanaWMPipeline, SanaWMTransformer3DModel
from safetensors.numpy import load_file, save_file

from sanawm_jax.checkpoints.export import export_weights
from sanawm_jax.checkpoints.layouts import DIT_FILE
from sanawm_jax.checkpoints.upstream import is_ignored, to_diffusers, upstream_table
from sanawm_jax.checkpoints.upstream_folder import open_refiner, open_stage1
from sanawm_jax.dit.config import SANA_WM_2B
from sanawm_jax.dit.keys import extra_tensors, key_table
from sanawm_jax.dit.numerics import PRESETS
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.sampling.generate import SanaWM
from sanawm_jax.weights.export import main
from tests.parity.refiner_reference import make_refiner
from tests.parity.stage1_reference import make_folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    make_folder(folder)
    main(["--weights", str(folder / "model"), "--layout=upstream", "--out", str(folder / "up")])
    return folder


def assert_equal_networks(a: Path, b: Path, *, allow_pickle: bool = False) -> None:
    first = open_stage1(a, numerics="diffusers")
    second = open_stage1(b, allow_pickle=allow_pickle, numerics="diffusers")
    assert first.schedule() == second.schedule()
    for method in ("load_dit", "load_encoder", "load_decoder"):
        config, graph, params = getattr(first, method)(None)
        other_config, other_graph, other = getattr(second, method)(None)
        assert config == other_config and graph == other_graph
        jax.tree.map(np.testing.assert_array_equal, params, other)


def test_the_released_names_are_covered() -> None:
    """The tensor names of the reference's full-size class and of upstream map one to one."""
    with torch.device("meta"):
        reference = {k: tuple(v.shape) for k, v in SanaWMTransformer3DModel().state_dict().items()}
    table = upstream_table(key_table(SANA_WM_2B), "model.")
    names = {e.source.removeprefix("model.") for e in table} | extra_tensors(SANA_WM_2B).keys()
    assert {to_diffusers(name) for name in names} == reference.keys()
    assert len(names) == len(reference) == 870
    renamed = {n for n in names if n not in reference}
    assert renamed == {f"t_embedder.mlp.{i}.{leaf}" for i in (0, 2) for leaf in ("weight", "bias")}
    assert is_ignored("pos_embed") and not is_ignored("t_embedder.mlp.0.weight")


def test_layouts_are_bit_equal_there_and_back(whole: Path, tmp_path: Path) -> None:
    assert_equal_networks(whole / "model", whole / "up")
    up = load_file(whole / "up" / "dit" / DIT_FILE)
    assert up["t_embedder.mlp.0.weight"].shape == (48, 256)
    assert up["y_embedder.y_embedding"].shape == (300, 64)
    assert export_weights(whole / "up", "diffusers", tmp_path / "back") == [tmp_path / "back"]
    reference = SanaWMPipeline.from_pretrained(tmp_path / "back").transformer.state_dict()
    original = SanaWMPipeline.from_pretrained(whole / "model").transformer.state_dict()
    assert reference.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(value, reference[name]), name
    assert_equal_networks(whole / "model", tmp_path / "back")


def test_upstream_folder_makes_a_video(whole: Path) -> None:
    """Through the whole pipeline; the text encoder is the folder's own."""
    from PIL import Image

    image = Image.new("RGB", (64, 64), (200, 30, 30))
    videos = [
        SanaWM.from_pretrained(whole / name, dtype="float32", numerics=numerics)(
            image, "a red room", action="w-8", intrinsics="60,60,32,32", num_frames=9,
            height=64, width=64, steps=2, cfg_scale=1.0, text_length=12, decode=False,
            progress=False,
        )
        for name, numerics in (("model", None), ("up", "diffusers"), ("up", None))
    ]  # fmt: skip
    np.testing.assert_array_equal(videos[0].latents, videos[1].latents)
    # unasked, upstream's layout runs as upstream's first release did
    assert np.abs(videos[0].latents - videos[2].latents).max() > 1e-6  # the camera moves little


@pytest.mark.parametrize(
    ("model", "ffn", "expected"),
    [
        ("SanaMSVideoCamCtrl_1600M_P1_D20", "GLUMBConvTemp", "release"),
        ("SanaMSVideoCamCtrl_1600M_P1_D20", "ChunkGLUMBConvTemp", "chunk_causal"),
        ("SanaMSVideoCamCtrlStreaming_1600M_P1_D20", "CachedGLUMBConvTemp", "streaming"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*chunks of frames in order")
def test_the_layout_chooses_the_numerics(
    whole: Path, tmp_path: Path, model: str, ffn: str, expected: str
) -> None:
    folder = tmp_path / "up"
    shutil.copytree(whole / "up", folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["model"] |= {"model": model, "ffn_type": ffn}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert open_stage1(folder).dit_config().numerics == PRESETS[expected]
    assert open_stage1(folder, numerics="trainer").dit_config().numerics == PRESETS["trainer"]
    assert open_stage1(whole / "model").dit_config().numerics == PRESETS["diffusers"]
    with pytest.raises(InputError, match="use one of diffusers"):
        open_stage1(folder, numerics="july")


@pytest.fixture
def distilled(whole: Path, tmp_path: Path) -> Path:
    """Upstream's distilled checkpoint: a pickle with generator, critic and optimizers."""
    folder = tmp_path / "distilled"
    shutil.copytree(whole / "up", folder, ignore=shutil.ignore_patterns("dit"))
    tensors = load_file(whole / "up" / "dit" / DIT_FILE)
    # parameters, as a module's, and one whose numbers are not in order
    state = {f"model.{k}": torch.nn.Parameter(torch.from_numpy(v)) for k, v in tensors.items()}
    key = "model.t_embedder.mlp.2.weight"
    state[key] = state[key].detach().T.contiguous().T
    (folder / "sana_dit").mkdir()
    torch.save(
        {
            "generator": state,
            "critic": {k: torch.zeros(1) for k in state},
            "optimizers": [{"step": 3, "state": torch.ones(2, dtype=torch.bfloat16)}],
        },
        folder / "sana_dit" / "model.pt",
    )
    return folder


def test_a_distilled_checkpoint_needs_the_flag(whole: Path, distilled: Path) -> None:
    assert_equal_networks(whole / "model", distilled, allow_pickle=True)
    with pytest.raises(InputError, match=r"only model\.pt, a pickle; --allow_pickle"):
        open_stage1(distilled).check("transformer")


def test_a_pickle_runs_nothing(distilled: Path, tmp_path: Path) -> None:
    file = distilled / "sana_dit" / "model.pt"
    mark = tmp_path / "mark"

    class Touch:
        def __reduce__(self) -> tuple:
            return (Path.touch, (mark,))

    for harmful in ({"generator": {"a": torch.zeros(1)}, "x": Touch()}, {"generator": Touch()}):
        torch.save(harmful, file)
        with pytest.raises(InputError, match=r"model\.pt is refused.*it names"):
            open_stage1(distilled, allow_pickle=True).check("transformer")
        assert not mark.exists()
    file.write_bytes(pickle.dumps({"generator": 1}))
    with pytest.raises(InputError, match="not a zip archive"):
        open_stage1(distilled, allow_pickle=True).check("transformer")


def test_what_is_missing_is_one_line(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "up"
    shutil.copytree(whole / "up", folder)
    file = folder / "dit" / DIT_FILE
    tensors = load_file(file)
    save_file({**tensors, "blocks.0.attn.new": np.zeros(1), "pos_embed": np.zeros(1)}, file)
    with pytest.raises(InputError, match=r"unexpected 1: blocks\.0\.attn\.new$"):
        open_stage1(folder).check("transformer")
    tensors.pop("t_embedder.mlp.0.bias")
    save_file(tensors, file)
    with pytest.raises(InputError, match=r"missing 1: t_embedder\.mlp\.0\.bias$"):
        open_stage1(folder).check("transformer")
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "vae")
    with pytest.raises(InputError, match=r"gemma-2-2b-it, which its config\.yaml names"):
        open_stage1(folder).part("text_encoder")
    with pytest.raises(InputError, match=r"has no vae/, and its config\.yaml names none"):
        open_stage1(folder).part("vae")
    (folder / "config.yaml").write_text("model: [")
    with pytest.raises(InputError, match="not valid YAML"):
        open_stage1(folder)
    with pytest.raises(InputError, match="exists already"):
        export_weights(whole / "up", "diffusers", whole / "model")


def test_refiner_layouts(tmp_path: Path) -> None:
    original = make_refiner(tmp_path / "made")
    export_weights(original, "upstream", tmp_path / "up")
    assert (tmp_path / "up" / "refiner" / "text_encoder" / "tokenizer.json").is_file()
    export_weights(tmp_path / "up", "diffusers", tmp_path / "back")
    folders = [open_refiner(tmp_path / name) for name in ("made/refiner", "up", "back")]
    for folder in folders:
        folder.check()
        params = folder.load_transformer(None)[1]
        jax.tree.map(np.testing.assert_array_equal, params, folders[0].load_transformer(None)[1])
