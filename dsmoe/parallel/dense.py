"""The oracle of every back end: all experts on all tokens, masked."""

import jax
import jax.numpy as jnp

from dsmoe.config import ModelConfig
from dsmoe.parallel import collectives
from dsmoe.parallel.all_gather import gathered_tokens
from dsmoe.parallel.experts import ExpertWeights
from dsmoe.parallel.stats import nothing_dropped
from pallas_kernels.routing import Routed


def dense(x_MD, routed: Routed, experts: ExpertWeights, config: ModelConfig):
  """Applies every expert to every token and masks: E / K times the work of the other paths.

  Along an axis `expert` of several devices each applies its own experts to the tokens of all.
  """
  num_devices = collectives.devices_along("expert")
  if num_devices == 1:
    return masked(x_MD, routed, experts, 0), nothing_dropped()
  with jax.named_scope("exchange"):
    x_TD, routed = gathered_tokens(x_MD, routed)
  first = jax.lax.axis_index("expert") * experts.num_experts
  y_TD = masked(x_TD, routed, experts, first)
  with jax.named_scope("exchange"):
    y_MD = collectives.sum_to_owners(y_TD, "expert")
  return y_MD, nothing_dropped(sent_rows=x_MD.shape[0] * (num_devices - 1))


@jax.named_scope("experts")
def masked(x_MD, routed: Routed, experts: ExpertWeights, first):
  """Returns the sum of every token's shares of the experts from number `first` on."""
  expert_MK, gate_MK = routed.expert_MK, routed.gate_MK
  w_gate_EDF, w_up_EDF, w_down_EFD = experts.own()
  number_E = first + jnp.arange(w_gate_EDF.shape[0])
  gate_ME = jnp.sum(
    gate_MK[:, :, None] * (expert_MK[:, :, None] == number_E[None, None, :]), axis=1
  )
  inner_EMF = jax.nn.silu(jnp.einsum("md,edf->emf", x_MD, w_gate_EDF)) * jnp.einsum(
    "md,edf->emf", x_MD, w_up_EDF
  )
  y_EMD = jnp.einsum("emf,efd->emd", inner_EMF, w_down_EFD)
  return jnp.einsum("emd,me->md", y_EMD, gate_ME.astype(x_MD.dtype))
