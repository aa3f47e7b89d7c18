"""What None stands for, by platform and operands."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic_gpu
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.mla_attention import gpu, gpu_decode
from pallas_kernels.routing import Rule
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


def test_a_grid_shares_no_axis_with_the_mesh():
  """Whose index a kernel would silently take: seen with `expert` in a training step."""
  mesh = jax.sharding.AbstractMesh((2,), ("tile",), (jax.sharding.AxisType.Auto,))
  x = jnp.zeros(128)
  with jax.sharding.use_abstract_mesh(mesh):
    with pytest.raises(ValueError, match=r"copy's grid must be named unlike .* got tile in both"):
      jax.eval_shape(lambda x: mosaic_gpu.call(None, "copy", [x], x, {"tile": 2, "row": 3}), x)


def test_what_the_gpus_kernels_refuse():
  array = lambda *shape, dtype=jnp.bfloat16: np.zeros(shape, dtype)  # noqa: E731
  head = lambda size, **kw: array(1, 2, 1, size, **kw)  # noqa: E731
  assert gpu.refused(head(192), head(128)) is None
  assert gpu.refused(head(256), head(192)) == "A + U must be at most 384, got 448"
  assert "multiple of 64, got 96" in gpu.refused(head(192), head(96))
  assert "float32" in gpu.refused(head(192, dtype=np.float32), head(128))
  assert gpu_decode.refused(head(576), array(3, 16, 576), 512) is None
  assert "W must be" in gpu_decode.refused(head(640), array(3, 16, 640), 512)
  many = Rule(8, 64, 4, "top2", "sigmoid", True, 1.0)
  assert routing_gpu.refused(many) == "n_group (64) must be at most 32 where groups are limited"
  assert routing_gpu.refused(many._replace(n_group=32)) is None
