"""Every config field, once, with its meaning and default; the other experiments start from here.

The defaults describe a small model of DeepSeek-V3's shape. Types and rules are in
`dsmoe/config/schema.py`. Fields that exist in a Hugging Face config.json have the same name here.
"""

from ml_collections import config_dict


def optional():
  """Returns a field that is None until it is set; the command line can set it to None again.

  Its type is checked when the config is built, with that of every other field.
  """
  return config_dict.placeholder(object)


def get_config() -> config_dict.ConfigDict:
  """Returns the defaults that every experiment changes."""
  c = config_dict.ConfigDict()
  c.seed = 0  # of the initial weights
  c.batch_size = 16  # sequences per optimizer step, summed over devices and microbatches
  c.num_microbatches = 1  # gradient accumulation; must divide batch_size
  c.num_steps = 1000  # optimizer steps of the whole run

  m = c.model = config_dict.ConfigDict()
  m.vocab_size = 4096
  m.hidden_size = 256
  m.num_hidden_layers = 4
  m.first_k_dense_replace = 1  # the first k layers have a dense FFN instead of experts
  m.intermediate_size = 512  # of the dense FFN
  m.rms_norm_eps = 1e-6
  m.initializer_range = 0.02  # standard deviation of the initial weights
  m.tie_word_embeddings = False  # True: the output head is the embedding
  m.max_position_embeddings = 4096  # the longest sequence
  # Multi-head latent attention.
  m.num_attention_heads = 8
  m.q_lora_rank = optional()  # None: queries have no low-rank projection
  m.kv_lora_rank = 64  # size of the latent from which keys and values are computed
  m.qk_nope_head_dim = 32  # the part of a query or key head without rotary embedding
  m.qk_rope_head_dim = 16  # the part with it, shared by all heads' keys
  m.v_head_dim = 32
  m.attention_bias = False  # True: biases on q_a_proj, kv_a_proj and o_proj
  m.rope_theta = 10000.0
  m.rope_interleave = True  # True: rotate adjacent pairs, as DeepSeek; False: rotate halves
  m.rope_scaling = config_dict.ConfigDict()  # YaRN context extension
  m.rope_scaling.factor = 1.0  # 1: positions are not scaled
  m.rope_scaling.original_max_position_embeddings = 4096
  m.rope_scaling.beta_fast = 32.0
  m.rope_scaling.beta_slow = 1.0
  m.rope_scaling.mscale = 0.0  # 0: absent from config.json
  m.rope_scaling.mscale_all_dim = 0.0  # 0: absent, and the softmax scale is not changed
  # Mixture of experts.
  m.n_routed_experts = 16
  m.n_shared_experts = 1  # every token passes through these, as one FFN of their joint width
  m.num_experts_per_tok = 4
  m.moe_intermediate_size = 128  # of one expert's FFN
  m.scoring_func = "sigmoid"  # sigmoid | softmax | sqrtsoftplus
  # How a token selects experts. noaux_tc (V3): by score plus router bias; groups are ranked by the
  # sum of their two best. group_limited_greedy (V2): by score; groups are ranked by their best.
  # greedy: by score, without groups.
  m.topk_method = "noaux_tc"
  m.n_group = 1  # groups of equally many experts
  m.topk_group = 1  # groups from which a token may select
  m.norm_topk_prob = True  # divide the scores of the selected experts by their sum
  m.routed_scaling_factor = 2.5  # multiplies the gates
  m.num_nextn_predict_layers = 0  # multi-token prediction modules
  # How the model is computed. These change its values by rounding only.
  # bfloat16 | float32. Weights are stored, and router and losses are computed, in float32 always.
  m.compute_dtype = "bfloat16"
  # What is kept for the backward pass. none: all that it reads | dots: outputs of matmuls | full:
  # the input of each layer. The rest is computed again.
  m.remat = "none"
  # local: permute tokens to their experts, one grouped matmul. With mesh.expert above 1:
  # all_to_all: send each row to the device that owns its expert, and back | all_gather: gather the
  # tokens of the axis' devices, each of which applies its own experts, and scatter the sums | ring:
  # the same tokens pass each device in turn, in the memory of one device's tokens | replicated: hot
  # experts are copied for the microbatch, so that all devices compute equally many rows |
  # hierarchical: a token crosses to a group of devices once, however many of its experts live there
  # | dense: every expert computes every token; slow, for tests.
  m.dispatch = "local"
  # Options of the exchange of rows among the devices along mesh.expert. A dispatch that does not
  # read one refuses any other value than the default; with mesh.expert 1 nothing is exchanged.
  x = m.exchange = config_dict.ConfigDict()
  # Rows that a device has room to receive, over the mean (its tokens times num_experts_per_tok).
  # Rows beyond it are dropped, and counted as dropped_rows in metrics.jsonl.
  x.receive_capacity = 2.0
  # What is done about dropped rows. none: they are counted | layer: the layer is computed by a path
  # that drops nothing | step: the whole step is, again. Counted as fallbacks in metrics.jsonl, for
  # each layer and microbatch. Evaluation never drops rows.
  x.dropless_fallback = "none"
  # Parts into which a device's tokens are split; each is exchanged on its own, in smaller buffers.
  x.moe_chunks = 1
  # Of the rows on their way to the experts. compute_dtype | fp8: E4M3 with a scale for each 1 x 128
  # tile. The way back is always in compute_dtype.
  x.precision = "compute_dtype"
  x.devices_per_group = 8  # of hierarchical: neighbours along mesh.expert joined by fast links
  m.attention_chunk_tokens = 128  # queries computed at once; memory is linear in sequence length
  # Of the attention projections and all experts, forward and backward. compute_dtype | fp8: E4M3
  # by V3's recipe, scales per 1 x 128 tile and 128 x 128 block | fp8_ue8m0: scales are powers of 2.
  m.matmul_precision = "compute_dtype"
  # Implementations in pallas_kernels. None: the compiled kernel on the chips it was made for, if it
  # supports the sizes and dtype, else XLA; on CPU, what is fastest there.
  k = m.kernels = config_dict.ConfigDict()
  k.routing = optional()  # reference | mosaic_tpu | mosaic_gpu
  # reference | ragged_dot | blocked (for CPU) | mosaic_tpu | mosaic_gpu
  k.grouped_matmul = optional()
  k.attention = optional()  # reference | xla | mosaic_tpu | mosaic_gpu
  k.decode_attention = optional()  # reference | xla | mosaic_tpu | mosaic_gpu
  k.quantized_matmul = optional()  # reference | xla | mosaic_tpu | mosaic_gpu
  k.tuned = optional()  # tile sizes that `bench_kernels.py --tune` wrote; None: by rule

  # Balancing the load of experts. "bias": V3's update of the router bias by the sign of the load's
  # error | "sequence": V3's loss over each sequence (arXiv:2412.19437, equations 17-20).
  b = c.balance = config_dict.ConfigDict()
  b.methods = ("bias", "sequence")
  b.bias_update_speed = 0.001  # gamma: change of the bias per step, in units of scores
  b.bias_freeze_step = -1  # from this step on the bias does not move; -1: it always does
  b.sequence_loss_weight = 0.0001  # alpha, weight of the loss over each sequence

  l = c.loss = config_dict.ConfigDict()
  l.cross_entropy_chunk_tokens = 1024  # tokens whose logits are in memory at once
  l.z_loss_weight = 0.0  # of the squared logarithm of the softmax's normaliser
  l.mtp_loss_weight = 0.3  # lambda, of the multi-token prediction losses' mean
  l.mtp_final_loss_weight = 0.1  # lambda from mtp_switch_step on
  l.mtp_switch_step = -1  # -1: lambda does not change

  o = c.optim = config_dict.ConfigDict()
  o.name = "adamw"  # the only one
  o.learning_rate = 1e-3  # the peak
  # cosine: warm up, then decay to the end | wsd: warm up, stay constant, then decay linearly over
  # the last decay_steps.
  o.schedule = "cosine"
  o.warmup_steps = 100
  o.decay_steps = 200  # wsd only
  o.final_learning_rate = 1e-4
  o.beta1 = 0.9
  o.beta2 = 0.95
  o.epsilon = 1e-8
  o.weight_decay = 0.1  # of matrices; norms and biases have none
  o.clip_norm = 1.0  # limit of the global gradient norm; 0: no clipping
  o.moment_dtype = "float32"  # of Adam's first moment: float32 | bfloat16

  d = c.data = config_dict.ConfigDict()
  # Files of text, .jsonl or .parquet, local or on gs://. "stdlib": Python's own library.
  # "synthetic": random tokens.
  d.train_globs = ("stdlib",)
  d.train_weights = (1.0,)  # for each glob, the share of sequences drawn from it
  d.validation_globs = ("stdlib",)
  d.text_field = "text"  # the field of JSON and Parquet rows that is read; "a.b": b within a
  d.skip_null_rows = False  # True: rows without that field are passed over and counted
  d.tokenizer = ""  # a tokenizer.json; "": train byte-level BPE of vocab_size on the training text
  # The token of data.tokenizer that ends a document; "": as the files beside tokenizer.json say.
  d.eos_token = ""
  d.cache_dir = ""  # folder of the tokenised text; "": <workdir>/data
  d.sequence_length = 512
  d.cross_document_attention = False  # False: a token attends only to its own document
  d.fim_rate = 0.0  # fill in the middle: share of documents put into order prefix, suffix, middle
  d.seed = 0  # of shuffling and of fill in the middle

  # Number of devices along each mesh axis; data = -1: all that the other axes leave.
  # Rows are split over data and expert; experts over expert; heads, inner sizes of feed-forward
  # layers and the vocabulary over model, which must divide them (with FP8, into multiples of 128,
  # or tiles and so rounding differ from one device's). Each row's tokens are split over context:
  # sequence_length must be divisible by twice its devices.
  c.mesh = config_dict.ConfigDict(dict(stage=1, data=-1, expert=1, context=1, model=1))
  c.mesh.across_slices = "data"  # the axis that goes from slice to slice: data | expert

  k = c.checkpoint = config_dict.ConfigDict()
  k.save_every_steps = 200
  k.keep_last = 2  # the newest checkpoints, kept
  k.keep_every_steps = 0  # checkpoints at multiples of this are kept for ever too; 0: none are
  # A folder, such as one on gs://, for copies of checkpoints on a disk that may be lost; "": none. It
  # becomes a workdir too. A workdir without checkpoints goes on from the newest copy.
  k.copy_to = ""
  # Checkpoints at multiples of this are copied, and the last one of a run that ends or is stopped. A
  # multiple of save_every_steps; 0 without copy_to.
  k.copy_every_steps = 0
  k.copy_keep = 0  # the newest copies, kept; 0: all are

  r = c.recovery = config_dict.ConfigDict()
  # What follows a step whose loss or gradient is not finite, or a spike. stop: the run ends after
  # the state before the step was saved | skip: neither weights nor optimizer nor router bias move,
  # the batch is passed over | rewind: back to the newest checkpoint, and on after the bad batch.
  r.bad_step = "stop"
  # A loss or gradient norm so many standard deviations above its mean over the latest steps is a
  # spike; 0: there are none. With fewer than half a window of steps nothing is one.
  r.spike_deviations = 0.0
  r.spike_window_steps = 128
  # How many steps are skipped, or how often the run goes back to the same checkpoint, in a row, over
  # all its starts; after that it stops.
  r.max_in_a_row = 10
  r.rewind_more_batches = 0  # that rewind passes over too, after the bad one
  # A process that completes no step, batch of an evaluation, or save within this time writes the
  # stacks of its threads to hang.<process>.txt and ends with 75, upon which a launcher starts it
  # again. Compiling and the preparation of data are not watched. 0: nothing is.
  r.watchdog_secs = 1800.0

  g = c.log = config_dict.ConfigDict()
  g.log_every_steps = 10
  g.eval_every_steps = 200
  g.eval_batches = -1  # batches of batch_size sequences; -1: the whole validation set
  g.sample_tokens = 128  # length of the text the model writes at the end of a run; 0: none
  g.tensorboard = True  # write TensorBoard events beside metrics.jsonl
  g.plots = True  # draw the plots at the end of the run
  # Steps whose routing is recorded: the experts that each token chose, in all MoE layers, as files
  # in <workdir>/routing_traces; the format is in dsmoe/reporting/routing_trace.py.
  g.routing_trace_steps = ()

  p = c.profile = config_dict.ConfigDict()
  # Steps that the profiler traces into <workdir>/profiles, "100:103" for the steps 100, 101 and 102;
  # "": none. scripts/read_profile.py shows where their time went.
  p.steps = ""
  return c
