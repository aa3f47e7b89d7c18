"""Kimi K2: 1.03T parameters, 32B active per token, pre-trained at 4K (arXiv:2507.20534).

Command:   python -m dsmoe.train --config=experiments/kimi_k2.py --workdir=gs://bucket/k2
           `--config=experiments/kimi_k2.py:released` is the released 128K model (YaRN)
Hardware:  H800 in nodes of 8 in the report
Time:      15.5T tokens are 3.2e24 FLOP: 45 days on 2,048 H800 at 40% MFU
Metric:    validation bits per byte

Differences from the publication:
- AdamW instead of MuonClip.
- After 10T tokens the learning rate decays linearly; the report has a cosine, and an annealing
  phase at 4K and 32K that is left out.
- The report gives only the method of balancing, a router bias; its update speed and the initial
  weights are those of V3.
- The training text is not public: tokens are synthetic until data.train_globs and
  data.tokenizer name yours.
"""

from experiments import base


def get_config(arg: str = ""):
  """Returns the pre-training config; with "released", the context-extended model's."""
  if arg not in ("", "released"):
    raise ValueError(f"kimi_k2's argument must be empty or 'released', got {arg!r}")
  c = base.get_config()
  c.batch_size = 16384
  c.data.sequence_length = 4096
  tokens_per_step = c.batch_size * c.data.sequence_length
  c.num_steps = round(15.5e12 / tokens_per_step)

  m = c.model
  m.vocab_size = 163840
  m.hidden_size = 7168
  m.num_hidden_layers = 61
  m.intermediate_size = 18432
  m.initializer_range = 0.006
  m.num_attention_heads = 64
  m.q_lora_rank = 1536
  m.kv_lora_rank = 512
  m.qk_nope_head_dim = 128
  m.qk_rope_head_dim = 64
  m.v_head_dim = 128
  m.rope_theta = 50000.0
  m.n_routed_experts = 384
  m.n_shared_experts = 1
  m.num_experts_per_tok = 8
  m.moe_intermediate_size = 2048
  m.routed_scaling_factor = 2.827
  m.remat = "full"
  if arg == "released":
    m.max_position_embeddings = 131072
    m.rope_scaling.factor = 32.0
    m.rope_scaling.beta_fast = 1.0
    m.rope_scaling.mscale = 1.0
    m.rope_scaling.mscale_all_dim = 1.0

  c.balance.methods = ("bias",)

  c.optim.learning_rate = 2e-4
  c.optim.final_learning_rate = 2e-5
  c.optim.schedule = "wsd"
  c.optim.warmup_steps = 500
  c.optim.decay_steps = round(5.5e12 / tokens_per_step)

  c.data.train_globs = c.data.validation_globs = ("synthetic",)
  c.data.cross_document_attention = True
  return c
