"""Programs are kept from run to run, and whatever is wrong with them, the run goes on."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels_pallas import choice
from sanawm_jax.core.params import apply, build, init
from sanawm_jax.dit.feed_forward import Mlp
from sanawm_jax.runtime import kept_programs
from sanawm_jax.runtime.compilation_cache import VARIABLE
from sanawm_jax.runtime.failures import explain
from sanawm_jax.runtime.kept_programs import Kept, keep_in

X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where programs are kept during a test."""
    keep_in(tmp_path / "cache" / "programs")
    yield tmp_path / "cache" / "programs"
    keep_in(None)


class Counted:
    """A function, and how often it was traced."""

    def __init__(self, body: Callable[..., Any] | None = None):
        self.traces = 0
        self.body = body or (lambda x, factor: {"sum": jnp.sum(x) * factor, "x": jnp.tanh(x)})

    def started(self, **options: Any) -> Kept:
        """The function as a new process has it."""

        def function(x: Any, factor: Any = 2.0) -> Any:
            self.traces += 1
            return self.body(x, factor)

        return Kept(function, {"static_argnames": "factor", **options})


def check_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))


def test_a_second_run_traces_nothing(folder: Path) -> None:
    counted, x = Counted(), jnp.asarray(X)
    first = counted.started()
    expected = counted.body(x, 2.0)
    check_same(first(x), expected)
    check_same(first(x), expected)
    assert counted.traces == 1
    assert len(list(folder.iterdir())) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    second = counted.started()
    check_same(second(x), expected)
    check_same(second(x=x), expected)  # another tree of arguments
    assert counted.traces == 2
    check_same(counted.started()(x=x), expected)
    assert counted.traces == 2


def test_what_a_program_depends_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, x = Counted(), jnp.asarray(X)

    def misses(*args: Any, **options: Any) -> bool:
        before = counted.traces
        counted.started(**options)(*args)
        assert counted.traces - before in (0, 1)
        return counted.traces > before

    assert misses(x)
    assert not misses(x)
    assert misses(x, 3.0)
    assert misses(x[:1])
    assert misses(x.astype(jnp.bfloat16))
    assert misses(jax.device_put(x, jax.devices()[0]))  # where it is has been said
    assert misses(X)
    assert misses(x, donate_argnames="x")
    x = jnp.asarray(X)
    with choice.choose(gdn="xla"):
        assert misses(x)
    with jax.default_matmul_precision("bfloat16"):
        assert misses(x)
    monkeypatch.setenv(choice.VARIABLE, "gdn=xla")
    assert misses(x)
    monkeypatch.delenv(choice.VARIABLE)
    assert not misses(x)
    monkeypatch.setattr(kept_programs, "_machine", lambda: "another source")
    assert misses(x)


