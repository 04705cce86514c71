"""Sidecar files of a raw zip: captions, scores for filters, metric scales. Uses numpy only.

Source of the layout: NVlabs/Sana `sana_wm_zip_latent_data.py`. docs/data.md has it as a table.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from sanawm_jax.runtime.errors import InputError
from sanawm_jax.runtime.file_names import by_name
from sanawm_jax.runtime.json_file import parse_json, read_json

# The fields in which a score is searched, in this order. After them, any number is the score.
SCORE_NAMES = (
    "score",
    "vmafmotion_score",
    "dover_score",
    "quality_pass",
    "entity_count",
    "unimatch_flow_score",
    "median",
)


def find_sidecar(stem: Path, suffix: str) -> Path | None:
    """Returns `<stem><suffix>.json`, else `.jsonl`, else None.

    Args:
      stem: the path of the raw zip without `.zip`.
      suffix: the end of the sidecar's name.
    """
    for end in (".json", ".jsonl"):
        file = stem.with_name(f"{stem.name}{suffix}{end}")
        if file.is_file():
            return file
    return None


def read_records(file: Path) -> dict[str, Any]:
    """Returns the record of each key in a sidecar.

    A JSON file is an object by key, or a list of objects that have a field `key`. A JSONL file has
    one object with a field `key` per line.

    Raises:
      InputError: the file cannot be read, an entry has no key, or two entries have one key.
    """
    if file.suffix == ".jsonl":
        content: Any = [parse_json(line, file) for line in _lines(file) if line.strip()]
    else:
        content = read_json(file)
    if isinstance(content, dict):
        return by_name(content.items(), file)
    if not isinstance(content, list):
        raise InputError(f"{file} holds neither an object by key nor a list of objects")
    records = []
    for number, entry in enumerate(content):
        if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
            raise InputError(f"{file}: entry {number} is no object with a key")
        records.append((entry["key"], {name: v for name, v in entry.items() if name != "key"}))
    return by_name(records, file)


def _lines(file: Path) -> list[str]:
    try:
        # `splitlines` would also cut at characters that JSON allows inside a string
        return file.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise InputError(f"cannot open {file}: {error.strerror or 'not readable'}") from error
    except ValueError as error:
        raise InputError(f"{file} is not UTF-8 text ({error})") from error


def caption_of(record: Any) -> str | None:
    """Returns the record if it is a string; of an object its `prompt`, else its first string."""
    if isinstance(record, dict):
        prompt = record.get("prompt")
        record = prompt if isinstance(prompt, str) else _first(record.values(), str)
    return record if isinstance(record, str) else None


def score_of(record: Any) -> float | None:
    """Returns the record if it is a number, the mean of a list, or a field of an object.

    The field is the first one of `SCORE_NAMES` that the object has, else any number.
    """
    if isinstance(record, dict):
        for name in (*SCORE_NAMES, *record):
            score = score_of(record.get(name)) if name in record else None
            if score is not None:
                return score
        return None
    if isinstance(record, list):
        scores = [score_of(entry) for entry in record]
        known = [score for score in scores if score is not None]
        return sum(known) / len(known) if known else None
    if isinstance(record, bool | int | float) and math.isfinite(record):
        return float(record)
    return None


def _first(values: Any, kind: type) -> Any:
    return next((value for value in values if isinstance(value, kind)), None)
