"""A model of DeepSeek-V3's shape that learns Python from the standard library in minutes.

Command:   make train   (python -m dsmoe.train --config=experiments/tiny.py --workdir=runs/tiny)
Hardware:  2 CPU cores
Time:      under 6 minutes
Metric:    validation bits per byte, which should be below gzip -9 on the same files

Multi-token prediction is off: it costs a third more time per token and does not help a model this
small. --config.model.num_nextn_predict_layers=1 turns it on.
"""

from experiments import base


def get_config():
  """Returns the config of `make train`."""
  c = base.get_config()
  c.num_steps = 500
  c.batch_size = 8
  c.data.sequence_length = 256
  m = c.model
  m.compute_dtype = "float32"
  m.hidden_size = 192
  m.intermediate_size = 384
  m.initializer_range = 0.05
  m.num_attention_heads = 6
  m.q_lora_rank = 64
  m.kv_lora_rank = 48
  m.moe_intermediate_size = 96
  m.n_group = 4
  m.topk_group = 2
  c.balance.bias_update_speed = 0.01  # ten times the published value, because the run is short
  c.optim.learning_rate = 4e-3
  c.optim.final_learning_rate = 2e-4
  c.optim.warmup_steps = 30
  c.checkpoint.save_every_steps = 100
  c.log.eval_every_steps = 100
  c.log.eval_batches = 16
  return c
