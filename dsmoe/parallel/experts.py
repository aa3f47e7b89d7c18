"""The weights of a layer's routed experts on this device.

Shapes: E experts, D hidden, F an expert's inner size, X experts of all layers that share an array.
"""

from typing import NamedTuple

import jax


class ExpertWeights(NamedTuple):
  """The experts' three matrices, which may be some of many in the same arrays.

  A layer of a stack is `num` experts from `first` on: reading one of them copies no other.
  """

  w_gate_XDF: jax.Array
  w_up_XDF: jax.Array
  w_down_XFD: jax.Array
  first: int = 0
  num: int | None = None  # None: all from `first` on

  @property
  def num_experts(self) -> int:
    return self.w_gate_XDF.shape[0] - self.first if self.num is None else self.num

  def own(self) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the layer's own matrices, [E, D, F] twice and [E, F, D]."""
    w_gate, w_up, w_down = (
      jax.lax.slice_in_dim(w, self.first, self.first + self.num_experts) for w in self[:3]
    )
    return w_gate, w_up, w_down

  def take(self, expert) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns one expert's matrices, [D, F] twice and [F, D]; `expert` is an int32 scalar."""
    w_gate, w_up, w_down = (
      jax.lax.dynamic_index_in_dim(w, self.first + expert, keepdims=False) for w in self[:3]
    )
    return w_gate, w_up, w_down
