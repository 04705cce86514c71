"""Our flags are added to the user's flags, and XLA accepts them."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import pytest

from sanawm_jax.runtime.compiler_flags import FLAGS, ON_ONE_DEVICE, options_on, use_compiler_flags
from sanawm_jax.runtime.errors import InputError


def test_the_users_flags_stay(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_allow_excess_precision=true --xla_cpu_enable_fast_math")
    use_compiler_flags()
    use_compiler_flags()
    words = os.environ["XLA_FLAGS"].split()
    assert words[:2] == ["--xla_allow_excess_precision=true", "--xla_cpu_enable_fast_math"]
    others = [name for name in FLAGS if name != "xla_allow_excess_precision"]
    assert words[2:] == [f"--{name}={FLAGS[name]}" for name in others]


def test_xla_knows_them(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    use_compiler_flags()
    assert all(name in os.environ["XLA_FLAGS"] for name in FLAGS)
    # XLA ends a process over a flag that it does not know
    code = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2", done.stderr


def test_options_of_one_gpu(monkeypatch):
    assert options_on(1) is None  # this is a CPU
    assert jax.jit(lambda x: x + 1, compiler_options=ON_ONE_DEVICE)(1) == 2  # XLA knows them
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert options_on(2) is None and options_on(1) == ON_ONE_DEVICE
    (name,) = ON_ONE_DEVICE
    monkeypatch.setenv("XLA_FLAGS", f"--{name}=true")
    assert options_on(1) == {}


def test_flags_in_a_file(monkeypatch, tmp_path):
    """XLA takes a value without a dash for the name of a file."""
    (tmp_path / "flags").write_text("--xla_cpu_enable_fast_math\n--xla_dump_to=x\n")
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    use_compiler_flags()
    words = os.environ["XLA_FLAGS"].split()
    assert words[:2] == ["--xla_cpu_enable_fast_math", "--xla_dump_to=x"]
    assert len(words) == 2 + len(FLAGS)
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "absent"))
    with pytest.raises(InputError, match="neither flags nor a file"):
        use_compiler_flags()
