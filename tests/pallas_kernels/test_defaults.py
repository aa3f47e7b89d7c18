"""What None stands for, by platform and operands."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsmoe import config as config_lib
from dsmoe.model import routing as model_routing
from experiments import tiny
from pallas_kernels import mosaic_gpu, permute, platform
from pallas_kernels import quantized_matmul as quantized
from pallas_kernels.grouped_matmul import api as grouped_matmul
from pallas_kernels.grouped_matmul import gpu as grouped_gpu
from pallas_kernels.mla_attention import api as mla
from pallas_kernels.mla_attention import gpu, gpu_decode, tpu, tpu_decode
from pallas_kernels.permute import tpu as permute_tpu
from pallas_kernels.quantized_matmul import experts as quantized_experts
from pallas_kernels.routing import Rule
from pallas_kernels.routing import api as routing
from pallas_kernels.routing import gpu as routing_gpu
from pallas_kernels.routing import tpu as routing_tpu
from tests.pallas_kernels.topologies import compile_for, tpu_devices


def _on(monkeypatch, backend, kind=None):
  """Pretends that a chip is attached: a TPU's device kind, or a GPU's compute capability."""
  device = types.SimpleNamespace(device_kind=kind, compute_capability=kind)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "devices", lambda: [device])


@pytest.mark.parametrize(
  "backend, kind, kernels",
  [
    ("cpu", None, None),
    ("tpu", "TPU v5", "mosaic_tpu"),  # v5p
    ("tpu", "TPU v5p", "mosaic_tpu"),
    ("tpu", "TPU v6 lite", "mosaic_tpu"),  # v6e
    ("tpu", "TPU v6e", "mosaic_tpu"),
    ("tpu", "TPU7x", "mosaic_tpu"),
    ("tpu", "TPU v4", None),
    ("tpu", "TPU v5 lite", None),  # v5e
    ("gpu", "9.0", "mosaic_gpu"),  # H100, H200
    ("gpu", "8.0", None),  # A100
    ("gpu", "10.0", None),  # B200
  ],
)
def test_compiled_kernels_are_the_default_on_the_chips_they_were_compiled_for(
  monkeypatch, backend, kind, kernels
):
  _on(monkeypatch, backend, kind)
  names = ("xla", "mosaic_tpu", "mosaic_gpu")
  assert platform.compiled_kernels() == kernels
  assert platform.choose(None, names, "xla") == (kernels or "xla")
  takes, refuses = (lambda: None), (lambda: "too wide")
  assert platform.choose(None, names, "xla", {"mosaic_tpu": takes, "mosaic_gpu": takes}) == (
    kernels or "xla"
  )
  assert (
    platform.choose(None, names, "xla", {"mosaic_tpu": refuses, "mosaic_gpu": refuses}) == "xla"
  )
  # A named one is what its caller asked for; an operation may lack a kernel.
  assert platform.choose("mosaic_gpu", names, "xla", {"mosaic_gpu": refuses}) == "mosaic_gpu"
  assert platform.choose(None, ("xla",), "xla") == "xla"


@pytest.mark.parametrize(
  "name, capability, kernels, otherwise",
  [("tpu", None, "mosaic_tpu", "ragged_dot"), ("gpu", "9.0", "mosaic_gpu", "ragged_dot")],
)
def test_a_chip_that_is_not_attached_decides_while_programs_are_traced_for_it(
  name, capability, kernels, otherwise
):
  kind = "TPU v5" if name == "tpu" else "NVIDIA H100 80GB HBM3"
  device = types.SimpleNamespace(platform=name, device_kind=kind, compute_capability=capability)
  narrow = grouped_matmul.refusals(jnp.float16, 200, 200)
  assert platform.compiled_kernels() is None and grouped_matmul.chosen(None) == "blocked"
  with platform.tracing_for(device):
    assert platform.compiled_kernels() == grouped_matmul.chosen(None) == kernels
    assert grouped_matmul.chosen(None, narrow) == otherwise
    assert platform.device_kind() == kind
  assert platform.compiled_kernels() is None and grouped_matmul.chosen(None) == "blocked"


@pytest.mark.parametrize(
  "topology, kind", [("v5p:2x2x1", "TPU v5"), ("v6e:2x2", "TPU v6 lite"), ("tpu7x:2x2x1", "TPU7x")]
)
@pytest.mark.tpu
def test_the_names_of_tpus_are_those_that_jax_gives(topology, kind):
  assert tpu_devices(topology)[0].device_kind == kind
  assert kind in platform.TPU_KINDS


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match="must be one of xla, mosaic_tpu, got 'fastest'"):
    platform.choose("fastest", ("xla", "mosaic_tpu"), "xla")


def test_experts_by_sizes_and_dtype(monkeypatch):
  _on(monkeypatch, "gpu", "9.0")
  named = lambda *args: grouped_matmul.chosen(None, grouped_matmul.refusals(*args))  # noqa: E731
  assert named(jnp.bfloat16, 256, 384) == "mosaic_gpu"
  assert named(jnp.float32, 256, 384) == named(jnp.bfloat16, 192, 384) == "ragged_dot"
  assert grouped_matmul.chosen("blocked", {"mosaic_gpu": lambda: "anything"}) == "blocked"
  _on(monkeypatch, "cpu")
  assert grouped_matmul.chosen(None) == "blocked"
  _on(monkeypatch, "tpu", "TPU v5")
  assert named(jnp.bfloat16, 192, 96) == named(jnp.float32, 7168, 2048, 4096) == "mosaic_tpu"
  assert named(jnp.float16, 256, 384) == named(jnp.bfloat16, 2**15, 384) == "ragged_dot"
  assert named(jnp.bfloat16, 7168, 18432, 4096) == "ragged_dot"  # a tile of 512 rows
  assert named(jnp.bfloat16, 7168, 18432, 128) == "mosaic_tpu"


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


@pytest.mark.parametrize("experts, expected", [(1025, "reference"), (1024, "mosaic_tpu")])
def test_routing_asks_the_tpus_kernel(monkeypatch, experts, expected):
  _on(monkeypatch, "tpu", "TPU7x")
  rule = Rule(2, 1, 1, "top2", "sigmoid", True, 1.0)
  assert routing.chosen(None, experts, rule) == expected


def test_permute_and_fp8_by_width_and_dtype(monkeypatch):
  _on(monkeypatch, "gpu", "9.0")
  assert permute.chosen(None, jnp.bfloat16, 256) == "mosaic_gpu"
  assert permute.chosen(None, jnp.bfloat16, 192) == "reference"
  fp8 = lambda *args: quantized.chosen(None, quantized_experts.refusals(*args))  # noqa: E731
  assert fp8(jnp.bfloat16, 192, 100) == "mosaic_gpu"  # padded to whole tiles
  assert fp8(jnp.bfloat16, 2**16, 100) == "xla"
  _on(monkeypatch, "tpu", "TPU v6 lite")
  assert permute.chosen(None, jnp.float32, 40) == "mosaic_tpu"
  assert permute.chosen(None, jnp.float16, 256) == "reference"
  assert fp8(jnp.bfloat16, 192, 100) == "mosaic_tpu"
  assert fp8(jnp.bfloat16, 192, 2**15) == fp8(jnp.bfloat16, 2**15, 192) == "xla"


def test_a_grid_shares_no_axis_with_the_mesh():
  """Whose index a kernel would silently take: seen with `expert` in a training step."""
  mesh = jax.sharding.AbstractMesh((2,), ("tile",), (jax.sharding.AxisType.Auto,))
  x = jnp.zeros(128)
  with jax.sharding.use_abstract_mesh(mesh):
    with pytest.raises(ValueError, match=r"the grid of copy must not have names of .*, got tile"):
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


def test_what_the_tpus_kernels_refuse():
  array = lambda *shape, dtype=jnp.bfloat16: np.zeros(shape, dtype)  # noqa: E731
  head = lambda size: array(1, 2, 1, size)  # noqa: E731
  assert tpu.refused(head(192), head(128)) is None
  assert tpu.refused(head(320), head(128)) == "A must be at most 256, got 320"
  assert tpu.refused(head(192), head(512)) == "U must be at most 256, got 512"
  table = lambda pages: array(1, pages, dtype=np.int32)  # noqa: E731
  assert tpu_decode.refused(array(3, 16, 640), table(2**17)) is None
  assert "a multiple of 8 tokens, got 12" in tpu_decode.refused(array(3, 12, 640), table(4))
  assert "at most 131072 entries" in tpu_decode.refused(array(3, 16, 640), table(2**17 + 1))
  assert routing_tpu.refused(1025) == "mosaic_tpu takes at most 1024 experts, got 1025"
  assert permute_tpu.refused(jnp.float16, 256) == "rows must be bfloat16 or float32, got float16"
  with pytest.raises(ValueError, match="at most 1024 experts, got 1025"):
    rule = Rule(2, 1, 1, "top2", "sigmoid", True, 1.0)
    routing_tpu.route(np.zeros((3, 1025), np.float32), None, rule)


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2x1", "tpu7x:2x2x1"])
def test_what_none_stands_for_compiles_at_the_widths_of_experiments_tiny(monkeypatch, topology):
  """In float32, with widths that are no multiples of 128: values and gradients of every kernel."""
  monkeypatch.setattr(platform, "compiled_kernels", lambda: "mosaic_tpu")
  m = config_lib.from_config_dict(tiny.get_config()).model
  M, D, F, E = 256, m.hidden_size, m.moe_intermediate_size, m.n_routed_experts
  rule, dtype = model_routing.rule(m), jnp.dtype(m.compute_dtype)

  def fn(x_MD, logits_ME, weights, q_BSHA, v_BSHU):
    def outputs(x_MD, logits_ME, weights, q_BSHA, v_BSHU):
      routed = routing.route(logits_ME, None, rule)
      y_MD = grouped_matmul.routed_swiglu(x_MD, routed, weights)
      y_MD += quantized.quantized_routed_swiglu(x_MD, routed, weights)
      pair_P, row_MK = permute.expert_order(routed.expert_MK, routed.rank_MK, routed.counts_E)
      y_MD += permute.combine(permute.permute(x_MD, pair_P, row_MK), pair_P, row_MK)
      return y_MD, mla.causal_attention(q_BSHA, q_BSHA, v_BSHU, None, 1.0)

    y, vjp = jax.vjp(outputs, x_MD, logits_ME, weights, q_BSHA, v_BSHU)
    return y, vjp(y)

  struct = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
  args = struct(M, D), struct(M, E), (struct(E, D, F), struct(E, D, F), struct(E, F, D))
  heads = (struct(1, M, m.num_attention_heads, size) for size in (m.qk_head_dim, m.v_head_dim))
  text = compile_for(topology, fn, *args, *heads).as_text()
  kernels = ("routing", "routing_gradient", "permute", "combine", "mla_forward", "mla_backward")
  for name in (*kernels, "grouped_matmul_rows", "grouped_matmul_weights", "quantized_swiglu_in"):
    assert name in text
