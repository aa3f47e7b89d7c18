"""Requests to a server of the run that a session has trained, as a part of the session."""

import json
import re
import signal
import statistics
import time
import urllib.request
from concurrent import futures
from typing import Any

from dsmoe.on_device import training
from dsmoe.on_device.processes import Failed, Runner

_ADDRESS = re.compile(r"serving (\S+) on (http://\S+)")


def measure(runner: Runner, rows: list[dict[str, Any]], is_dry_run: bool) -> None:
  """Starts the server, sends 20 requests at once, stops it by SIGTERM; adds one row.

  Raises:
    Failed: also without a run, when a request is not answered, or the server does not drain.
  """
  workdir = runner.folder / training.WORKDIR
  if not (workdir / "checkpoints").exists():
    raise Failed("there must be a trained run, the part train has left none")
  number, tokens = (4, 3) if is_dry_run else (20, 32)
  args = ["--port=0", f"--max_rows={1 if is_dry_run else 8}"]
  server = runner.start("scripts/serve.py", f"--workdir={workdir}", *args)
  began_secs = runner.secs
  runner.wait_for(server, lambda: _ADDRESS.search(runner.text(server)) is not None, "serving")
  start_secs = runner.secs - began_secs
  found = _ADDRESS.search(runner.text(server))
  assert found is not None
  name, url = found.groups()

  def ask(i: int) -> tuple[int, float]:
    body = {"model": name, "prompt": f"def f{i % 5}(x", "max_tokens": tokens, "ignore_eos": True}
    return _answered(f"{url}/v1/completions", body, runner.left_secs)

  began_secs = runner.secs
  with futures.ThreadPoolExecutor(number) as pool:
    answers = list(pool.map(ask, range(number)))
  all_secs = runner.secs - began_secs
  rows.append(
    {
      "requests": number,
      "answered": sum(count == tokens for count, _ in answers),
      "new_tokens": sum(count for count, _ in answers),
      "tokens_per_sec": sum(count for count, _ in answers) / all_secs,
      "median_secs": statistics.median(secs for _, secs in answers),
      "longest_secs": max(secs for _, secs in answers),
      "start_secs": start_secs,
    }
  )
  if rows[-1]["answered"] < number:
    raise Failed(f"each of {number} requests must get {tokens} tokens, got {answers}")
  server.popen.send_signal(signal.SIGTERM)
  runner.finish(server)


def _answered(url: str, body: dict[str, Any], limit_secs: float) -> tuple[int, float]:
  """Posts a request; returns the number of tokens and the seconds of the answer.

  Raises:
    Failed: for an answer that is none, or comes too late.
  """
  data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
  began = time.monotonic()
  try:
    direct = urllib.request.build_opener(
      urllib.request.ProxyHandler({})
    )  # whatever http_proxy says
    with direct.open(urllib.request.Request(url, data, headers), timeout=limit_secs) as answer:
      tokens = json.load(answer)["usage"]["completion_tokens"]
  except (OSError, ValueError, KeyError) as error:
    raise Failed(f"a request must be answered, got {error}") from error
  return tokens, time.monotonic() - began
