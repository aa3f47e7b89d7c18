"""The model and batch with which the speed of dsmoe and of other code is compared, in float32.

Command:   python scripts/bench_train.py --config=experiments/bench_small.py --steps=10
           python scripts/bench_peers.py
Hardware:  2 CPU cores
Time:      1 minute for the first, 20 minutes for the second with its default of three rounds
Metric:    tokens per second, and the ratio of dsmoe's to the other code's

The tokens are synthetic, so its loss says nothing.
"""

from ml_collections import config_dict

from experiments import base


def get_config() -> config_dict.ConfigDict:
  """Returns a model of 4 layers and 16 experts that other implementations can run too."""
  c = base.get_config()
  c.batch_size = 8
  c.num_steps = 100

  m = c.model
  m.vocab_size = 4096
  m.hidden_size = 256
  m.num_hidden_layers = 4
  m.first_k_dense_replace = 1
  m.intermediate_size = 512
  m.num_attention_heads = 8
  m.q_lora_rank = 96
  m.kv_lora_rank = 64
  m.qk_nope_head_dim = 32
  m.qk_rope_head_dim = 16
  m.v_head_dim = 32
  m.n_routed_experts = 16
  m.n_shared_experts = 1
  m.num_experts_per_tok = 4
  m.moe_intermediate_size = 128
  m.n_group = 4
  m.topk_group = 2
  m.num_nextn_predict_layers = 0
  m.compute_dtype = "float32"
  m.remat = "none"

  c.optim.name = "adamw"
  c.optim.warmup_steps = 10  # must be below num_steps
  c.data.train_globs = ("synthetic",)
  c.data.train_weights = (1.0,)
  c.data.sequence_length = 512
  # The other implementations attend across documents, so this one does too.
  c.data.cross_document_attention = True
  c.log.tensorboard = False
  c.log.plots = False
  return c
