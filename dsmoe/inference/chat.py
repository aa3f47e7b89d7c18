"""Turns a conversation into one text by the checkpoint's own chat template.

Templates are in Jinja, in `chat_template.jinja` or in `tokenizer_config.json`, both beside
`tokenizer.json`. They get the variables and functions that Hugging Face's `apply_chat_template`
gives them. They run in Jinja's sandbox, in a process with limits on time and memory.
"""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from etils import epath

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.tokenizer import CONFIG_FILE
from dsmoe.inference import template_program as program

TEMPLATE_FILE = "chat_template.jinja"
# Processor time is what is limited; this bounds the time of one that waits, or of a busy machine.
_PATIENCE = 12


class _Renderer:
  """The process that renders; started when first needed, and again after it has ended."""

  def __init__(self, limit_secs: int = 5):
    """Prepares to start it; `limit_secs` of processor time are for one text."""
    self._limit_secs = limit_secs
    self._process: subprocess.Popen | None = None
    self._lock = threading.Lock()

  def ask(self, source: str, values: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns the process's answer, see template_program.py; its unexpected end is one too."""
    line = json.dumps({"source": source, "values": values, "secs": self._limit_secs}) + "\n"
    with self._lock:
      if self._process is None or self._process.poll() is not None:
        self._process = _start()
      process = self._process
      timer = threading.Timer(_PATIENCE * self._limit_secs, process.kill)
      timer.start()
      try:
        answer = _exchange(process, line)
      except BaseException:  # Ctrl-C too: an answer that nobody reads must not be the next one's
        process.kill()
        raise
      finally:
        timer.cancel()
    if answer:
      return json.loads(answer)
    return {"error": _why(process, self._limit_secs), "at": "rendering"}


def _start() -> subprocess.Popen:
  return subprocess.Popen(
    [sys.executable, "-P", program.__file__],  # -P: the modules beside it are not Python's own
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    encoding="utf-8",
    start_new_session=True,  # Ctrl-C in a terminal is not for it
  )


def _exchange(process: subprocess.Popen, line: str) -> str:
  """Sends a line and returns the answer's; "" when the process has ended instead."""
  assert process.stdin is not None and process.stdout is not None
  try:
    process.stdin.write(line)
    process.stdin.flush()
  except BrokenPipeError:
    return ""
  return process.stdout.readline()


def _why(process: subprocess.Popen, limit_secs: int) -> str:
  """Returns what the process exceeded that ended without an answer."""
  code = process.wait()
  if code == -signal.SIGXCPU:
    return f"it needs more than {limit_secs} seconds of processor time"
  if code == program.EXIT_MEMORY:
    return f"it needs more than {program.LIMIT_BYTES >> 20} MiB of memory"
  return f"the process that ran it was ended, with code {code}"


_RENDERER = _Renderer()


class ChatTemplate:
  """A template and the special tokens that it may use."""

  def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
    """Checks `source`.

    Args:
      source: in Jinja.
      special_tokens: by name, such as `bos_token`.

    Raises:
      ValueError: if it is not valid Jinja, or compiling it exceeds the limits.
    """
    self._source = source
    self._special_tokens = dict(special_tokens or {})
    # Names of variables that a caller may not set.
    self.reserved = frozenset(
      {"self", "messages", "add_generation_prompt", *program.FUNCTIONS, *self._special_tokens}
    )
    message = _RENDERER.ask(source, None).get("error")
    if message is not None:
      reason = f"the chat template must be valid Jinja, got: {message}"
      raise ValueError(reason) from jinja2.TemplateError(message)

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    /,
    add_generation_prompt: bool = True,
    **variables: Any,
  ) -> str:
    """Returns the conversation as the text that the model was trained on.

    A special token's name inside a message becomes that token, as one of the template's does.

    Args:
      messages: each with "role" and "content", and other fields that the template reads; JSON's
        values, like the variables.
      add_generation_prompt: end where the assistant's answer begins.
      **variables: other variables of the template, such as `enable_thinking`.

    Raises:
      ValueError: if the template refuses the messages, fails on them, or exceeds the limits on
        time, memory and the text's length.
    """
    given = {"tools": None, "documents": None} | self._special_tokens | variables
    given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
      answer = _RENDERER.ask(self._source, given)
    except (TypeError, RecursionError) as error:
      raise ValueError(f"messages and variables must be values of JSON, got: {error}") from error
    if "error" in answer:
      raise ValueError(f"the chat template refused the messages: {answer['error']}")
    return answer["text"]


def load_template(folder: epath.PathLike) -> ChatTemplate | None:
  """Loads the template beside a tokenizer; `chat_template.jinja` is preferred.

  Returns:
    The template, the one named "default" of several; None when there is none.

  Raises:
    ValueError: for a file or a template that cannot be read.
  """
  config = tokenizer_lib.read_settings(folder, CONFIG_FILE)
  path = epath.Path(folder) / TEMPLATE_FILE
  source = config.get("chat_template")
  if path.exists():
    source = tokenizer_lib.read_text(path)
  elif isinstance(source, list):
    named = [e for e in source if isinstance(e, dict) and e.get("name") == "default"]
    if source and not all(isinstance(entry, dict) for entry in source):
      raise ValueError(
        f"the entries of chat_template in {epath.Path(folder) / CONFIG_FILE} must be objects with "
        f"name and template, got {source!r:.80}"
      )
    source = named[-1].get("template") if named else None
  if source is None:
    return None
  if not isinstance(source, str):
    raise ValueError(f"chat_template must be text, got a {type(source).__name__}")
  return ChatTemplate(source, tokenizer_lib.special_tokens(config))
