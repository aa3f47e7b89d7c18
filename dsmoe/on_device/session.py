"""Runs the parts of a session, stage by stage, and writes its file after each."""

import contextlib
import pathlib
import sys
import threading
import time
from collections.abc import Collection, Iterable
from concurrent import futures

from dsmoe.on_device.parts import Part
from dsmoe.on_device.processes import Failed, Runner
from dsmoe.on_device.record import Record


class Session:
  """Runs parts; those that run when it is left are killed."""

  def __init__(
    self,
    folder: pathlib.Path,
    record: Record,
    log: pathlib.Path,
    is_dry_run: bool,
    patience: float = 1.0,
  ):
    """Begins a session.

    Args:
      folder: for the files that the parts need, which exists.
      record: for the rows.
      log: file for what the commands write.
      is_dry_run: whether the sizes are tiny, for a CPU.
      patience: times each part's limit.
    """
    self._folder, self._record, self._log, self._is_dry_run = folder, record, log, is_dry_run
    self._patience = patience
    self._began, self._lock = time.monotonic(), threading.Lock()
    self._exits, self._is_over = contextlib.ExitStack(), threading.Event()
    log.write_text("")

  def run(self, stages: Iterable[Iterable[Iterable[Part]]], wanted: Collection[str]) -> bool:
    """Runs the parts of these names; returns whether all ended well."""
    is_well, left_over = True, 0.0
    with self._exits:
      for stage in stages:
        began = time.monotonic()
        with futures.ThreadPoolExecutor() as pool:
          lanes = [[part for part in lane if part.name in wanted] for lane in stage]
          done = [pool.submit(self._run_lane, lane, left_over) for lane in lanes if lane]
          try:
            is_well = all([lane.result() for lane in done]) and is_well
          except BaseException:
            self._is_over.set()  # so that the lanes end, for which the pool waits
            self._exits.close()
            raise
        longest = max((sum(part.limit_secs for part in lane) for lane in lanes), default=0.0)
        left_over += self._patience * longest - (time.monotonic() - began)
        left_over = max(0.0, left_over)
    return is_well

  def _run_lane(self, lane: list[Part], left_over: float) -> bool:
    """Runs parts one after the other, each in its own time and what all before have left over."""
    is_well = True
    for part in lane:
      if self._is_over.is_set():
        return False
      limit_secs = self._patience * part.limit_secs + left_over
      began = time.monotonic()
      is_well = self._run_part(part, limit_secs) and is_well
      left_over = max(0.0, limit_secs - (time.monotonic() - began))
    return is_well

  def _run_part(self, part: Part, limit_secs: float) -> bool:
    self._say(f"{part.name}: begins, at most {limit_secs:.0f} s")
    rows: list[dict] = []
    error = None
    # Programs are kept for what a later process compiles again, in a folder that begins empty.
    cache = {
      "JAX_COMPILATION_CACHE_DIR": str(self._folder / "compiled"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    env = {"JAX_PLATFORMS": "cpu"} if self._is_dry_run else part.env | cache
    with Runner(self._folder, part.name, limit_secs, env) as runner:
      self._exits.callback(runner.__exit__)
      try:
        part.measure(runner, rows, self._is_dry_run)
      except Failed as failed:
        error = str(failed)
      except Exception as unforeseen:  # a defect of this part must not stop the next
        error = f"{type(unforeseen).__name__}: {unforeseen}"
      secs = runner.secs
    self._record.add(
      part.name, [*rows, {"secs": secs, "num_rows": len(rows), "ended": error or "well"}]
    )
    with self._lock, self._log.open("a") as log:
      log.write(runner.log())
    self._say(f"{part.name}: {error or f'{len(rows)} rows'}")
    return error is None

  def _say(self, line: str) -> None:
    print(f"[{time.monotonic() - self._began:4.0f} s] {line}", file=sys.stderr, flush=True)
