"""The texts, token ids and messages of a request as prompts of tokens.

They are counted and measured before any is encoded: encoding is by far the slowest part of
reading a request.
"""

from collections.abc import Sequence
from typing import Any

from dsmoe.inference.text_model import ServedModel
from dsmoe.serving.fields import LARGEST, ApiError, Fields, show, text_of

_ROLES = ("system", "developer", "user", "assistant", "tool")


def completion_prompts(fields: Fields, served: ServedModel, num_choices: int, room: int, most: int):
  """Returns the token ids of the field `prompt`: text, texts, token ids, or lists of those.

  Args:
    fields: the request's.
    served: the model.
    num_choices: of each prompt.
    room: tokens that leave space for the shortest answer wanted; see `_truncated`.
    most: choices that a request may have.

  Raises:
    ApiError: for no prompt, another form, too many prompts, or one that is too long.
  """
  value = fields.get("prompt")
  if value == [] or value is None:
    raise ApiError(f"prompt must have at least 1 token, got {show(value)}", "prompt")
  if isinstance(value, str) or (isinstance(value, list) and type(value[0]) is int):
    value = [value]
  if not isinstance(value, list):
    raise ApiError(f"prompt must be text or token ids, got {show(value)}", "prompt")
  if len(value) * num_choices > most:
    message = f"n times prompts ({len(value) * num_choices}) must be at most {most}"
    raise ApiError(message, "prompt")
  for entry in value:
    if not isinstance(entry, list):
      _measure(text_of(entry, "prompt"), served, "prompt")
    elif not entry or any(type(token) is not int for token in entry):
      raise ApiError(f"prompt must be lists of token ids, got {show(entry)}", "prompt")
  prefix = served.prefix if fields.boolean("add_special_tokens", True) else ()
  last = _truncation(fields, room)
  encoded = iter(_encode(served, [entry for entry in value if isinstance(entry, str)]))
  prompts = []
  for entry in value:
    if isinstance(entry, str):
      prompts.append(_last(prefix, next(encoded), last) or [served.stop_tokens[0]])
    else:
      prompts.append(_last((), entry, last))
  return prompts


def chat_prompt(fields: Fields, served: ServedModel, room: int) -> list[int]:
  """Returns the token ids of the field `messages`, in the form of the model's chat template.

  Raises:
    ApiError: for messages of another form, without a template, or when the template refuses them.
  """
  messages = _messages(fields.get("messages"))
  name = "chat_template_kwargs"
  variables = fields.get(name, {})
  if not isinstance(variables, dict):
    raise ApiError(f"{name} must be an object of the template's own variables", name)
  if served.template is None:
    raise ApiError("this model has no chat template: use /v1/completions", "messages")
  reserved = sorted(variables.keys() & served.template.reserved)
  if reserved:
    raise ApiError(f"{name} must not set {', '.join(reserved)}, which are given already", name)
  begins = fields.boolean("add_generation_prompt", True)
  prefix = served.prefix if fields.boolean("add_special_tokens", False) else ()
  try:
    text = served.template.render(messages, begins, **variables)
  except ValueError as error:
    raise ApiError(ascii(str(error))[1:-1], "messages") from error
  _measure(text_of(text, "messages"), served, "messages")
  [ids] = _encode(served, [text])
  return _last(prefix, ids, _truncation(fields, room)) or [served.stop_tokens[0]]


def _measure(text: str, served: ServedModel, where: str) -> None:
  """Refuses a text before it is encoded if even the longest tokens are too many for it."""
  size, limit = len(text.encode()), served.max_prompt_bytes
  if size > limit:
    message = f"the text of {where} must be at most {limit} bytes, got {size}: this model's "
    message += f"maximum context length is {served.max_tokens_per_row} tokens"
    raise ApiError(message, where, "context_length_exceeded")


def _encode(served: ServedModel, texts: Sequence[str]) -> list[list[int]]:
  """Encodes texts; other threads run meanwhile, which `Tokenizer.encode` would not let them."""
  return [e.ids for e in served.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def _truncation(fields: Fields, room: int) -> int:
  """Returns how many tokens of a prompt are kept, from its end; -1 is as many as fit."""
  wanted = fields.integer("truncate_prompt_tokens", LARGEST, -1, LARGEST)
  if wanted == 0:
    name = "truncate_prompt_tokens"
    raise ApiError(f"{name} must be -1 or at least 1, got 0", name)
  return max(room, 1) if wanted == -1 else wanted


def _last(prefix: Sequence[int], ids: Sequence[int], num_tokens: int) -> list[int]:
  """Returns the prefix and the last of the ids, together at most `num_tokens`.

  What begins with the prefix, such as the text of a chat template, gets no second one.
  """
  if list(ids[: len(prefix)]) == list(prefix):
    ids = ids[len(prefix) :]
  room = num_tokens - len(prefix)
  if room <= 0:
    return [*prefix, *ids][-num_tokens:]
  return [*prefix, *ids[-room:]]


def _messages(value: Any) -> list[dict[str, Any]]:
  """Returns messages with their text as one string each."""
  if not isinstance(value, list) or not value:
    raise ApiError(f"messages must be a list of at least 1, got {show(value)}", "messages")
  result = []
  for i, message in enumerate(value):
    where = f"messages[{i}]"
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
      raise ApiError(f"{where}.role must be one of {', '.join(_ROLES)}", "messages")
    content = message.get("content")
    if isinstance(content, list):
      for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
          raise ApiError(f"{where}.content must be text only, got {show(part)}", "messages")
      content = "".join(text_of(part.get("text"), f"{where}.content") for part in content)
    elif content is not None or not message.get("tool_calls"):
      text_of(content, f"{where}.content")
    result.append(message | {"content": content})
  return result
