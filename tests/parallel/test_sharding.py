import pytest
from jax.sharding import PartitionSpec as P

from dsmoe.parallel import sharding


def test_dimensions_are_stored_over_one_axis_each():
  assert sharding.stored_spec(("embed", "heads", "head_dim")) == P("data", None, "expert")
  assert sharding.stored_spec(("q_lora", "heads", "head_dim")) == P("data", None, "expert")
  assert sharding.stored_spec(("embed", "q_lora")) == P("data", "expert")
  assert sharding.stored_spec(("experts", "ffn", "embed")) == P("expert", None, "data")
  assert sharding.stored_spec(("joined", "embed")) == P("data", "expert")
  assert sharding.stored_spec(("embed",)) == sharding.stored_spec(()) == P()


def test_unknown_and_repeated_dimensions_are_refused():
  with pytest.raises(ValueError, match=r"must be one of joined, embed, .* scores, got 'embedd'"):
    sharding.stored_spec(("embedd", "ffn"))
  with pytest.raises(ValueError, match=r"each logical dimension once, got \('embed', 'embed'\)"):
    sharding.stored_spec(("embed", "embed"))
