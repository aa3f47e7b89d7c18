"""A run of seconds with all that a run has: experts, bias, MTP, checkpoints, validation.

Command:   python -m dsmoe.train --config=tests/configs/short_run.py --workdir=/tmp/short_run
Hardware:  one CPU core
Time:      seconds
Metric:    none; for the tests of killing and resuming
"""

from experiments import base


def get_config():
  """Returns a config with one dense and one MoE layer on random tokens."""
  c = base.get_config()
  c.batch_size = 8
  c.num_steps = 40
  m = c.model
  m.vocab_size, m.hidden_size, m.intermediate_size = 96, 32, 48
  m.num_hidden_layers, m.first_k_dense_replace = 2, 1
  m.num_attention_heads, m.q_lora_rank, m.kv_lora_rank = 2, 24, 16
  m.qk_nope_head_dim, m.qk_rope_head_dim, m.v_head_dim = 12, 8, 10
  m.n_routed_experts, m.num_experts_per_tok, m.moe_intermediate_size = 8, 2, 24
  m.num_nextn_predict_layers = 1
  m.compute_dtype = "float32"
  c.balance.bias_freeze_step = 30
  c.optim.warmup_steps = 4
  c.data.train_globs = c.data.validation_globs = ("synthetic",)
  c.data.sequence_length = 32
  c.checkpoint.save_every_steps = 3
  c.log.log_every_steps = 2
  c.log.eval_every_steps = 10
  c.log.eval_batches = 2
  c.log.sample_tokens = 0
  c.log.tensorboard = c.log.plots = False
  return c
