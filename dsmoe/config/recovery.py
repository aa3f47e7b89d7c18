"""What a run does when a step is bad or hangs."""

import dataclasses

from dsmoe.config.rules import at_least, numbers, one_of, require


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
  """When a step counts as bad, and what follows; see `dsmoe/training/bad_steps.py`."""

  bad_step: str = "stop"
  spike_deviations: float = 0.0
  spike_window_steps: int = 128
  max_in_a_row: int = 10
  rewind_more_batches: int = 0
  watchdog_secs: float = 1800.0

  def __post_init__(self):
    numbers(self)
    one_of("recovery.bad_step", self.bad_step, ("stop", "skip", "rewind"))
    at_least(self, 0.0, "spike_deviations", "watchdog_secs")
    at_least(self, 4, "spike_window_steps")
    at_least(self, 1, "max_in_a_row")
    at_least(self, 0, "rewind_more_batches")
    unread = {
      "spike_window_steps": (self.spike_deviations > 0, "spike_deviations above 0"),
      "max_in_a_row": (self.bad_step != "stop", "bad_step 'skip' or 'rewind'"),
      "rewind_more_batches": (self.bad_step == "rewind", "bad_step 'rewind'"),
    }
    for field in dataclasses.fields(self):
      is_read, reader = unread.get(field.name, (True, ""))
      value = getattr(self, field.name)
      require(
        is_read or value == field.default,
        f"recovery.{field.name} ({value}) must be {field.default} without recovery.{reader}, which "
        "reads it",
      )
