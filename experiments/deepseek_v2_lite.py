"""DeepSeek-V2-Lite: 15.7B parameters, 2.4B active per token (arXiv:2405.04434, appendix B).

Command:   python -m dsmoe.train --config=experiments/deepseek_v2_lite.py --workdir=gs://bucket/lite
           `--config=experiments/deepseek_v2_lite.py:released` is the released 32K model (YaRN)
           `--config=experiments/deepseek_v2_lite.py:cut` is a small model of its form that learns
           Python, for comparisons on one device: 300 steps take minutes on 2 CPU cores
Hardware:  8 devices of 80 GB or more: parameters, gradients and moments take 16 bytes each.
           mesh.expert is 4 and may be up to 64: 8 devices are data 2 x expert 4
Time:      5.7T tokens are 9.4e22 FLOP: 43 days on 64 H800 at 40% MFU
Metric:    validation bits per byte

Differences from the publication:
- The learning rate decays linearly to a tenth over the last 20%; the report multiplies it by 0.316
  at 80% and at 90%.
- The expert-level balance loss is taken over each sequence.
- The training text is not public: tokens are synthetic until data.train_globs and
  data.tokenizer name yours.
"""

from experiments import base, tiny


def get_config(arg: str = ""):
  """Returns the pre-training config; with "released", the context-extended model's.

  With "cut" it is that of a small model with the same routing rule, 6 experts a token, of 16 instead of
  64, and the same sizes of heads. Its other sizes are whole tiles of FP8.
  """
  if arg not in ("", "released", "cut"):
    raise ValueError(
      f"deepseek_v2_lite's argument must be empty or 'released' or 'cut', got {arg!r}"
    )
  c = base.get_config()
  c.batch_size = 4608
  c.data.sequence_length = 4096
  c.num_steps = round(5.7e12 / (c.batch_size * c.data.sequence_length))

  m = c.model
  m.vocab_size = 102400
  m.hidden_size = 2048
  m.num_hidden_layers = 27
  m.intermediate_size = 10944
  m.initializer_range = 0.006
  m.num_attention_heads = 16
  m.q_lora_rank = None
  m.kv_lora_rank = 512
  m.qk_nope_head_dim = 128
  m.qk_rope_head_dim = 64
  m.v_head_dim = 128
  m.n_routed_experts = 64
  m.n_shared_experts = 2
  m.num_experts_per_tok = 6
  m.moe_intermediate_size = 1408
  m.scoring_func = "softmax"
  m.topk_method = "greedy"
  m.norm_topk_prob = False
  m.routed_scaling_factor = 1.0
  m.remat = "full"
  m.dispatch = "all_gather"
  if arg == "released":
    m.max_position_embeddings = 163840
    m.rope_scaling.factor = 40.0
    m.rope_scaling.mscale = 0.707
    m.rope_scaling.mscale_all_dim = 0.707

  c.balance.methods = ("sequence",)
  c.balance.sequence_loss_weight = 0.001

  c.optim.learning_rate = 4.2e-4
  c.optim.final_learning_rate = 4.2e-5
  c.optim.schedule = "wsd"
  c.optim.warmup_steps = 2000
  c.optim.decay_steps = round(0.2 * c.num_steps)

  c.mesh.expert = 4

  c.data.train_globs = c.data.validation_globs = ("synthetic",)
  c.data.cross_document_attention = True
  if arg == "cut":
    _cut(c)
  return c


def _cut(c) -> None:
  """Makes a model of minutes of it, with `tiny`'s text, batches and rates."""
  small = tiny.get_config()
  c.num_steps, c.batch_size, c.mesh.expert = 300, small.batch_size, 1
  c.data, c.log, c.checkpoint = small.data, small.log, small.checkpoint
  for name in ("learning_rate", "final_learning_rate", "warmup_steps"):
    c.optim[name] = small.optim[name]
  c.optim.decay_steps = 60
  m = c.model
  m.vocab_size = small.model.vocab_size
  m.num_hidden_layers = 3
  m.remat, m.dispatch = small.model.remat, small.model.dispatch
  m.initializer_range = 0.02
  m.hidden_size, m.intermediate_size, m.moe_intermediate_size = 256, 512, 128
  m.num_attention_heads, m.kv_lora_rank, m.n_routed_experts = 2, 128, 16
