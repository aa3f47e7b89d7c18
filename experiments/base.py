"""Every field there is, once, with its meaning; the other experiments start from here.

The values are those of a small DeepSeek-V3-shaped model. `dsmoe/config/schema.py` holds the
types and the rules. Names that appear in a Hugging Face config.json are spelled as there.
"""

from ml_collections import config_dict

placeholder = config_dict.placeholder


def get_config() -> config_dict.ConfigDict:
  """Returns the defaults every experiment is written against."""
  c = config_dict.ConfigDict()
  c.seed = 0  # initial weights
  c.batch_size = 16  # sequences an optimizer step, over all devices and microbatches
  c.num_microbatches = 1  # gradient accumulation; divides batch_size
  c.num_steps = 1000

  m = c.model = config_dict.ConfigDict()
  m.vocab_size = 4096
  m.hidden_size = 256
  m.num_hidden_layers = 4
  m.first_k_dense_replace = 1  # the first k layers have a dense FFN instead of experts
  m.intermediate_size = 512  # the dense FFN
  m.rms_norm_eps = 1e-6
  m.initializer_range = 0.02  # standard deviation of the initial weights
  m.tie_word_embeddings = False
  m.max_position_embeddings = 4096
  # Multi-head latent attention.
  m.num_attention_heads = 8
  m.q_lora_rank = placeholder(int)  # None: queries are projected directly
  m.kv_lora_rank = 64
  m.qk_nope_head_dim = 32
  m.qk_rope_head_dim = 16
  m.v_head_dim = 32
  m.attention_bias = False  # biases on q_a_proj, kv_a_proj and o_proj
  m.rope_theta = 10000.0
  m.rope_interleave = True  # rotate adjacent pairs (DeepSeek); False: the two halves
  m.rope_scaling = config_dict.ConfigDict()  # YaRN
  m.rope_scaling.factor = 1.0  # 1: no scaling
  m.rope_scaling.original_max_position_embeddings = 4096
  m.rope_scaling.beta_fast = 32.0
  m.rope_scaling.beta_slow = 1.0
  m.rope_scaling.mscale = 0.0  # 0: not given
  m.rope_scaling.mscale_all_dim = 0.0  # 0: not given, and no scale on the softmax
  # Mixture of experts.
  m.n_routed_experts = 16
  m.n_shared_experts = 1
  m.num_experts_per_tok = 4
  m.moe_intermediate_size = 128  # one expert's inner size
  m.scoring_func = "sigmoid"  # sigmoid | softmax | sqrtsoftplus
  m.topk_method = "noaux_tc"  # noaux_tc: biased, groups by top-2 sum (V3) | group_limited_greedy: groups by max (V2) | greedy: no groups
  m.n_group = 1
  m.topk_group = 1
  m.norm_topk_prob = True
  m.routed_scaling_factor = 2.5
  # Multi-token prediction.
  m.num_nextn_predict_layers = 0
  # How it is computed; none of these changes the mathematics.
  m.compute_dtype = "bfloat16"  # bfloat16 | float32; masters, router and losses are float32 always
  m.remat = "none"  # none | dots: keep matmul outputs | full: keep each layer's input only
  m.dispatch = (
    "local"  # local: permute and grouped matmul | dense: every expert on every token (the oracle)
  )
  m.attention_chunk_tokens = 128  # queries handled at once; memory is linear in sequence length
  # compute_dtype | fp8: E4M3 by V3's recipe (1x128 tiles, 128x128 blocks) in the projections of
  # attention and all experts, forward and backward | fp8_ue8m0: with scales of powers of two
  m.matmul_precision = "compute_dtype"
  # Implementations in pallas_kernels; None picks by platform, on Hopper by sizes and dtype too.
  k = m.kernels = config_dict.ConfigDict()
  k.routing = placeholder(str)  # reference | mosaic_tpu | mosaic_gpu
  # reference | ragged_dot | blocked (CPU) | mosaic_tpu | mosaic_gpu
  k.grouped_matmul = placeholder(str)
  k.attention = placeholder(str)  # reference | xla | mosaic_tpu | mosaic_gpu
  k.decode_attention = placeholder(str)  # reference | xla | mosaic_tpu | mosaic_gpu
  k.quantized_matmul = placeholder(str)  # reference | xla | mosaic_tpu | mosaic_gpu
  k.tuned = placeholder(str)  # a table `bench_kernels.py --tune` wrote; None: sizes decide on tiles

  # Balancing the experts: any of "bias" (V3's sign update) and "sequence" (V3 eq 17-20).
  b = c.balance = config_dict.ConfigDict()
  b.methods = ("bias", "sequence")
  b.bias_update_speed = 0.001  # gamma, score units a step
  b.bias_freeze_step = -1  # gamma is 0 from this step on; -1: never
  b.sequence_loss_weight = 0.0001  # alpha

  l = c.loss = config_dict.ConfigDict()
  l.cross_entropy_chunk_tokens = 1024  # tokens whose logits are in memory at once
  l.z_loss_weight = 0.0  # on log^2 of the softmax's normaliser
  l.mtp_loss_weight = 0.3  # lambda
  l.mtp_final_loss_weight = 0.1  # lambda from mtp_switch_step on
  l.mtp_switch_step = -1  # -1: never

  o = c.optim = config_dict.ConfigDict()
  o.name = "adamw"
  o.learning_rate = 1e-3  # the peak
  o.schedule = "cosine"  # cosine: warm up, then decay to the end | wsd: warm up, stay, decay over the last decay_steps
  o.warmup_steps = 100
  o.decay_steps = 200  # wsd only
  o.final_learning_rate = 1e-4
  o.beta1 = 0.9
  o.beta2 = 0.95
  o.epsilon = 1e-8
  o.weight_decay = 0.1  # on matrices; never on norms and biases
  o.clip_norm = 1.0  # global gradient norm; 0: no clipping
  o.moment_dtype = "float32"  # of Adam's first moment: float32 | bfloat16

  d = c.data = config_dict.ConfigDict()
  d.train_globs = (
    "stdlib",
  )  # text, .jsonl or .parquet, local or gs://; or "stdlib"; or "synthetic"
  d.train_weights = (1.0,)  # one a glob: the share of sequences drawn from it
  d.validation_globs = ("stdlib",)
  d.text_field = "text"  # of .jsonl and .parquet
  d.tokenizer = (
    ""  # a tokenizer.json; "": byte-level BPE of vocab_size trained on the training text
  )
  d.cache_dir = ""  # tokenised records; "": <workdir>/data
  d.sequence_length = 512
  d.cross_document_attention = False  # False: a token sees its own document only
  d.fim_rate = 0.0  # share of documents turned into prefix-suffix-middle order
  d.seed = 0  # shuffling and fill-in-the-middle

  # Devices along each axis; data = -1 takes what the others leave.
  c.mesh = config_dict.ConfigDict(dict(stage=1, data=-1, expert=1, context=1, model=1))

  k = c.checkpoint = config_dict.ConfigDict()
  k.save_every_steps = 200
  k.keep_last = 2  # newest checkpoints kept
  k.keep_every_steps = 0  # besides, every step divisible by this for ever; 0: none

  g = c.log = config_dict.ConfigDict()
  g.log_every_steps = 10
  g.eval_every_steps = 200
  g.eval_batches = -1  # of batch_size sequences; -1: the whole validation set
  g.sample_tokens = 128  # written by the model at the end of a run; 0: none
  g.tensorboard = True
  g.plots = True
  return c
