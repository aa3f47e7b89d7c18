"""The validation curve of a run: points on one subset, and the loss on the whole set at its end."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from dsmoe.config import Config
from dsmoe.data import batches as data
from dsmoe.data import records
from dsmoe.evaluation import perplexity


class Validation:
  """Evaluates a run's state on its validation set.

  Attributes:
    checksum: of the curve's rows, see `perplexity.subset_checksum`.
  """

  def __init__(
    self,
    config: Config,
    prepared: records.PreparedData,
    mesh,
    part: tuple[int, int],
    eval_step: Callable,
  ):
    """Counts the bytes of the text, and takes the checksum of the curve's rows.

    Args:
      config: of the run.
      prepared: its tokenised data.
      mesh: the state's.
      part: which of how many parts of a batch's rows are this process's.
      eval_step: of `train_step.make_eval_step`.
    """
    self._config, self._prepared, self._mesh, self._part = config, prepared, mesh, part
    self._limits = (config.log.eval_batches, -1)
    self._num_bytes = perplexity.count_bytes(prepared, config.data, config.batch_size, self._limits)
    self.checksum = perplexity.subset_checksum(
      prepared, config.data, config.batch_size, config.log.eval_batches
    )
    self._eval_step = eval_step

  def is_due(self, step: int) -> bool:
    """Whether a point belongs to a step."""
    due = step % self._config.log.eval_every_steps == 0 or step == self._config.num_steps
    return bool(step and due and self._prepared.validation_tokens)

  def line(
    self, state, step: int, beats: Callable[[Iterator[Any]], Iterator[Any]] = iter
  ) -> dict[str, Any]:
    """Returns a step's line of metrics.jsonl, at the end of the run with the whole set's figures.

    Args:
      state: a TrainState; only its params and router_bias are used.
      step: optimizer steps made so far.
      beats: through which the batches pass, to show that the run goes on.
    """
    is_last, lines = step == self._config.num_steps, {}
    for limit in self._limits if is_last else self._limits[:1]:
      if limit not in lines:
        unseen = data.validation_batches(
          self._prepared, self._config.data, self._config.batch_size, *self._part
        )
        nats, tokens = perplexity.validation_nats(
          self._eval_step, state, beats(unseen), self._mesh, limit
        )
        lines[limit] = validation_line(nats, tokens, self._num_bytes.get(limit))
    line = lines[self._config.log.eval_batches]
    if is_last:
      line = line | {f"whole_{name}": value for name, value in lines[-1].items()}
    return line | {"validation_checksum": self.checksum}


def validation_line(nats: float, tokens: float, num_bytes: int | None) -> dict[str, Any]:
  """Returns the line of the loss on `num_bytes` of text, None if unknown."""
  bits = {"validation_bits_per_byte": nats / math.log(2) / num_bytes} if num_bytes else {}
  return {"validation_loss": nats / tokens, **bits, "validation_tokens": int(tokens)}
