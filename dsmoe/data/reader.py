"""What a run reads: batch after batch onto its mesh, and the place in the data after any step."""

from collections.abc import Iterator

import jax

from dsmoe.config import Config
from dsmoe.data import batches as data
from dsmoe.data import records
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.training import train_step


class Reader:
  """Reads the training batches of a run.

  Attributes:
    first: the step after which it began.
    batch: the next step's batch, arrays [B, S] of the whole batch; `read` replaces it.
  """

  def __init__(
    self,
    prepared: records.PreparedData,
    config: Config,
    mesh: jax.sharding.Mesh,
    part: tuple[int, int],
    first: int,
    position: data.Position,
  ):
    """Reads the batch of step `first + 1`.

    Args:
      prepared: the run's tokenised data.
      config: of the run.
      mesh: onto which the batches go.
      part: which of how many parts of a batch's rows are this process's.
      first: steps made before.
      position: what those steps have consumed.

    Raises:
      ValueError: for a batch with padding.
    """
    self._prepared, self._config, self._mesh, self._part = prepared, config, mesh, part
    self._batches: Iterator[data.Batch] = iter(())
    self.restart(first, position)

  def restart(self, first: int, position: data.Position) -> None:
    """Begins anew after another step, at another place."""
    c = self._config
    self.close()
    self.first, self._position = first, position
    self._batches = data.train_iterator(self._prepared, c.data, c.batch_size, *self._part, position)
    self.read()

  def close(self) -> None:
    """Ends the threads that read ahead."""
    if hasattr(self._batches, "close"):  # as that of grain has
      self._batches.close()

  def read(self) -> None:
    """Reads the next batch."""
    rows = next(self._batches)
    train_step.check_no_padding(rows)
    self.batch = mesh_lib.to_global(rows, self._mesh)

  def position_after(self, step: int) -> data.Position:
    """Returns what is consumed after a step, which is not before `first`."""
    c = self._config
    return self._position.advance(c.data, (step - self.first) * c.batch_size)
