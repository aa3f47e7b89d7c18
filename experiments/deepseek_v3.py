"""DeepSeek-V3: 671B parameters, 37B active per token, pre-trained at 4K (arXiv:2412.19437).

Command:   python -m dsmoe.train --config=experiments/deepseek_v3.py --workdir=gs://bucket/v3
           `--config=experiments/deepseek_v3.py:released` is the released 128K model (YaRN)
Hardware:  2,048 H800 in the report
Time:      2.664M GPU hours in the report: 54 days
Metric:    validation bits per byte; the report states 0.548 on the test set of the Pile

Differences from the publication:
- The batch size is constant; the report raises it from 3,072 over the first 469B tokens.
- After 10T tokens the learning rate decays linearly; the report has a cosine and two short
  constant phases.
- The training text is not public: tokens are synthetic until data.train_globs and
  data.tokenizer name yours.
"""

from experiments import base


def get_config(arg: str = ""):
  """Returns the pre-training config; with "released", the context-extended model's."""
  if arg not in ("", "released"):
    raise ValueError(f"deepseek_v3's argument must be empty or 'released', got {arg!r}")
  c = base.get_config()
  c.batch_size = 15360
  c.data.sequence_length = 4096
  tokens_per_step = c.batch_size * c.data.sequence_length
  c.num_steps = round(14.8e12 / tokens_per_step)

  m = c.model
  m.vocab_size = 129280
  m.hidden_size = 7168
  m.num_hidden_layers = 61
  m.first_k_dense_replace = 3
  m.intermediate_size = 18432
  m.initializer_range = 0.006
  m.num_attention_heads = 128
  m.q_lora_rank = 1536
  m.kv_lora_rank = 512
  m.qk_nope_head_dim = 128
  m.qk_rope_head_dim = 64
  m.v_head_dim = 128
  m.n_routed_experts = 256
  m.n_shared_experts = 1
  m.num_experts_per_tok = 8
  m.moe_intermediate_size = 2048
  m.n_group = 8
  m.topk_group = 4
  m.routed_scaling_factor = 2.5
  m.num_nextn_predict_layers = 1
  m.remat = "full"
  if arg == "released":
    m.max_position_embeddings = 163840
    m.rope_scaling.factor = 40.0
    m.rope_scaling.mscale = 1.0
    m.rope_scaling.mscale_all_dim = 1.0

  c.balance.bias_freeze_step = round(14.3e12 / tokens_per_step)
  c.loss.mtp_switch_step = round(10e12 / tokens_per_step)

  c.optim.learning_rate = 2.2e-4
  c.optim.final_learning_rate = 2.2e-5
  c.optim.schedule = "wsd"
  c.optim.warmup_steps = 2000
  c.optim.decay_steps = round(4.8e12 / tokens_per_step)
  c.optim.moment_dtype = "bfloat16"

  c.data.train_globs = c.data.validation_globs = ("synthetic",)
  c.data.cross_document_attention = True
  c.data.fim_rate = 0.1
  return c
