"""A wheel also contains the configurations, inside the package, where no other name collides."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = "import setuptools.build_meta as b; print(b.build_wheel('dist'))"
# runs where only the wheel's content is on the path
USE = """
from absl import flags
from sanawm_jax.runtime.command_line import define_config, parse_flags
from sanawm_jax.runtime.shipped import CONFIGS
from sanawm_jax.sampling.cli import define_options, read_options

def sampling(*words):
    values = flags.FlagValues()
    return read_options(define_options(["sanawm-sample", *words], values), values)

values = flags.FlagValues()
argv = ["sanawm-train", "--config=small_world_refiner", "--config.steps=7"]
parse_flags(define_config(CONFIGS / "small_world.py", "", argv, values), values)
print(CONFIGS.parent.name, sampling().num_frames, sampling("--weights=a/b").num_frames)
print(sampling("--config", "sample_sana_wm").step, values.config.task, values.config.steps)
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, without the shipped weights."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    skipped = shutil.ignore_patterns("__pycache__", "assets")
    for name in ("sanawm_jax", "kernels_pallas", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    zipfile.ZipFile(source / "dist" / done.stdout.splitlines()[-1]).extractall(site)
    return site


def test_what_it_holds(site: Path) -> None:
    names = {file.stem for file in (ROOT / "configs").glob("*.py")}
    assert {file.stem for file in (site / "sanawm_jax" / "configs").glob("*.py")} == names
    sources = {f.relative_to(ROOT) for f in (ROOT / "sanawm_jax").rglob("*.py")}
    assert not [file for file in sources if not (site / file).is_file()]
    page = ROOT / "sanawm_jax" / "live"
    for file in [*page.glob("page/*"), *page.glob("scenes/*")]:
        assert (site / "sanawm_jax/live" / file.relative_to(page)).is_file(), file
    (info,) = site.glob("*.dist-info")
    tops = {folder.name for folder in site.iterdir()} - {info.name}
    assert tops == {"sanawm_jax", "kernels_pallas"}
    scripts = (info / "entry_points.txt").read_text().splitlines()
    assert {line.partition(" =")[0] for line in scripts if " = " in line} == {
        *("sanawm-sample", "sanawm-train", "sanawm-eval", "sanawm-live")
    }


def test_its_configurations_are_used(site: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "other" / "configs"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("raise ImportError('of another project')")
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{site}:{foreign.parent}"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["sanawm_jax 49 161", "60 refiner 7"]
