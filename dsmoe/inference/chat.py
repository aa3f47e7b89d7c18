"""Turns a conversation into one text by the checkpoint's own chat template, in a sandbox.

Templates are in Jinja, in `chat_template.jinja` or in `tokenizer_config.json`, both beside
`tokenizer.json`. They get the variables and functions that Hugging Face's `apply_chat_template`
gives them.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
from etils import epath

from dsmoe.data import tokenizer as tokenizer_lib
from dsmoe.data.tokenizer import CONFIG_FILE

TEMPLATE_FILE = "chat_template.jinja"


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


class ChatTemplate:
  """A compiled template and the special tokens that it may use."""

  def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
    """Compiles `source`.

    Args:
      source: in Jinja.
      special_tokens: by name, such as `bos_token`.

    Raises:
      ValueError: if it is not valid Jinja.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=[jinja2.ext.loopcontrols, _Generation],
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateError as error:
      raise ValueError(f"the chat template must be valid Jinja, got: {error}") from error
    self._special_tokens = dict(special_tokens or {})

  def render(
    self,
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = True,
    **variables: Any,
  ) -> str:
    """Returns the conversation as the text that the model was trained on.

    A special token's name inside a message becomes that token, as one of the template's does.

    Args:
      messages: each with "role" and "content", and other fields that the template reads.
      add_generation_prompt: end where the assistant's answer begins.
      **variables: other variables of the template, such as `enable_thinking`.

    Raises:
      ValueError: if the template refuses the messages, or fails on them.
    """
    given = {"tools": None, "documents": None} | self._special_tokens | variables
    given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
      return self._template.render(given)
    except Exception as error:  # the template is a program and may raise anything
      raise ValueError(f"the chat template refused the messages: {error}") from error


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
    source = path.read_text(encoding="utf-8")
  elif isinstance(source, list):
    source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
  if source is None:
    return None
  if not isinstance(source, str):
    raise ValueError(f"chat_template must be text, got a {type(source).__name__}")
  return ChatTemplate(source, tokenizer_lib.special_tokens(config))
