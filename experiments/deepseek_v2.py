"""DeepSeek-V2: 236B parameters, 21B active per token, pre-trained at 4K (arXiv:2405.04434).

Command:   python -m dsmoe.train --config=experiments/deepseek_v2.py --workdir=gs://bucket/v2
           `--config=experiments/deepseek_v2.py:released` is the released 128K model (YaRN)
Hardware:  H800 in nodes of 8 in the report
Time:      172,800 GPU hours for 1T tokens in the report, so 1.4M
Metric:    validation bits per byte

Differences from the publication:
- The batch size is constant; the report raises it from 2,304 over the first 225B tokens.
- The learning rate decays linearly to a tenth over the last 40%; the report multiplies it by 0.316
  at 60% and at 90%.
- Of the three balance losses only the expert-level one exists, taken over each sequence.
- No tokens are dropped.
- The training text is not public: tokens are synthetic until data.train_globs and
  data.tokenizer name yours.
"""

from experiments import base


def get_config(arg: str = ""):
  """Returns the pre-training config; with "released", the context-extended model's."""
  if arg not in ("", "released"):
    raise ValueError(f"deepseek_v2's argument must be empty or 'released', got {arg!r}")
  c = base.get_config()
  c.batch_size = 9216
  c.data.sequence_length = 4096
  c.num_steps = round(8.1e12 / (c.batch_size * c.data.sequence_length))

  m = c.model
  m.vocab_size = 102400
  m.hidden_size = 5120
  m.num_hidden_layers = 60
  m.intermediate_size = 12288
  m.initializer_range = 0.006
  m.num_attention_heads = 128
  m.q_lora_rank = 1536
  m.kv_lora_rank = 512
  m.qk_nope_head_dim = 128
  m.qk_rope_head_dim = 64
  m.v_head_dim = 128
  m.n_routed_experts = 160
  m.n_shared_experts = 2
  m.num_experts_per_tok = 6
  m.moe_intermediate_size = 1536
  m.scoring_func = "softmax"
  m.topk_method = "group_limited_greedy"
  m.n_group = 8
  m.topk_group = 3
  m.norm_topk_prob = False
  m.routed_scaling_factor = 16.0
  m.remat = "full"
  if arg == "released":
    m.max_position_embeddings = 163840
    m.rope_scaling.factor = 40.0
    m.rope_scaling.mscale = 0.707
    m.rope_scaling.mscale_all_dim = 0.707

  c.balance.methods = ("sequence",)
  c.balance.sequence_loss_weight = 0.003

  c.optim.learning_rate = 2.4e-4
  c.optim.final_learning_rate = 2.4e-5
  c.optim.schedule = "wsd"
  c.optim.warmup_steps = 2000
  c.optim.decay_steps = round(0.4 * c.num_steps)

  c.data.train_globs = c.data.validation_globs = ("synthetic",)
  c.data.cross_document_attention = True
  return c
