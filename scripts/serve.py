"""Serves a checkpoint over HTTP with OpenAI's API.

  python scripts/serve.py --workdir=runs/tiny --port=8000
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"model": "tiny", "prompt": "def ", "max_tokens": 32}'

An API key, if clients must send one, is the content of --api_key_file or of $DSMOE_API_KEY.
It first compiles its programs, all that it will ever run, which takes seconds for each. After
SIGTERM running requests are finished and new ones refused; a second one ends those too.
"""

import errno
import ipaddress
import os
import socket
import sys
import time

from absl import flags, logging
from etils import epath

from dsmoe import runtime
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference import text_model
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.platforms import cpu
from dsmoe.reporting import output
from dsmoe.serving import http, server
from dsmoe.serving.batcher_thread import BatcherThread

_WORKDIR = flags.DEFINE_string("workdir", None, "The run's, on disk or gs://.", required=True)
_STEP = flags.DEFINE_integer("step", None, "The checkpoint; by default the newest.")
_MODEL_NAME = flags.DEFINE_string("model_name", "", "By default the last part of --workdir.")
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all of this machine's."
)
_PORT = flags.DEFINE_integer(
  "port", 8000, "Port to listen on; 0 for a free one.", lower_bound=0, upper_bound=65535
)
_API_KEY_FILE = flags.DEFINE_string(
  "api_key_file", "", "A file with the API key; by default $DSMOE_API_KEY, or no key."
)
_MAX_ROWS = flags.DEFINE_integer("max_rows", 8, "Choices generated at once.", lower_bound=1)
_MAX_QUEUE = flags.DEFINE_integer("max_queue", 256, "Choices that may wait.", lower_bound=0)
_CACHE_BYTES = flags.DEFINE_integer(
  "cache_bytes",
  2**30,
  "Upper limit of the cache of attention's latents on a device.",
  lower_bound=1,
)
_SPECULATE = flags.DEFINE_bool("speculate", False, "Draft tokens with the first MTP module.")
_MESH = flags.DEFINE_list(
  "mesh", [], "Sizes of mesh axes, as data:2,expert:4,model:2; by default one device is used."
)
_MAX_BODY_BYTES = flags.DEFINE_integer(
  "max_body_bytes", 4 * 2**20, "Upper limit of a request's body.", lower_bound=1
)
_REQUEST_SECS = flags.DEFINE_float(
  "request_secs", 600, "Time in which a request must be answered.", lower_bound=0.001
)
_DRAIN_SECS = flags.DEFINE_float(
  "drain_secs", 30, "Time that running requests have after SIGTERM.", lower_bound=0
)


def api_key() -> str:
  """Returns the key; "" for none.

  Raises:
    ValueError: for a file that is missing or empty.
  """
  if not _API_KEY_FILE.value:
    return os.environ.get("DSMOE_API_KEY", "")
  path = epath.Path(_API_KEY_FILE.value)
  key = path.read_text().strip() if path.exists() else ""
  if not key:
    raise ValueError(f"api_key_file must hold a key, {path} does not")
  return key


def is_loopback(host_name: str) -> bool:
  """Returns whether an address can be reached from this machine only."""
  try:
    return ipaddress.ip_address(host_name).is_loopback
  except ValueError:
    return host_name == "localhost"


def check_address(host: str, port: int) -> None:
  """Raises ValueError if another process listens there, before the long work of starting."""
  for family, kind, protocol, _, address in socket.getaddrinfo(
    host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
  ):
    with socket.socket(family, kind, protocol) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      try:
        probe.bind(address)
      except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
          raise ValueError(f"port {port} of {host} must be free, got: {error.strerror}") from error


def compile_programs(batcher: batcher_lib.Batcher) -> None:
  """Compiles all that the server runs, with a line of progress for each program."""
  start, total = time.monotonic(), len(batcher.programs())
  for number, (rows, tokens) in enumerate(batcher.compile(), 1):
    what = f"prompts of {tokens} tokens" if tokens else "decoding"
    secs = time.monotonic() - start
    line = f"compiled {number} of {total} programs in {secs:.0f} s: {what}, {rows} at once"
    print(line, file=sys.stderr, flush=True)
  cpu.release_memory()


def main(argv: list[str]) -> None:
  output.refuse_arguments(argv)
  runtime.start()
  key = api_key()
  check_address(_HOST.value, _PORT.value)
  options = batcher_lib.BatcherOptions(_MAX_ROWS.value, _CACHE_BYTES.value, _SPECULATE.value)
  mesh = mesh_lib.axes_of_flag(_MESH.value) if _MESH.value else None
  run, batcher = batcher_lib.load(_WORKDIR.value, _STEP.value, options, mesh)
  cpu.release_memory()  # that restoring and preparing the weights used: compiling comes next
  name = _MODEL_NAME.value or epath.Path(_WORKDIR.value).resolve().name
  folder, limit = run.tokenizer_path.parent, batcher.max_tokens_per_row
  served = text_model.load(folder, run.tokenizer(), name, limit)
  if not key and not is_loopback(_HOST.value):
    logging.warning(
      "this server accepts requests without an API key from anyone who reaches %s", _HOST.value
    )
  limits = server.Limits(_MAX_BODY_BYTES.value, request_secs=_REQUEST_SECS.value)
  thread = BatcherThread(batcher, _MAX_ROWS.value, _MAX_QUEUE.value)
  application = server.Server(served, thread, limits, key)
  compile_programs(batcher)
  http.HttpServer(application, _HOST.value, _PORT.value, _DRAIN_SECS.value).run()


if __name__ == "__main__":
  output.run_script(main)
