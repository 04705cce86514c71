"""Files beside a raw zip: captions, scores to filter by, metric scales. numpy only.

Facts of the layout: NVlabs/Sana `sana_wm_zip_latent_data.py`; docs/data.md has them in a table.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from sanawm_jax.runtime.errors import InputError

# where a score is looked for in an object, in this order; then any number
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
    """`<stem><suffix>.json`, else `.jsonl`, else None; `stem` is the raw zip without `.zip`."""
    for end in (".json", ".jsonl"):
        file = stem.with_name(f"{stem.name}{suffix}{end}")
        if file.is_file():
            return file
    return None


def read_records(file: Path) -> dict[str, Any]:
    """What a sidecar holds for each key.

    JSON is an object by key or a list of objects with a `key`; JSONL has one such object a line.

    Raises:
      InputError: unreadable, or an entry without a key.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            content: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            content = json.loads(text)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {file} as {file.suffix[1:].upper()} ({error})") from error
    if isinstance(content, dict):
        return content
    if not isinstance(content, list):
        raise InputError(f"{file} holds neither an object by key nor a list of objects")
    records = {}
    for number, entry in enumerate(content):
        if not isinstance(entry, dict) or not isinstance(entry.get("key"), str):
            raise InputError(f"{file}: entry {number} is no object with a key")
        records[entry["key"]] = {name: v for name, v in entry.items() if name != "key"}
    return records


def caption_of(record: Any) -> str | None:
    """A string, or an object's `prompt`, else its first string."""
    if isinstance(record, dict):
        prompt = record.get("prompt")
        record = prompt if isinstance(prompt, str) else _first(record.values(), str)
    return record if isinstance(record, str) else None


def score_of(record: Any) -> float | None:
    """A number; of a list the mean; of an object the first of `SCORE_NAMES`, else any number."""
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
