"""Lists the samples in a set of zips, with their sizes, captions and scores. Uses numpy only.

    RAW/<stem>.zip                  <key>.json: width, height, prompt
    RAW/<stem>_camera.npz           ids, ranges, pose, intrinsics
    RAW/<stem>_metric_scale_stats.json, RAW/<stem><suffix>.json or .jsonl: captions, scores
    LATENTS/<stem>.zip              <key>.npz: z (C, T, h, w)

Source of the layout: NVlabs/Sana `sana_wm_zip_latent_data.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sanawm_jax.data.bad_samples import BadSampleCounter, Problem
from sanawm_jax.data.zip_members import members
from sanawm_jax.data.zip_sidecars import caption_of, find_sidecar, read_records, score_of
from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.file_names import is_companion, one_form

# Upstream's number: it regards the latents of a smaller file as incomplete.
MIN_LATENT_FILE_SIZE = 10 * 2**20
CAMERA_SUFFIX = "_camera"
SCALE_SUFFIX = "_metric_scale_stats"
PROMPT = "prompt"


@dataclasses.dataclass(frozen=True)
class Pack:
    """The two zips of one name."""

    raw: Path
    latents: Path

    @property
    def stem(self) -> Path:
        """The raw zip's path without `.zip`. Names of sidecars start with it."""
        return self.raw.with_suffix("")

    @property
    def camera(self) -> Path:
        return self.raw.with_name(f"{self.raw.stem}{CAMERA_SUFFIX}.npz")


@dataclasses.dataclass(frozen=True)
class Item:
    """One sample.

    Attributes:
      pack: number of its `Pack`.
      key: its name.
      width, height: size in pixels of the video to which the intrinsics belong.
      scale: factor that converts the translations to metres.
      captions: (text, weight) of every caption that can be drawn; at least one.
    """

    pack: int
    key: str
    width: int
    height: int
    scale: float
    captions: tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which samples of a set are used.

    Attributes:
      filters: (suffix, lowest, highest) of a score, limits included. A sample without the score is
        not used.
      captions: (suffix, weight). A sample without any of these captions uses the `prompt` of its
        JSON entry.
      min_latent_file_size: bytes of the unpacked latents; samples with fewer are not used.
    """

    filters: Sequence[tuple[str, float, float]] = ()
    captions: Sequence[tuple[str, float]] = ()
    min_latent_file_size: int = MIN_LATENT_FILE_SIZE

    def __post_init__(self) -> None:
        for suffix, low, high in self.filters:
            if not low <= high:
                raise InputError(f"data.filters: {suffix!r} has the range {low:g} to {high:g}")
        for suffix, weight in self.captions:
            if not weight > 0:
                raise InputError(f"data.captions: {suffix!r} has the weight {weight:g}")


@dataclasses.dataclass(frozen=True)
class ZipIndex:
    """All samples that are used, in order of zip and key.

    Attributes:
      packs: the zips.
      items: the samples.
      filtered: number of samples that a score excluded.
      small: number of samples whose latents are smaller than `min_latent_file_size`.
    """

    packs: tuple[Pack, ...]
    items: tuple[Item, ...]
    filtered: int = 0
    small: int = 0

    def captions(self) -> list[str]:
        """Returns all captions that can be drawn, sorted."""
        return sorted({text for item in self.items for text, _ in item.captions})

    def fingerprint(self) -> str:
        """Returns a hash of the samples' names and their order."""
        names = [[self.packs[item.pack].raw.name, item.key] for item in self.items]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


def index_zips(
    folders: Sequence[tuple[Path, Path]],
    selection: Selection,
    counter: BadSampleCounter,
) -> ZipIndex:
    """Reads the directories of all zips, and their sidecar files.

    Samples whose files are missing or damaged are skipped, logged and counted.

    Args:
      folders: (raw, latents) of each set.
      selection: which samples are used.
      counter: counts the problems.

    Raises:
      InputError: a folder has no zips, too many samples are bad, or no sample can be used.
    """
    packs, items = [], []
    filtered = small = 0
    for raw, latents in folders:
        # A name that begins with a dot is a file that a writer did not finish.
        found = sorted(f for f in raw.glob("*.zip") if not is_companion(f.name))
        if not found:
            raise InputError(f"there are no zips in {raw}")
        for file in found:
            pack = Pack(file, latents / file.name)
            kept, numbers = _index_pack(pack, len(packs), selection, counter)
            packs.append(pack)
            items += kept
            filtered, small = filtered + numbers[0], small + numbers[1]
            counter.seen += len(kept)
    counter.check()
    if not items:
        reasons = (
            f"{filtered} are outside data.filters, {small} have latents below "
            f"data.min_latent_file_size={selection.min_latent_file_size}, {counter.bad} are bad"
        )
        raise InputError(f"no sample of the zips in {folders[0][0]} can be used: {reasons}")
    return ZipIndex(tuple(packs), tuple(items), filtered, small)


