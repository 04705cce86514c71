"""SANA-WM in JAX: one image, a prompt and a camera path become a video.

    from sanawm_jax import SanaWM

    model = SanaWM.from_pretrained("DIR or hub name")
    video = model("room.png", "a room", action="w-40,dw-20", num_frames=61)

Names are imported when first used, so that `import sanawm_jax` is quick and needs no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sanawm_jax.runtime.errors import InputError
    from sanawm_jax.sampling.generate import SanaWM, Video

__version__ = "0.1.0.dev0"
__all__ = ["InputError", "SanaWM", "Video"]

_HOMES = {
    "InputError": "sanawm_jax.runtime.errors",
    "SanaWM": "sanawm_jax.sampling.generate",
    "Video": "sanawm_jax.sampling.generate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