def test_the_source_is_part_of_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kept_programs.py"
    monkeypatch.setattr(kept_programs, "__file__", str(file))
    names = set()
    for text in ("a = 1", "a = 2"):
        file.write_text(text)
        names.add(kept_programs._machine.__wrapped__())
    assert len(names) == 2


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b + b"x"])
def test_a_damaged_file_is_written_anew(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    counted, x = Counted(), jnp.asarray(X)
    counted.started()(x)
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    check_same(counted.started()(x), counted.body(x, 2.0))
    assert counted.traces == 2
    counted.started()(x)
    assert counted.traces == 2


def test_a_program_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, x = Counted(), jnp.asarray(X)
    counted.started()(x[:1])
    (file,) = folder.iterdir()
    load = kept_programs._load
    monkeypatch.setattr(kept_programs, "_load", lambda path, tree: load(file, tree))
    check_same(counted.started()(x), counted.body(x, 2.0))
    assert counted.traces == 2


def test_no_place_to_write(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, x = Counted(), jnp.asarray(X)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(kept_programs, "atomic_write", full)
    check_same(counted.started()(x), counted.body(x, 2.0))
    assert not list(folder.iterdir())
    keep_in(folder / "file" / "under")
    (tmp_path / "taken").write_text("")
    keep_in(tmp_path / "taken")
    assert kept_programs._folder is None
    check_same(counted.started()(x), counted.body(x, 2.0))


def test_donation(folder: Path) -> None:
    counted = Counted(lambda x, factor: x * factor)
    for _ in range(2):
        x = jnp.asarray(X.copy())
        y = counted.started(donate_argnames="x")(x)
        assert x.is_deleted()
        np.testing.assert_array_equal(y, 2 * X)
    assert counted.traces == 1


def test_what_stays_with_jit(folder: Path) -> None:
    counted, x = Counted(lambda x, factor: x * factor), jnp.asarray(X)
    function = counted.started()
    np.testing.assert_array_equal(jax.jit(lambda x: function(x))(x), 2 * X)
    assert jax.eval_shape(function, x).shape == X.shape
    assert float(function(3.0)) == 6
    assert function.lower(x).compile() is not None
    with jax.debug_nans(True):
        function(x)
    with pytest.raises(TypeError):
        function(x, 2.0, 3.0)
    assert not list(folder.iterdir())


def test_a_call_out_of_the_program(folder: Path) -> None:
    """A callback is an address in this process, and LAPACK is set up where it is lowered."""
    seen: list[float] = []
    for body in (
        lambda x, factor: jax.debug.callback(lambda s: seen.append(float(s)), jnp.sum(x)),
        lambda x, factor: jnp.linalg.cholesky(x.T @ x + factor * jnp.eye(3)),
    ):
        counted = Counted(body)
        counted.started()(jnp.asarray(X))
        counted.started()(jnp.asarray(X))
        assert counted.traces == 2
    jax.effects_barrier()
    assert seen == [15.0, 15.0]
    assert not list(folder.iterdir())


def test_errors_come_through(folder: Path) -> None:
    function, x = Counted().started(), jnp.asarray(X)
    function(x)

    def fail(*_: Any) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while allocating")

    function._programs = dict.fromkeys(function._programs, fail)
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        function(x)
    assert (explain(error.value) or "").startswith("out of device memory")

    broken = Counted(lambda x, factor: x.no_such_method())
    with pytest.raises(AttributeError):
        broken.started()(x[:1])  # a file of this name would serve


class Mine(nnx.Module):
    """A module of which nobody hashed the source."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.ones((3,)))


def test_graph_definitions(folder: Path) -> None:
    def run(graphdef: Any, params: Any, x: Any) -> Any:
        return apply(graphdef, params, x)

    graphdef, _ = build(_Small, 3)
    params = init(_Small, 3, jax.random.key(0))
    with pytest.raises(kept_programs._Unkept):
        kept_programs._text(graphdef)
    with pytest.raises(kept_programs._Unkept):
        kept_programs._text(nnx.split(Mine())[0])
    plain = nnx.split(Mlp(3, 4, 3, rngs=nnx.Rngs(0)))[0]
    assert "fc1" in kept_programs._text(plain)
    Kept(run, {"static_argnames": "graphdef"})(graphdef, params, jnp.asarray(X))
    assert not list(folder.iterdir())


class _Small(Mlp):
    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, width, width, rngs=rngs)


def test_old_files_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, x = Counted(), jnp.asarray(X)
    counted.started()(x)
    (oldest,) = folder.iterdir()
    os.utime(oldest, (1, 1))
    monkeypatch.setattr(kept_programs, "MAX_BYTES", oldest.stat().st_size * 3 // 2)
    counted.started()(x, 3.0)
    (left,) = folder.iterdir()
    assert left != oldest
    os.utime(left, (1, 1))
    counted.started()(x, 3.0)
    assert left.stat().st_mtime > 1  # use is noted


def test_a_program_that_cannot_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted, x = Counted(), jnp.asarray(X)
    counted.started()(x)

    def broken(path: Path, tree: Any) -> Callable[..., Any]:
        def fail(*_: Any) -> None:
            raise jax.errors.JaxRuntimeError("NOT_FOUND: Function not found")

        return fail

    with monkeypatch.context() as patch:
        patch.setattr(kept_programs, "_load", broken)
        check_same(counted.started()(x), counted.body(x, 2.0))
    (file,) = folder.iterdir()
    assert file.read_bytes() == kept_programs._BROKEN
    check_same(counted.started()(x), counted.body(x, 2.0))
    assert file.read_bytes() == kept_programs._BROKEN  # it is not kept again
    assert counted.traces == 3


CODE = """
import os, sys, jax, jax.numpy as jnp
from sanawm_jax.runtime import compilation_cache
from sanawm_jax.runtime import kept_programs
from sanawm_jax.runtime.kept_programs import kept
traces = []
@kept(donate_argnames="x")
def function(x, w):
    traces.append(1)
    for _ in range(3):
        x = jax.nn.softmax(jnp.tanh(x @ w) * 2 + x[:, :1], -1)
    return x
if sys.argv[1] != "jit":
    compilation_cache.use_compilation_cache()
else:
    jax.config.update("jax_compilation_cache_dir", os.environ[compilation_cache.VARIABLE])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
y = function(jnp.ones((64, 64)), jnp.linspace(0, 1, 4096).reshape(64, 64))
print(len(traces), float(jnp.sum(y * y)))
jax.jit(lambda x: x * 3 + 1)(y)
"""


def test_from_process_to_process(tmp_path: Path) -> None:
    """Also where JAX's cache has the program, which cannot be written a second time."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environment = {**kept, "JAX_PLATFORMS": "cpu", VARIABLE: str(tmp_path)}

    def run(how: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", CODE, how], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    found = [run(how) for how in ("jit", "jit", "kept", "kept")]
    assert [traces for traces, _ in found] == ["1", "1", "1", "0"]
    assert len({total for _, total in found}) == 1
    assert len(list((tmp_path / "programs").iterdir())) == 1
    # what is compiled after it is JAX's to keep
    assert any("lambda" in file.name for file in tmp_path.iterdir())