def _index_pack(
    pack: Pack, number: int, selection: Selection, counter: BadSampleCounter
) -> tuple[list[Item], tuple[int, int]]:
    """Returns the samples of one zip, and the numbers of filtered and of too small ones."""

    def skip(file: Path, reason: str, samples: int = 1, key: str = "") -> None:
        counter.add(Problem(str(file), key, reason, samples))

    try:
        with zipfile.ZipFile(pack.raw) as archive:
            keys, about = _read_about(archive, pack, skip)
    except Exception as error:  # of damaged directories, zipfile raises many kinds
        skip(pack.raw, f"it is no zip that can be read ({error})")
        return [], (0, 0)
    try:
        scores = {s: _side(pack, s, score_of) for s, _, _ in selection.filters}
        texts = {s: _side(pack, s, caption_of) for s, _ in selection.captions}
        scales = _side(pack, SCALE_SUFFIX, score_of)
    except InputError as error:
        skip(pack.raw, str(error), len(keys))
        return [], (0, 0)

    kept = [
        key
        for key in keys
        if all(
            key in scores[suffix] and low <= scores[suffix][key] <= high
            for suffix, low, high in selection.filters
        )
    ]
    filtered = len(keys) - len(kept)
    sizes = _latent_sizes(pack, skip, len(kept))
    ids = None if sizes is None else _camera_ids(pack, skip, len(kept))
    if sizes is None or ids is None:
        return [], (filtered, 0)
    items, small = [], 0
    for key in kept:
        if key not in sizes:
            skip(pack.latents, "it has no latents of this sample", key=key)
        elif sizes[key] < selection.min_latent_file_size:
            small += 1
        elif key not in ids:
            skip(pack.camera, "it has no camera of this sample", key=key)
        else:
            record = about[key]
            choices = [(texts[s].get(key), w) for s, w in selection.captions]
            drawn = tuple((text, weight) for text, weight in choices if text is not None)
            drawn = drawn or ((caption_of({PROMPT: record.get(PROMPT)}) or "", 1.0),)
            size = (int(record["width"]), int(record["height"]))
            items.append(Item(number, key, *size, scales.get(key, 1.0), drawn))
    return items, (filtered, small)


def _read_about(
    archive: zipfile.ZipFile, pack: Pack, skip: Any
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    about = {}
    for key, info in sorted(members(archive, ".json").items()):
        try:
            record = json.loads(archive.read(info).decode("utf-8-sig"))
            if not (int(record["width"]) > 0 and int(record["height"]) > 0):
                raise ValueError("width and height must be positive")
            about[key] = record
        # On damaged bytes, zlib and zipfile raise their own errors.
        except Exception as error:
            skip(
                pack.raw, f"{info.filename} is damaged or lacks width and height ({error})", key=key
            )
    return list(about), about


def _side(pack: Pack, suffix: str, value_of: Any) -> dict[str, Any]:
    file = find_sidecar(pack.stem, suffix)
    if file is None:
        return {}
    values = {key: value_of(record) for key, record in read_records(file).items()}
    return {key: value for key, value in values.items() if value is not None}


def _latent_sizes(pack: Pack, skip: Any, samples: int) -> dict[str, int] | None:
    try:
        with zipfile.ZipFile(pack.latents) as archive:
            return {key: info.file_size for key, info in members(archive, ".npz").items()}
    except FileNotFoundError:
        skip(pack.latents, "there is no such file", samples)
    except Exception as error:  # see `_index_pack`
        skip(pack.latents, f"it is no zip that can be read ({error})", samples)
    return None


def _camera_ids(pack: Pack, skip: Any, samples: int) -> set[str] | None:
    try:
        with np.load(pack.camera, allow_pickle=False) as file:
            return {one_form(str(key)) for key in file["ids"]}
    except FileNotFoundError:
        skip(pack.camera, "there is no such file", samples)
    except Exception as error:  # numpy, zipfile and zlib may raise many kinds of errors
        skip(pack.camera, f"it cannot be read ({type(error).__name__}: {error})", samples)
    return None
