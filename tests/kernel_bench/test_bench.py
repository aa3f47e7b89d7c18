"""Rows of figures: by the clock on this device, by a compiler that is not there, and their table."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich.console

from dsmoe import config as config_lib
from dsmoe.kernel_bench import bench, cases
from experiments import tiny


def _shape():
  config = tiny.get_config()
  config.model.update(hidden_size=24, moe_intermediate_size=16)
  return cases.Shape(config_lib.from_config_dict(config).model, 32, 16, 2)


def test_a_kernel_without_a_gradient_is_timed_forward():
  rows = bench.measure("permute", "small", _shape(), ["reference"], 2)
  assert [row["direction"] for row in rows] == ["forward"] and rows[0]["of_dense"] is None


def test_a_wrong_implementation_is_not_timed(monkeypatch):
  def wrong(shape):
    return lambda x_MD, pair_P, row_MK: x_MD[(pair_P + 1) % len(pair_P) // row_MK.shape[1]]

  monkeypatch.setitem(cases.IMPLEMENTATIONS["permute"], "wrong", wrong)
  (row,) = bench.measure("permute", "small", _shape(), ["wrong"], 2)
  assert "AssertionError: differs by" in row["error"]


def test_check_compares_gradients_and_integers():
  def fn(x, n):
    return jnp.tanh(x) * n.sum(), n + 1

  args = (jnp.linspace(-1, 1, 5), jnp.arange(3))
  with_gradient = bench._with_gradient(fn)
  bench.check(with_gradient, with_gradient(*args), args)
  _, others, (dx,) = with_gradient(*args)
  np.testing.assert_array_equal(others[0], [1, 2, 3])
  expected = jax.grad(lambda x: -jnp.cos(jnp.tanh(x) * 3).sum())(args[0])
  np.testing.assert_allclose(dx, expected, rtol=1e-5)
  stopped = bench._with_gradient(lambda x, n: fn(jax.lax.stop_gradient(x) + 0 * x, n))
  bench.check(lambda *a: stopped(*a)[0], with_gradient(*args)[0], args)
  with pytest.raises(AssertionError, match="differs by 1 of float32"):
    bench.check(stopped, with_gradient(*args), args)
  with pytest.raises(AssertionError, match=r"differs by 0\.25 of int32"):
    bench.check(lambda x, n: n, args[1].at[0].set(1), args)
  with pytest.raises(AssertionError, match=r"has shape \(1,\), not \(5,\)"):
    bench.check(lambda x, n: x[:1], args[0], args)
  with pytest.raises(AssertionError, match="differs by nan"):
    bench.check(lambda x, n: x * jnp.nan, args[0], args)


def test_a_case_that_cannot_be_compiled_is_a_row():
  row = bench.compile_row("v5p:2x2x1", "grouped_matmul", "tokamax", "small", _shape())
  assert row["error"] == "absent: No module named 'tokamax'"
  assert (row["kernel"], row["shape"], row["chip"]) == ("grouped_matmul", "small", "v5p")
  row = bench.compile_row("v5p:no-such", "combine", "reference", "small", _shape())
  assert row["flops"] == 128 * 24 and row["error"] and "bytes" not in row


def test_table():
  head = {"kernel": "permute", "shape": "v3"}
  rows = [
    head | {"implementation": "ours", "bytes": 2_500_000_000, "mxu_occupancy": 0.9512},
    head | {"implementation": "theirs", "bytes": 12, "mxu_occupancy": None},
    head | {"implementation": "absent", "error": "absent: it"},
  ]
  out = io.StringIO()
  rich.console.Console(file=out, width=200).print(bench.table(rows))
  text = out.getvalue()
  assert "2,500" in text and "0.951" in text and "1.2e-05" in text
  assert "absent" not in text and "GFLOP" not in text
