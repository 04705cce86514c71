"""`sample.py --streaming` with the shipped small world, as a person calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sanawm_jax.media.video_reader import read_mp4

ROOT = Path(__file__).parents[2]


def test_the_small_world_streams(tmp_path: Path) -> None:
    command = [sys.executable, "sample.py", "--streaming", "--no_refiner", "--action=w-24,d-24"]
    command += [f"--output_dir={tmp_path}", f"--benchmark_json={tmp_path / 'b.json'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    video = Path(done.stdout.splitlines()[-1])
    assert video == tmp_path / "sample_generated.mp4"
    assert read_mp4(video).shape == (49, 128, 128, 3)
    report = json.loads((tmp_path / "b.json").read_text())
    assert (report["chunks"], report["frames"]) == (2, 49) and report["realtime"] > 0
