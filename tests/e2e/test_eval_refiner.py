"""python -m sanawm_jax.eval.refiner on a tiny stage 1 and a tiny refiner."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sanawm_jax.checkpoints.export import export_refiner
from sanawm_jax.checkpoints.layouts import write_refiner_index
from sanawm_jax.core.params import init
from sanawm_jax.eval import refiner as evaluation
from sanawm_jax.eval.__main__ import main as dispatch
from sanawm_jax.eval.summary import summary
from sanawm_jax.refiner.model import Refiner
from sanawm_jax.training.recipes.refiner import make_text_path, new_model
from tests.e2e.test_train_refiner import CHANNELS, make_stage1
from tests.e2e.tiny_config import get_config


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("eval")
    config = get_config("refiner")
    model = new_model(config, CHANNELS)
    make_text_path(config, ["a green house", "a yellow tree"], folder / "refiner")
    params = init(Refiner, model, jax.random.key(0))
    export_refiner(model, params, folder / "refiner" / "transformer", "bfloat16")
    write_refiner_index(folder / "refiner", config.text.length)
    return make_stage1(folder / "stage1"), folder / "refiner"


def test_table_json_and_sheet(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage1, refiner = folders
    dispatch(
        [
            *(
                "refiner",
                "--weights",
                str(stage1),
                "--refiner_weights",
                str(refiner),
                "--scenes",
                "2",
            ),
            *("--num_frames", "17", "--size", "32", "--steps", "1", "--text_length", "48"),
            *("--json", str(tmp_path / "out.json"), "--sheet", str(tmp_path / "sheet.png")),
        ]
    )
    table = json.loads((tmp_path / "out.json").read_text())
    assert table["clips"] == 2
    for stage in ("stage1", "refined"):
        found = table[stage]
        assert found["camera_following"] in (0.0, 0.5, 1.0)
        assert all(0 < v < 100 for v in found["psnr_by_quarter"])
        quarters = found["psnr_by_quarter"]
        assert found["psnr_drift"] == pytest.approx(quarters[0] - quarters[3], abs=2e-3)
        assert found["psnr"] == pytest.approx(np.mean(quarters), abs=2e-3)
        assert -1 <= found["ssim"] <= 1
    # the refiner did something
    assert table["stage1"]["psnr_by_quarter"] != table["refined"]["psnr_by_quarter"]
    # the card's table: as many cells in every row
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    assert {len(row) for row in rows} == {7} and rows[0][0].strip() == "2 clips"
    printed = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}
    assert len(printed) == 2 * (5 + 1 + 3)  # by quarter, camera following, camera errors
    found = table["refined"]
    values = [*found["psnr_by_quarter"], found["psnr"], found["psnr_drift"]]
    assert printed["PSNR, dB, refined"] == [f"{v:.2f}" for v in values]
    assert f"{table['stage1']['camera_following']:.1%}" in printed["camera following, stage 1"]
    # two clips of three rows; 7 frames of 32 pixels
    assert Image.open(tmp_path / "sheet.png").size == (7 * 32, 2 * 3 * 32)


def test_drift_is_first_minus_last_quarter() -> None:
    quarters = [[30.0, 28.0, 26.0, 24.0], [20.0, 20.0, 20.0, 18.0]]
    rows = [
        {
            "key": key,
            "nearest": nearest,
            "psnr_by_quarter": row,
            "psnr_seen_by_quarter": [*row[:3], None],  # nothing seen any more
            "rot_err_deg": row[0],
        }
        for key, nearest, row in (("w", "w", quarters[0]), ("a", "s", quarters[1]))
    ]
    rows[0]["estimator_rot_err_deg"] = 0.25
    out = summary(rows)
    assert out["psnr_by_quarter"] == [25.0, 24.0, 23.0, 21.0]
    assert out["psnr_drift"] == 4.0 and out["psnr"] == 23.25
    assert out["camera_following"] == 0.5 and out["confused"] == ["a->s"]
    assert out["psnr_seen_by_quarter"] == [25.0, 24.0, 23.0, None] and out["psnr_seen"] == 24.0
    assert out["ssim"] is None and out["cam_mc"] is None
    assert out["rot_err_deg"] == 25.0 and out["estimator_rot_err_deg"] == 0.25


def test_stage_1_alone(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dispatch(
        [
            *("small_world", "--weights", str(folders[0]), "--scenes", "2", "--num_frames", "17"),
            *("--size", "32", "--steps", "1", "--text_length", "48"),
            *("--minute", "--minute_scenes", "1", "--minute_frames", "137"),
            *("--report", str(tmp_path / "report")),
            *("--json", str(tmp_path / "out.json"), "--sheet", str(tmp_path / "sheet.png")),
        ]
    )
    table = json.loads((tmp_path / "out.json").read_text())
    assert table["clips"] == 2 and 0 < table["vae_psnr"] < 100
    assert all(0 < v for v in table["gradient_ratio_by_quarter"])
    assert all(0 < v < 100 for v in table["psnr_seen_by_quarter"])
    assert 0 < table["rot_err_deg"] < 180 and table["cam_mc"] > 0
    assert table["estimator_rot_err_deg"] < 1 < table["rot_err_deg"]
    page = (tmp_path / "report" / "index.html").read_text()
    assert all(f"<h3>{name}</h3>" in page for name in ("0", "1", "minute_0"))
    assert json.loads((tmp_path / "report" / "report.json").read_text())["table"] == table
    minute = table["minute"]
    assert minute["clips"] == 1 and minute["frames"] == 137
    assert minute["gradient_ratio_last"] > 0 and minute["saturation_ratio_last"] > 0
    assert minute["camera_following_last"] in (0, 1) and 0 < minute["revisit_psnr"] <= 100
    assert not list(tmp_path.glob("*.parts"))  # the run is complete
    assert len(table["confused"]) == 2 * (1 - table["camera_following"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["clips", "2"]
    shown = next(line for line in lines if line.startswith("PSNR, dB"))
    assert shown.split()[-4:] == [f"{v:.2f}" for v in table["psnr_by_quarter"]]
    assert Image.open(tmp_path / "sheet.png").size == (7 * 32, (2 + 1) * 2 * 32)


def test_an_unknown_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["nothing"]):
        with pytest.raises(SystemExit) as caught:
            dispatch(argv)
        assert caught.value.code == 2
        assert "one of small_world, refiner, camera" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--scenes", "0"], "--scenes=0"), (["--refiner_weights", "/nowhere"], "/nowhere")],
)
def test_bad_input_is_one_line(
    flags: list[str], words: str, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    stage1, refiner = folders
    with pytest.raises(SystemExit) as caught:
        evaluation.main(["--weights", str(stage1), "--refiner_weights", str(refiner), *flags])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
