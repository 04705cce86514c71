"""The start scenes of the small world: pictures of its renderer, with their captions."""

from __future__ import annotations

import importlib.resources
import io
import json

from PIL import Image

from sanawm_jax.live.engine import Scene


def shipped_scenes() -> list[Scene]:
    """Reads `scenes/`, which `python -m sanawm_jax.live.shelf` writes."""
    folder = importlib.resources.files("sanawm_jax.live") / "scenes"
    scenes = []
    for about in json.loads((folder / "scenes.json").read_text()):
        picture = Image.open(io.BytesIO((folder / f"{about['name']}.png").read_bytes()))
        intrinsics = ",".join(map(str, about["intrinsics"]))
        scenes.append(Scene(about["name"], about["title"], picture, about["prompt"], intrinsics))
    return scenes


def write_scenes() -> None:
    """Renders scenes that the small world was not trained on."""
    from pathlib import Path

    from sanawm_jax.small_world.clip import HELD_OUT_SEED, make_clip

    folder = Path(__file__).parent / "scenes"
    folder.mkdir(exist_ok=True)
    abouts = []
    for number, (offset, title) in enumerate(_SCENES.items(), 1):
        clip = make_clip(HELD_OUT_SEED + offset, num_frames=9)
        name = f"scene{number}"
        Image.fromarray(clip["video"][0]).save(folder / f"{name}.png", optimize=True)
        abouts.append(
            {
                "name": name,
                "title": title,
                "prompt": clip["caption"],
                "intrinsics": [round(float(v), 3) for v in clip["intrinsics"]],
            }
        )
    (folder / "scenes.json").write_text(json.dumps(abouts, indent=1) + "\n")


# offset of the seed from the first one that is held out, and the title
_SCENES = {
    2: "Pink evening",
    4: "Blue room",
    7: "Yellow street",
    11: "Magenta room",
    13: "Sunny corner",
    15: "Purple houses",
}

if __name__ == "__main__":
    write_scenes()
