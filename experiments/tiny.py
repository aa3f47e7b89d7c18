"""A model of DeepSeek-V3's shape that learns Python from the standard library in minutes.

Command:   make train   (python -m dsmoe.train --config=experiments/tiny.py --workdir=runs/tiny)
Hardware:  2 CPU cores
Time:      under 6 minutes
Metric:    validation bits per byte, which should be below gzip -9 on the same files

Multi-token prediction is off: it costs a third more time per token and does not help a model this
small. --config.model.num_nextn_predict_layers=1 turns it on.
"""

from experiments import base


def get_config():
  """Returns the config of `make train`."""
  c = base.get_config()
  c.num_steps = 500
  c.batch_size = 8
  c.data.sequence_length = 256
  m = c.model
  m.compute_dtype = "float32"
  m.hidden_size = 192
  m.intermediate_size = 384
  m.initializer_range = 0.05
  m.num_attention_heads = 6
  m.q_lora_rank = 64
  m.kv_lora_rank = 48
  m.moe_intermediate_size = 96
  m.n_group = 4
  m.topk_group = 2
  c.balance.bias_update_speed = 0.01  # ten times the published value, because the run is short
  c.optim.learning_rate = 4e-3
  c.optim.final_learning_rate = 2e-4
  c.optim.warmup_steps = 30
  c.checkpoint.save_every_steps = 100
  c.log.eval_every_steps = 100
  c.log.eval_batches = 16
  return c


def sweep(add):
  """The grid of `python scripts/sweep.py --config=experiments/tiny.py --workdir=runs/sweep`."""
  for learning_rate in (2e-3, 4e-3, 8e-3):
    for bias_update_speed in (0.001, 0.01):
      add(
        **{
          "optim.learning_rate": learning_rate,
          "optim.final_learning_rate": learning_rate / 20,
          "balance.bias_update_speed": bias_update_speed,
        }
      )


def search(trial):
  """The space of the same command with --trials=N."""
  learning_rate = trial.suggest_float("learning_rate", 5e-4, 2e-2, log=True)
  return {
    "optim.learning_rate": learning_rate,
    "optim.final_learning_rate": learning_rate / 20,
    "balance.bias_update_speed": trial.suggest_float("bias_update_speed", 1e-4, 1e-1, log=True),
    "model.initializer_range": trial.suggest_float("initializer_range", 0.01, 0.1, log=True),
  }
