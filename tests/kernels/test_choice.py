"""Which implementation of a kernel runs."""

from __future__ import annotations

import jax
import pytest

from kernels_pallas import choice


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(choice, "capability", lambda: 9.0)


def test_a_cpu_runs_xla_whatever_is_asked_for(monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "gdn=pallas")
    with choice.choose(conv_glu="pallas"):
        assert all(choice.pick(kernel) == impls[0] for kernel, impls in choice.IMPLS.items())
    assert choice.pick("gdn", "pallas") == "pallas"  # a test's own words


def test_sources_in_their_order(on_gpu, monkeypatch):
    assert choice.pick("gdn") == choice.pick("gdn", "auto") == "pallas"
    monkeypatch.setenv(choice.VARIABLE, " conv_glu=pallas, gdn=xla ")
    assert (choice.pick("gdn"), choice.pick("conv_glu")) == ("xla", "pallas")
    with choice.choose(gdn="auto"):
        assert choice.pick("gdn") == "pallas"
        with choice.choose(conv_glu="xla_split"):
            assert (choice.pick("gdn"), choice.pick("conv_glu")) == ("pallas", "xla_split")
    assert choice.pick("gdn") == "xla"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("9.0", "pallas"), ("7.5", "xla"), ("gfx90a", "xla"), (None, "xla")],
)
def test_cards_without_bfloat16_run_xla(monkeypatch, capability, expected):
    class Device:
        pass

    if capability is not None:
        Device.compute_capability = capability
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    assert choice.pick("conv_glu") == expected


def test_an_override_traces_anew(on_gpu):
    traced = []

    @jax.jit
    def function(x):
        traced.append(choice.pick("gdn"))
        return x

    for _ in range(2):
        function(1.0)
        with choice.choose(gdn="xla"):
            function(1.0)
    assert traced == ["pallas", "xla"]


def test_a_partitioned_program_runs_xla(on_gpu):
    mesh = jax.sharding.AbstractMesh((2,), ("x",), (jax.sharding.AxisType.Auto,))
    with choice.choose(gdn="pallas"):
        with jax.sharding.use_abstract_mesh(mesh):
            assert choice.pick("gdn") == "xla"
        assert choice.pick("gdn") == "pallas"


@pytest.mark.parametrize("text", ["gdn", "gdn=fast", "attention=xla", "gdn=xla_split"])
def test_a_wrong_choice_names_the_right_ones(text):
    with pytest.raises(ValueError, match="use one of"):
        choice.parse(text)
