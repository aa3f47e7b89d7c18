"""What None stands for, by platform and operands."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.mla_attention import api as mla
from pallas_kernels.mla_attention import gpu, gpu_decode
from pallas_kernels.routing import Rule
from pallas_kernels.routing import api as routing
from pallas_kernels.routing import gpu as routing_gpu


def _on(monkeypatch, backend, capability=None):
  device = types.SimpleNamespace(compute_capability=capability)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "devices", lambda: [device])


@pytest.mark.parametrize(
  "backend, capability, refused, expected",
  [
    ("cpu", None, None, "xla"),
    ("tpu", None, None, "mosaic_tpu"),
    ("tpu", None, "too wide", "mosaic_tpu"),
    ("gpu", "9.0", None, "mosaic_gpu"),
    ("gpu", "9.0", "too wide", "xla"),
    ("gpu", "8.0", None, "xla"),  # A100
    ("gpu", "10.0", None, "xla"),  # B200
  ],
)
def test_by_platform(monkeypatch, backend, capability, refused, expected):
  _on(monkeypatch, backend, capability)
  assert mosaic_gpu.default(refused, "xla") == expected


def test_experts_by_sizes_and_dtype(monkeypatch):
  _on(monkeypatch, "gpu", "9.0")
  named = lambda *args: grouped_matmul.chosen(None, grouped_gpu.refused(*args))  # noqa: E731
  assert named(jnp.bfloat16, 256, 384) == "mosaic_gpu"
  assert named(jnp.float32, 256, 384) == named(jnp.bfloat16, 192, 384) == "ragged_dot"
  assert grouped_matmul.chosen("blocked", "anything") == "blocked"
  _on(monkeypatch, "cpu")
  assert grouped_matmul.chosen(None) == "blocked"


def _stub(monkeypatch, table, *names):
  """Lets implementations of a table only say who they are."""
  for name in names:
    monkeypatch.setitem(table, name, lambda *args, name=name: name)


@pytest.mark.parametrize(
  "dtype, attention, experts",
  [(jnp.bfloat16, "mosaic_gpu", "mosaic_gpu"), (jnp.float16, "mosaic_gpu", "mosaic_gpu")]
  + [(jnp.float32, "xla", "ragged_dot")],
)
def test_the_apis_ask_their_kernels(monkeypatch, dtype, attention, experts):
  """float32 has no kernel: XLA's forms instead of an error."""
  _on(monkeypatch, "gpu", "9.0")
  E, D, F, P = 2, 128, 256, 6
  x, w, sizes = jnp.zeros((P, D), dtype), jnp.zeros((E, D, F), dtype), jnp.array([2, 4])
  _stub(monkeypatch, grouped_matmul.IMPLEMENTATIONS, "mosaic_gpu", "ragged_dot")
  swiglu = (x, jnp.zeros(P), w, w, w.swapaxes(1, 2), sizes)
  assert grouped_matmul.grouped_swiglu(*swiglu) == experts
  _stub(monkeypatch, mla.DECODE_IMPLEMENTATIONS, "mosaic_gpu", "xla")
  monkeypatch.setattr(mla.cpu, "causal_attention", lambda *args: "xla")
  _stub(monkeypatch, mla.CAUSAL_IMPLEMENTATIONS, "mosaic_gpu")
  if dtype != jnp.float16:  # which attention's own rules leave out
    q, v = jnp.zeros((1, 2, 3, 192), dtype), jnp.zeros((1, 2, 3, 128), dtype)
    assert mla.causal_attention(q, q, v, None, 1.0) == attention
    q, pages, table = jnp.zeros((1, 2, 3, 576), dtype), jnp.zeros((4, 16, 576), dtype), [[0, 1]]
    args = (q, pages, jnp.array(table), jnp.array([[3, 4]]), 1.0, 512)
    assert mla.decode_attention(*args) == attention


@pytest.mark.parametrize("groups, expected", [(32, "reference"), (16, "mosaic_gpu")])
def test_routing_asks_its_kernel(monkeypatch, groups, expected):
  _on(monkeypatch, "gpu", "9.0")
  _stub(monkeypatch, routing.IMPLEMENTATIONS, "mosaic_gpu", "reference")
  rule = Rule(2, groups, 4, "top2", "sigmoid", True, 1.0)
  assert routing.route(jnp.zeros((3, 64)), None, rule) == expected


def test_a_grid_shares_no_axis_with_the_mesh():
  """Whose index a kernel would silently take: seen with `expert` in a training step."""
  mesh = jax.sharding.AbstractMesh((2,), ("tile",), (jax.sharding.AxisType.Auto,))
  x = jnp.zeros(128)
  with jax.sharding.use_abstract_mesh(mesh):
    with pytest.raises(ValueError, match=r"copy's grid must be named unlike .* got tile"):
      jax.eval_shape(lambda x: mosaic_gpu.call(None, "copy", [x], x, {"tile": 2, "row": 3}), x)


def test_what_the_gpus_kernels_refuse():
  array = lambda *shape, dtype=jnp.bfloat16: np.zeros(shape, dtype)  # noqa: E731
  head = lambda size, **kw: array(1, 2, 1, size, **kw)  # noqa: E731
  assert gpu.refused(head(192), head(128)) is None
  assert "must take at most 231424 bytes on chip, got 245760" in gpu.refused(head(256), head(64))
  assert "multiple of 64, at most 256, got 320" in gpu.refused(head(320), head(64))
  assert "multiple of 64, at most 256, got 96" in gpu.refused(head(192), head(96))
  assert "D must be" in grouped_gpu.refused(jnp.bfloat16, 2**16, 384)
  assert "float32" in gpu.refused(head(192, dtype=np.float32), head(128))
  assert gpu_decode.refused(head(576), array(3, 16, 576), 512) is None
  assert "W must be" in gpu_decode.refused(head(640), array(3, 16, 640), 512)
  many = Rule(8, 64, 4, "top2", "sigmoid", True, 1.0)
  assert routing_gpu.refused(many) == "n_group (64) must be at most 31 where groups are limited"
  assert routing_gpu.refused(many._replace(n_group=31)) is None
