"""Renders chat templates in a process of its own: `chat.py` starts it and talks to it.

A template is a program that comes with a checkpoint, and Jinja's sandbox bounds neither its time
nor its memory. This process has limits on both and ends when it exceeds one. It reads one line of
JSON for each text, {"source", "values", "secs"}, and answers one, {"text"} or {"error", "at"}. It is run
by its path and imports nothing of dsmoe, so that it starts in a tenth of a second.
"""

import datetime
import functools
import json
import os
import resource
import sys
import time

import jinja2
import jinja2.ext
import jinja2.sandbox

LIMIT_BYTES = 512 * 2**20  # of this process's memory
LIMIT_CHARACTERS = 16 * 2**20  # of one text
EXIT_MEMORY = 3  # the code of a process that ran out of it


class _Generation(jinja2.ext.Extension):
  """Ignores the tags {% generation %} and {% endgeneration %} around an assistant's text."""

  tags = {"generation"}  # noqa: RUF012

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str):
  raise jinja2.TemplateError(message)


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  """Returns JSON that is not escaped for HTML, unlike that of Jinja's own filter."""
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _strftime_now(format: str) -> str:
  return datetime.datetime.now().strftime(format)


FUNCTIONS = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[jinja2.ext.loopcontrols, _Generation],
  )
  environment.filters["tojson"] = _tojson
  environment.globals |= FUNCTIONS
  return environment.from_string(source)


def _answer(source: str, values: dict | None) -> dict[str, str]:
  """Renders a template with its variables, or only compiles it for None."""
  at = "compiling"
  try:
    template, at = _compiled(source), "rendering"
    text = template.render(values) if values is not None else ""
  except MemoryError:
    raise  # ends this process, which may have too little left to go on
  except Exception as error:  # the template is a program and may raise anything
    return {"error": str(error)[:500] or type(error).__name__, "at": at}
  if len(text) > LIMIT_CHARACTERS:
    size = f"its text of {len(text):,} characters exceeds the limit of {LIMIT_CHARACTERS:,}"
    return {"error": size, "at": at}
  return {"text": text}


def _main() -> None:
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
  if sys.platform == "linux":  # others do not hold a process to it
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
  _, hardest = resource.getrlimit(resource.RLIMIT_CPU)
  for line in sys.stdin:
    request = json.loads(line)
    end = int(time.process_time()) + 1 + request["secs"]
    resource.setrlimit(resource.RLIMIT_CPU, (end, hardest))
    print(json.dumps(_answer(request["source"], request["values"])), flush=True)


if __name__ == "__main__":
  try:
    _main()
  except MemoryError:
    os._exit(EXIT_MEMORY)
