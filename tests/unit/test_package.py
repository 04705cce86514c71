"""The public names of the package, its imports, and the direction of the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sanawm_jax

ROOT = Path(__file__).parents[2]
REFERENCE = {"torch", "diffusers", "transformers"}
SOURCES = [
    Path("sample.py"),
    Path("train.py"),
    *sorted(
        file.relative_to(ROOT)
        for place in ("sanawm_jax", "kernels_pallas", "configs", "benchmarks")
        for file in (ROOT / place).rglob("*.py")
    ),
]
NUMPY_ONLY = {("sanawm_jax", "camera"), ("sanawm_jax", "media")}
# imported where they are used, so that what does not need them runs without them
INSIDE_FUNCTIONS = {"av", "gradio", "qwix", "tensorflow_datasets"}
# Every module of the package, by its folder or by its own name, which counts for more. A module may
# import from its own layer and from the ones above it, never from one below.
LAYERS = (
    {"runtime"},
    {"camera", "core", "media", "memory.program_pieces", "memory.programs", "memory.streaming"},
    {
        "checkpoints.adapter_names",
        "checkpoints.adapters",
        "checkpoints.copies",
        "checkpoints.files",
        "checkpoints.keymap",
        "checkpoints.torch_file",
        "checkpoints.upstream",
        "checkpoints.writer",
        "sampling.schedule",
    },
    {"dit", "text", "vae"},
    {"refiner"},
    {"checkpoints", "data", "memory", "sampling", "small_world"},
    {
        "eval",
        "live",
        "small_world.latent_pool",
        "small_world.rollouts",
        "small_world.timed_run",
        "small_world.train_dit",
        "small_world.train_vae",
        "training",
    },
)
# programs: run as `python -m` and imported by nothing
COMMANDS = {Path("sanawm_jax/weights/export.py"), Path("sanawm_jax/weights/random_init.py")}
# what users import, by lazy imports from any layer; and the empty file of the programs' folder
NO_LAYER = {*COMMANDS, Path("sanawm_jax/__init__.py"), Path("sanawm_jax/weights/__init__.py")}
DEPTH = {box: depth for depth, layer in enumerate(LAYERS) for box in layer}

# a fresh interpreter in which the reference cannot be imported, whatever is installed
BLOCK = """
import importlib, runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "diffusers", "transformers"}:
            raise ImportError(f"{name} is for tests only")

sys.meta_path.insert(0, Refuse())
"""


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCK + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def module_name(file: Path) -> str:
    return ".".join(file.with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path) -> Iterator[tuple[str, bool]]:
    """Yields the dotted names that a file imports, and whether only a function imports them."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name, id(node) in inside) for name in names)


def depth(parts: list[str]) -> int | None:
    """Returns the layer of a module by its path; the longest matching name in `LAYERS` decides."""
    return DEPTH.get(".".join(parts[:2]), DEPTH.get(parts[0]))


def layer_of(file: Path) -> int | None:
    return depth(module_name(file).split(".")[1:])


def is_allowed(file: Path, name: str, is_inside: bool) -> bool:
    top, *rest = name.split(".")
    if top in REFERENCE and is_inside and file.parts[0] == "benchmarks":
        return True  # what it is compared with
    if top in REFERENCE | {"tests"}:
        return False
    if top == "sanawm_jax" and file.parts[0] == "kernels_pallas":
        return False
    if top in {"jax", "flax"} and file.parts[:2] in NUMPY_ONLY:
        return False
    if top in INSIDE_FUNCTIONS and not is_inside:
        return file.name == "builder.py"  # itself imported inside functions
    if any(name.startswith(module_name(command)) for command in COMMANDS):
        return False
    if file in NO_LAYER:
        return True
    if top == "sanawm_jax" and rest and file.parts[0] == "sanawm_jax":
        theirs, ours = depth(rest), layer_of(file)
        return theirs is not None and ours is not None and theirs <= ours
    return True


def test_direction_of_imports() -> None:
    """Kernels import only JAX, cameras and images only NumPy, and only tests the reference."""
    offenders = [
        f"{file} imports {name}"
        for file in SOURCES
        for name, is_inside in imports(file)
        if not is_allowed(file, name, is_inside)
    ]
    assert not offenders
    boxes = {file.parts[1] for file in SOURCES if len(file.parts) > 2}
    assert {"camera", "core", "dit", "media", "sampling", "vae"} <= boxes  # files were found


def test_every_module_has_a_layer() -> None:
    ours = {file for file in SOURCES if file.parts[0] == "sanawm_jax"} - NO_LAYER
    assert [str(file) for file in sorted(ours) if layer_of(file) is None] == []
    names = {".".join(file.with_suffix("").parts[1:]) for file in ours}
    names |= {name.removesuffix(".__init__") for name in names}
    assert DEPTH.keys() - names == set()  # nothing is listed that is gone
    assert len(DEPTH) == sum(map(len, LAYERS))  # nor twice


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("sanawm_jax/unlisted/model.py", "sanawm_jax.core.layers"),
        ("sanawm_jax/unlisted.py", "sanawm_jax.core.layers"),
        ("sanawm_jax/training/export.py", "sanawm_jax.unlisted"),
        ("sanawm_jax/dit/model.py", "torch.nn"),
        ("kernels_pallas/gdn/reference.py", "sanawm_jax.core"),
        ("sanawm_jax/camera/rays.py", "jax.numpy"),
        ("sanawm_jax/media/video.py", "av"),
        ("sanawm_jax/core/layers.py", "sanawm_jax.dit.model"),
        ("benchmarks/stage1.py", "torch"),
        ("sanawm_jax/checkpoints/export.py", "sanawm_jax.weights.export.main"),
    ],
)
def test_a_wrong_direction_is_noticed(file: str, name: str) -> None:
    assert not is_allowed(Path(file), name, False)


def test_cameras_and_pictures_load_no_jax() -> None:
    names = [module_name(file) for file in SOURCES if file.parts[:2] in NUMPY_ONLY]
    done = run_python(
        f"for name in {names}: importlib.import_module(name)\n"
        "assert not {'jax', 'flax'} & sys.modules.keys()"
    )
    assert done.returncode == 0, done.stderr


def test_every_module_imports_without_the_reference() -> None:
    names = [module_name(f) for f in SOURCES if f.parts[0] in ("sanawm_jax", "kernels_pallas")]
    done = run_python(f"for name in {names}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["sample.py", "train.py"])
def test_help_needs_no_reference(script: str) -> None:
    done = run_python(
        f"sys.argv = [{script!r}, '--help']\nrunpy.run_path({script!r}, run_name='__main__')"
    )
    assert done.returncode in (0, 1), done.stderr  # absl exits with 1 after its help
    assert "--config" in done.stdout and "Traceback" not in done.stderr, done.stderr


def test_public_names_are_there_and_lazy() -> None:
    done = run_python(
        "import sanawm_jax\n"
        "assert not {'jax', 'flax', 'numpy'} & sys.modules.keys()\n"
        "from sanawm_jax import SanaWM\n"
        "assert SanaWM.from_pretrained and 'jax' in sys.modules"
    )
    assert done.returncode == 0, done.stderr
    for name in sanawm_jax.__all__:
        assert name in dir(sanawm_jax) and getattr(sanawm_jax, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sanawm_jax.nothing  # noqa: B018
