"""The profile's counts: operations and bytes of a known program, kernels by scope, all flags."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import profile_step
from benchmarks.hlo import Program

# as XLA writes it for a GPU: a library product, fused attention, a Triton kernel, a sliced operand
GPU_TEXT = """
HloModule jit_f, is_scheduled=true

%fused (p0: f32[5,8,4], p1: s32[]) -> f32[8,4] {
  %p0 = f32[5,8,4]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,4]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,4}
  ROOT %bitcast = f32[8,4]{1,0} bitcast(%slice)
}

ENTRY %main (a: bf16[16,8], b: bf16[8,4], w: f32[5,8,4], i: s32[]) -> bf16[16,4] {
  %a = bf16[16,8]{1,0} parameter(0)
  %b = bf16[8,4]{1,0} parameter(1)
  %w = f32[5,8,4]{2,1,0} parameter(2)
  %i = s32[] parameter(3)
  %one = f32[8,4]{1,0} fusion(%w, %i), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/x"}
  %gemm = (bf16[16,4]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
metadata={op_name="jit(f)/gate/dot"}, backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %q = bf16[2,3,6,8]{3,2,1,0} bitcast(%a)
  %k = bf16[2,3,10,8]{3,2,1,0} bitcast(%a)
  %fmha = (bf16[2,3,6,8]{3,2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/attention/fmha"}
  %kernel = bf16[16,4]{1,0} custom-call(%a, %b), custom_call_target="__gpu$xla.gpu.triton", \
metadata={op_name="jit(f)/transpose(jvp(gdn))/pallas_call"}
  ROOT %copy = bf16[16,4]{0,1} copy(%kernel)
}
"""


def test_reads_a_gpu_program():
    program = Program(GPU_TEXT)
    at = program.instructions
    assert program.flops(at["gemm"]) == 2 * 16 * 4 * 8
    assert program.bytes(at["gemm"]) == 2 * (16 * 8 + 8 * 4 + 16 * 4)  # not the scratch memory
    assert program.flops(at["fmha"]) == 2 * 2 * (2 * 3 * 6 * 10 * 8)
    assert program.bytes(at["one"]) == 4 * (2 * 8 * 4) + 4  # the slice, not all five
    events = [("gemm", "k", 3e6), ("gemm", "k", 1e6), *[("fmha", "f", 5e5)] * 4]
    events += [("kernel", "t", 2.5e6), ("copy", "c", 5e5), ("one", "l", 5e5)] * 2
    events += [("", "MemcpyD2D", 7e6), ("?", "n", 5e5)]
    lines = profile_step.summarise(program, events, steps=2)
    found = {(line["part"], line["scope"]): line for line in lines}
    assert {key: line["ms"] for key, line in found.items()} == {
        ("copy", "memcpy"): 3.5,
        ("gdn", "gdn"): 2.5,
        ("gemm", "linear"): 2.0,
        ("attention", "attention"): 1.0,
        ("copy", "other"): 1.0,
        ("unattributed", "other"): 0.25,
    }
    assert found["gemm", "linear"]["flops"] == 2 * 16 * 4 * 8
    # two kernels of one name a run
    assert found["attention", "attention"]["flops"] == program.flops(at["fmha"])
    slowest = profile_step.longest(program, events, 2, 2)
    assert [line.split()[:4] for line in slowest] == [
        ["3.500", "ms", "0x", "MemcpyD2D"],
        ["2.500", "ms", "1x", "kernel"],
    ]
    h100 = profile_step.rates(found["gemm", "linear"], "NVIDIA H100 80GB HBM3")
    assert h100["tflops"] == pytest.approx(1024 / 2e-3 * 1e-12)
    assert h100["of_peak"] == pytest.approx(h100["tflops"] / 685)
    assert profile_step.rates(found["gemm", "linear"], "cpu")["of_peak"] is None


def test_counts_a_compiled_program():
    def layer(x, w):
        return jnp.tanh(x @ w), None

    def function(x, w):
        return jax.lax.scan(layer, x, w)[0]

    x, w = jnp.ones((32, 64)), jnp.ones((3, 64, 64))
    program = Program(jax.jit(function).lower(x, w).compile().as_text())
    counts = [program.flops(i) for i in program.instructions.values() if i.opcode != "dot"]
    plain = [program.flops(i) for i in program.instructions.values() if i.opcode == "dot"]
    # one product in the loop's body, alone or in one fusion
    assert max(counts + plain) == 2 * 32 * 64 * 64


@pytest.mark.parametrize(
    "flags",
    [
        [],
        pytest.param(["--backward"], marks=pytest.mark.slow),
        pytest.param(["--refiner"], marks=pytest.mark.slow),
    ],
    ids=["step", "gradients", "refiner"],
)
def test_runs_on_a_cpu(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    arguments = ["--tiny", "--repeats=1", f"--trace={tmp_path}", *flags]
    lines = profile_step.main(arguments)
    assert list(tmp_path.rglob("*.xplane.pb"))
    parts, scopes = {"gemm", "attention", "element-wise"}, {"adaln", "norm"}
    if "--refiner" not in flags:
        parts |= {"gdn", "convolution"}
        scopes |= {"ffn_conv", "short_conv", "temporal_conv", "ucpe"}
    assert parts <= {line["part"] for line in lines}
    assert scopes <= {line["scope"] for line in lines}
    assert sum(line["share"] for line in lines) == pytest.approx(1)
    captured = capsys.readouterr()
    printed = [json.loads(line) for line in captured.out.splitlines()]
    assert len(printed) == len(lines) and all(line["device"] == "cpu" for line in printed)
    assert "of limit" in captured.err
