"""The model and batch on which training speed is compared with other code, in float32.

  python scripts/bench_train.py --config=experiments/bench_small.py --steps=10
  python scripts/bench_peers.py

Hardware: CPU, two cores. Expected time: about 20 minutes for the default three rounds of
bench_peers. Metric: tokens per second of one optimizer step, and ours divided by the peer's.
Not an experiment about learning: its tokens are synthetic.
"""

from ml_collections import config_dict

from experiments import base


def get_config() -> config_dict.ConfigDict:
  """Returns a 4-layer, 16-expert model whose every size another implementation can take."""
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
  c.optim.warmup_steps = 10  # num_steps must have room for it
  c.data.train_globs = ("synthetic",)
  c.data.train_weights = (1.0,)
  c.data.sequence_length = 512
  # Peers attend across documents: masking them would be work only we do.
  c.data.cross_document_attention = True
  c.log.tensorboard = False
  c.log.plots = False
  return c
