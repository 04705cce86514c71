"""The packages whose annotations the tests check at run time: types, and shapes by axis letters.

jaxtyping's import hook wraps every function of these modules in beartype. Outside of the tests
nothing is wrapped, so annotations cost nothing there. The hook acts on modules that are imported
after it; `tests.conftest` imports this file first.
"""

from __future__ import annotations

import sys
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

# Of the kernels, only the public modules: the bodies of Pallas kernels take references to memory,
# not arrays.
KERNELS = tuple(
    f"kernels_pallas.{name}"
    for name in (
        "attention.api",
        "attention.tpu",
        "conv_glu.api",
        "conv_glu.reference",
        "gdn.api",
        "gdn.reference",
        "ucpe.api",
        "ucpe.reference",
    )
)
CHECKED = (
    *KERNELS,
    "sanawm_jax.core",
    "sanawm_jax.vae",
    "sanawm_jax.refiner",
    "sanawm_jax.camera",
    "sanawm_jax.dit",
)
# A function with a `float` argument also takes an int, as PEP 484 says.
_CONFIGURATION = BeartypeConf(is_pep484_tower=True)


def check(item: Any) -> Any:
    """What the hook wraps the functions of these modules in.

    Constructors stay as they are. JAX builds the dataclasses that are pytrees not only with arrays:
    shapes, shardings and placeholders take the places of arrays there.
    """
    return item if item.__name__ == "__init__" else beartype(item, conf=_CONFIGURATION)


_early = [name for name in sys.modules if name.startswith(CHECKED)]
if _early:
    raise ImportError(
        f"{', '.join(_early)} were imported before the hook; import tests.shapes first"
    )
jaxtyping.install_import_hook(CHECKED, "tests.shapes.check")
