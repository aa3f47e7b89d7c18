"""Moonlight-16B-A3B: 16B parameters, 2.4B active per token, at 8K (arXiv:2502.16982).

Command:   python -m dsmoe.train --config=experiments/moonlight_16b.py --workdir=gs://bucket/ml
Hardware:  8 devices of 80 GB or more: parameters, gradients and moments take 16 bytes each.
           mesh.expert is 4 and may be up to 64: 8 devices are data 2 x expert 4
Time:      5.7T tokens are 1.1e23 FLOP: 49 days on 64 H800 at 40% MFU
Metric:    validation bits per byte

Differences from the publication:
- AdamW instead of Muon.
- The batch size is constant; the report has 2,048 until 200B tokens.
- One cosine; the report has a cosine to 5.2T tokens, then a second rise and fall.
- The bias update does not subtract the mean of the signs, which selects the same experts.
- Weights are initialised as in V3; the report does not say how.
- The training text is not public: tokens are synthetic until data.train_globs and
  data.tokenizer name yours.
"""

from experiments import base


def get_config():
  """Returns the pre-training config."""
  c = base.get_config()
  c.batch_size = 4096
  c.data.sequence_length = 8192
  tokens_per_step = c.batch_size * c.data.sequence_length
  c.num_steps = round(5.7e12 / tokens_per_step)

  m = c.model
  m.vocab_size = 163840
  m.hidden_size = 2048
  m.num_hidden_layers = 27
  m.intermediate_size = 11264
  m.rms_norm_eps = 1e-5
  m.initializer_range = 0.006
  m.max_position_embeddings = 8192
  m.num_attention_heads = 16
  m.q_lora_rank = None
  m.kv_lora_rank = 512
  m.qk_nope_head_dim = 128
  m.qk_rope_head_dim = 64
  m.v_head_dim = 128
  m.rope_theta = 50000.0
  m.n_routed_experts = 64
  m.n_shared_experts = 2
  m.num_experts_per_tok = 6
  m.moe_intermediate_size = 1408
  m.routed_scaling_factor = 2.446
  m.remat = "full"
  m.dispatch = "all_gather"

  c.balance.methods = ("bias",)
  c.balance.bias_freeze_step = round(5.2e12 / tokens_per_step)

  c.optim.learning_rate = 4.2e-4
  c.optim.final_learning_rate = 4.2e-5
  c.optim.warmup_steps = 2000

  c.mesh.expert = 4

  c.data.train_globs = c.data.validation_globs = ("synthetic",)
  c.data.cross_document_attention = True
  return c
