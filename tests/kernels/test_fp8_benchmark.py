"""The benchmark of FP8 runs every form, and recognises FP8 products."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import fp8
from sanawm_jax.core.float8 import float8_matmul, quantise

GPU_TEXT = """
HloModule jit_f, is_scheduled=true

ENTRY %main (a: f8e4m3fn[16,32], b: f8e4m3fn[48,32], s: f32[]) -> bf16[16,48] {
  %a = f8e4m3fn[16,32]{1,0} parameter(0)
  %b = f8e4m3fn[48,32]{1,0} parameter(1)
  %s = f32[] parameter(2)
  ROOT %gemm = (bf16[16,48]{1,0}, s8[4096]{0}) custom-call(%a, %b, %s, %s), \
custom_call_target="__cublas$lt$matmul$f8", backend_config={}
}
"""


def test_every_form(capsys: pytest.CaptureFixture) -> None:
    fp8.main(["--tiny", "--repeats=1", "--only", "out", "qkv"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["form"] for line in lines] == 2 * fp8_forms()
    for line in lines:
        assert "error" not in line and line["ms"] > 0 and line["tflops"] > 0
        assert line["relative_error"] < 1e-6 or 0.01 < line["relative_error"] < 0.06
        assert (line["relative_error"] < 1e-6) == (line["form"] == "bf16")


def fp8_forms() -> list[str]:
    return list(fp8.forms(jnp.ones((16, 16))))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [18480, 300])
def test_the_product_reads_fp8(rows: int) -> None:
    """On a card, the product is in FP8, also if the number of rows is not a multiple of 16."""
    x = jax.random.normal(jax.random.key(0), (rows, 2240), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (2240, 4480), jnp.bfloat16)
    bias = jax.random.normal(jax.random.key(2), (4480,), jnp.bfloat16)
    quantised = quantise(kernel)
    compiled = jax.jit(float8_matmul).lower(x, **quantised, bias=bias).compile()
    calls, reads_fp8 = fp8.products(compiled.as_text() or "")
    assert reads_fp8, calls
    truth = x.astype(jnp.float32) @ kernel.astype(jnp.float32) + bias
    got = compiled(x, **quantised, bias=bias).astype(jnp.float32)
    assert 0.01 < jnp.linalg.norm(got - truth) / jnp.linalg.norm(truth) < 0.06


def test_what_reads_fp8() -> None:
    assert fp8.products(GPU_TEXT) == (["__cublas$lt$matmul$f8"], True)
    wide = GPU_TEXT.replace("f8e4m3fn", "bf16").replace("$f8", "")
    assert fp8.products(wide) == (["__cublas$lt$matmul"], False)
