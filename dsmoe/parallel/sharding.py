"""Over which mesh axis each logical dimension of a parameter is split, stored and computed with.

A parameter is stored split over as many axes as it has fitting dimensions, one axis a dimension
(two axes on one dimension would turn its gather into an all-reduce of the whole weight), and
gathered axis by axis just before use to the dimensions it is computed with.
"""

from jax.sharding import PartitionSpec

# Each mesh axis splits the first of these dimensions that a parameter has and that no axis before
# it has taken.
STORED: dict[str, tuple[str, ...]] = {
  "data": ("joined", "embed", "q_lora", "kv_lora"),
  "expert": ("experts", "scores", "vocab", "ffn", "head_dim", "q_lora", "kv_lora", "embed"),
}
# Dimensions that stay split in computation: the devices of an axis own what lies there.
COMPUTED: dict[str, str] = {"experts": "expert"}
# Every logical dimension. `joined` is the two hidden states that an MTP module joins, `scores` the
# router's outputs, one an expert, which every device computes whole.
DIMS = (
  "joined",
  "embed",
  "q_lora",
  "kv_lora",
  "heads",
  "head_dim",
  "ffn",
  "vocab",
  "experts",
  "scores",
)


def stored_spec(dims: tuple[str, ...]) -> PartitionSpec:
  """Returns how a parameter with these logical dimensions is stored; vectors are replicated.

  Args:
    dims: of `DIMS`, in the order of the parameter's own dimensions, without a stack's layers.

  Raises:
    ValueError: for an unknown or a repeated dimension.
  """
  for dim in dims:
    if dim not in DIMS:
      raise ValueError(f"logical dimension must be one of {', '.join(DIMS)}, got {dim!r}")
  if len(set(dims)) != len(dims):
    raise ValueError(f"a parameter must have each logical dimension once, got {dims}")
  if len(dims) < 2:
    return PartitionSpec()
  axis_of: dict[str, str] = {}
  for axis, candidates in STORED.items():
    for dim in candidates:
      if dim in dims and dim not in axis_of:
        axis_of[dim] = axis
        break
  return PartitionSpec(*(axis_of.get(dim) for dim in dims))
