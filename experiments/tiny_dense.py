"""The dense twin of tiny.py: as many active parameters, no experts. It shows what experts gain.

Command:   python -m dsmoe.train --config=experiments/tiny_dense.py --workdir=runs/tiny_dense
Hardware:  2 CPU cores
Time:      under 6 minutes
Metric:    validation bits per byte, beside that of experiments/tiny.py
"""

from experiments import tiny


def get_config():
  """Returns tiny's config with dense layers that have as many parameters as a token activates."""
  c = tiny.get_config()
  m = c.model
  m.n_routed_experts = 0
  m.first_k_dense_replace = m.num_hidden_layers
  m.intermediate_size = 460
  c.balance.methods = ()
  return c
