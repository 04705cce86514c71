"""The one loop of all evaluations: clips in, a row of figures per clip out.

A clip has one or more videos, each under the name of the stage that made it. Metrics are functions
of a clip and one of its videos. The row of a finished clip is on disk at once, and a run that was
killed goes on with the clips that are missing.

Axis letters: N frames, H W rows and columns.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.eval.files import write_json
from sanawm_jax.media.video import as_float
from sanawm_jax.runtime.atomic import atomic_write

_SHOWN_FRAMES = 7
Row = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """What is measured.

    Attributes:
      videos: stage -> (N, H, W, 3), in [0, 1] or bytes.
      truth: the true video of the same shape, or None.
      c2w: (N, 4, 4) commanded poses, or None.
      fps: frames per second.
      facts: what metrics of a kind of clips need besides, by name.
    """

    videos: Mapping[str, np.ndarray]
    truth: np.ndarray | None = None
    c2w: np.ndarray | None = None
    fps: float = 16.0
    facts: Mapping[str, Any] = field(default_factory=dict)


Metric = Callable[[Clip, np.ndarray], Row]  # of one video of the clip


class Store:
    """The rows and pictures of finished clips in a folder, so that a killed run can go on.

    Args:
      folder: created when the first clip is finished; None keeps everything in memory.
      settings: what the rows depend on. Rows of other settings are deleted.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]):
        self.folder = folder
        self._settings = json.loads(json.dumps(settings, default=str))
        self._rows: dict[str, Row] = {}
        self._strips: dict[str, np.ndarray] = {}
        if folder is not None and (folder / "settings.json").is_file():
            if _load(folder / "settings.json") != self._settings:
                self.remove()
            for file in (folder / "rows").glob("*.json"):
                row = _load(file)
                if row is not None:
                    self._rows[file.stem] = row

    def __contains__(self, name: str) -> bool:
        return name in self._rows

    def put(self, name: str, row: Row, strip: np.ndarray | None) -> None:
        """Keeps the row of a clip, and a picture (H, W, 3) uint8 of it."""
        if self.folder is not None:
            (self.folder / "rows").mkdir(parents=True, exist_ok=True)
            if not (self.folder / "settings.json").is_file():
                write_json(self.folder / "settings.json", self._settings)
            if strip is not None:
                _write_png(self.folder / f"{name}.png", strip)
            write_json(self.folder / "rows" / f"{name}.json", row)
        self._rows[name] = row
        if strip is not None:
            self._strips[name] = strip

    def row(self, name: str) -> Row:
        """The row of a finished clip."""
        return self._rows[name]

    def strip(self, name: str) -> np.ndarray | None:
        """The picture of a finished clip, or None if it has none."""
        if name not in self._strips and self.folder is not None:
            from PIL import Image

            file = self.folder / f"{name}.png"
            if file.is_file():
                self._strips[name] = np.asarray(Image.open(file).convert("RGB"))
        return self._strips.get(name)

    def remove(self) -> None:
        """Deletes the rows and pictures, and the folder if nothing else is in it."""
        if self.folder is None or not self.folder.is_dir():
            return
        shutil.rmtree(self.folder / "rows", ignore_errors=True)
        for file in (*self.folder.glob("*.png"), self.folder / "settings.json"):
            file.unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


def evaluate(
    names: Iterable[str],
    make: Callable[[str], Clip],
    metrics: Mapping[str, Metric],
    store: Store,
    workers: int = 1,
    label: str = "clips",
    progress: bool = True,
) -> list[Row]:
    """Measures clips.

    Args:
      names: of the clips, unique; the files of a clip have its name.
      make: makes or reads a clip; called only for those that the store does not have.
      metrics: by name; each adds its figures to the row of a stage.
      store: where rows go.
      workers: clips at a time, each in a thread.
      label: of the progress bar.
      progress: show a progress bar.

    Returns:
      One row per clip, in the order of the names: `name`, and `stages`, the figures of every video
      under the name of its stage.
    """
    from tqdm import tqdm

    names = list(names)
    missing = [name for name in names if name not in store]

    def work(name: str) -> None:
        clip = make(name)
        stages = {
            stage: {k: v for metric in metrics.values() for k, v in metric(clip, video).items()}
            for stage, video in clip.videos.items()
        }
        store.put(name, plain({"name": name, "stages": stages}), contact_strip(clip))

    done = len(names) - len(missing)
    with (
        tqdm(total=len(names), initial=done, desc=label, unit="clip", disable=not progress) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        waiting = [pool.submit(work, name) for name in missing]
        try:
            for future in waiting:
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [store.row(name) for name in names]


def contact_strip(clip: Clip, frames: int = _SHOWN_FRAMES) -> np.ndarray:
    """Some frames of the truth above those of every video: (rows * H, frames * W, 3) uint8."""
    videos = [*([] if clip.truth is None else [clip.truth]), *clip.videos.values()]
    shown = np.linspace(0, min(map(len, videos)) - 1, frames).astype(int)
    rows = [np.concatenate([as_float(video[i]) for i in shown], 1) for video in videos]
    return (np.clip(np.concatenate(rows), 0, 1) * 255).round().astype(np.uint8)


def plain(value: Any) -> Any:
    """Figures as JSON can hold them: numpy numbers and arrays become Python's, NaN becomes None."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def store_of(options: Any, outputs: Iterable[str], weights: Iterable[str | os.PathLike]) -> Store:
    """The store of a command line: beside its first output, until the run is complete.

    Args:
      options: the parsed command line; all of it but the outputs are the settings.
      outputs: names of the options that are files to write. The first that is given names the
        folder.
      weights: folders that the videos depend on; a change of their files starts the run anew.
    """
    settings = {key: value for key, value in vars(options).items() if key not in set(outputs)}
    for folder in weights:
        files = Path(folder).rglob("*") if Path(folder).is_dir() else []
        newest = max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)
        settings[f"newest file of {folder}"] = newest
    first = next((getattr(options, name) for name in outputs if getattr(options, name)), None)
    return Store(None if first is None else Path(f"{first}.parts"), settings)


def _load(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # it is measured again


def _write_png(path: Path, picture: np.ndarray) -> None:
    from PIL import Image

    with atomic_write(path) as partial:
        Image.fromarray(picture).save(partial)
