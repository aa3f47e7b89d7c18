"""The kernels' cases: their counts for DeepSeek-V3 by hand, and what they return."""

import jax
import numpy as np
import pytest

from dsmoe import config as config_lib
from dsmoe.kernel_bench import cases
from dsmoe.kernel_bench.cases import Shape
from experiments import deepseek_v3, tiny


def _shape(experiment, *sizes, **overrides) -> Shape:
  config = experiment.get_config()
  config.model.update(overrides)
  return Shape(config_lib.from_config_dict(config).model, *sizes)


V3 = _shape(deepseek_v3, 8192, 4096, 8)
# Head dims and a dtype that every implementation of attention takes.
_OVERRIDES = dict(qk_nope_head_dim=48, v_head_dim=64, compute_dtype="bfloat16")
TINY = _shape(tiny, 256, 128, 2, **_OVERRIDES)
EVERY = [
  (k, i)
  for k, known in cases.IMPLEMENTATIONS.items()
  for i in known
  # The first one's shapes are in kernels/test_gpu.py; of the others none is ours.
  if i not in ("mosaic_gpu", "jax_mosaic_gpu", "cudnn")
]


@pytest.mark.parametrize(
  "kernel, implementation, flops, least_bytes",
  [
    # 8,192 x 256 logits and the bias; experts, gates and ranks of 8 choices; 256 counts.
    ("routing", "reference", 8192 * 256, 4 * (8192 * 256 + 256 + 3 * 8192 * 8 + 256)),
    # 8,192 tokens become 65,536 rows of 7,168; two int32 a row say which.
    ("permute", "reference", 0, 2 * 7168 * (8192 + 65536) + 8 * 65536),
    ("combine", "reference", 65536 * 7168, 2 * 7168 * (8192 + 65536) + 8 * 65536),
    # 65,536 rows of 32 experts: 7,168 -> 2,048.
    ("grouped_matmul", "ragged_dot", 1_924_145_348_608, 2_147_483_776),
    ("grouped_swiglu", "reference", 5_772_436_045_824, 4_697_882_752),
    # Two sequences of 4,096, 128 heads, queries and keys of 192, values of 128.
    (
      "attention",
      "reference",
      2 * 128 * (4096 * 4097 // 2) * 2 * (192 + 128),
      2 * 2 * 4096 * 128 * (192 + 192 + 128 + 128),
    ),
    (
      "attention_gradient",
      "reference",
      2 * 128 * (4096 * 4097 // 2) * 2 * (192 + 128 + 3 * 192 + 2 * 128),
      2 * 2 * 4096 * 128 * (2 * (192 + 192 + 128) + 128),
    ),
    # 32 rows of 4,096 tokens, 512 + 64 numbers each and 64 of padding, in pages of 16.
    (
      "decode_attention",
      "reference",
      2 * 32 * 128 * 4096 * (576 + 512),
      2 * (32 * 4096 * 640 + 32 * 128 * (640 + 512)) + 4 * (32 * 256 + 32),
    ),
    ("grouped_matmul_gradient", "ragged_dot", 3_848_290_697_216, 4_026_531_968),
    ("grouped_swiglu_gradient", "reference", 16 * 65536 * 7168 * 2048, 8_456_241_280),
    ("quantized_matmul", "reference", 240_518_168_576, 180_355_072),
  ],
)
def test_counts_of_v3(kernel, implementation, flops, least_bytes):
  case = cases.case(kernel, implementation, V3)
  assert (case.flops, case.least_bytes) == (flops, least_bytes)


@pytest.mark.parametrize("kernel, implementation", EVERY)
def test_every_implementation_returns_what_its_operation_says(kernel, implementation):
  try:
    case = cases.case(kernel, implementation, TINY)
  except ImportError as error:
    pytest.skip(f"not installed: {error}")
  out = jax.tree.leaves(jax.eval_shape(case.fn, *case.args))
  expected = jax.tree.leaves(case.results)
  assert [(a.shape, a.dtype) for a in out] == [(a.shape, a.dtype) for a in expected]


def test_drawn_arguments_fit_together():
  M, D, _, e, P = TINY.dims
  assert (M, e, P) == (256, 8, 256 * 4)
  *_, sizes_E = cases.OPERATIONS["grouped_matmul"].draw(TINY)
  assert sizes_E.shape == (e,) and int(sizes_E.sum()) == P and np.ptp(sizes_E) <= 1
  x_MD, pair_P, row_MK = cases.OPERATIONS["permute"].draw(TINY)
  assert x_MD.shape == (M, D)
  np.testing.assert_array_equal(pair_P[row_MK.reshape(-1)], np.arange(P))
  _, pages_NTW, table_BP, end_BS = cases.OPERATIONS["decode_attention"].draw(TINY)
  np.testing.assert_array_equal(np.sort(table_BP, axis=None), np.arange(len(pages_NTW)))
  assert (end_BS == 128).all() and table_BP.shape[1] * cases.PAGE_TOKENS >= 128


def test_what_does_not_exist_is_refused():
  with pytest.raises(ValueError, match=r"kernel must be one of routing, .*, got 'sorting'"):
    cases.case("sorting", "reference", TINY)
  with pytest.raises(ValueError, match=r"of permute must be one of reference.*, got 'fastest'"):
    cases.case("permute", "fastest", TINY)
  with pytest.raises(ValueError, match=r"sequence_length \(7\) must divide tokens \(96\)"):
    _shape(tiny, 96, 7, 2)
  with pytest.raises(ValueError, match=r"expert_devices \(3\) must divide n_routed_experts \(16\)"):
    _shape(tiny, 96, 48, 3)
