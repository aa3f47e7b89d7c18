"""Requests in OpenAI's JSON: checked field by field, and turned into work for the batcher."""

import dataclasses
import json
import secrets
from typing import Any, NamedTuple

from dsmoe.inference.sampling import MAX_LOGPROBS, Sampling
from dsmoe.inference.text_model import ServedModel

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256
MAX_CHOICES = 128
_LARGEST = 2**31 - 1  # int32, as tokens are counted
_DEFAULT_TOKENS = 16  # of a completion; a chat message may fill the context
_ROLES = ("system", "developer", "user", "assistant", "tool")

# Fields that do not change the answer.
_IGNORED = {
  "metadata",
  "parallel_tool_calls",
  "prompt_cache_key",
  "prompt_cache_retention",
  "safety_identifier",
  "service_tier",
  "store",
  "user",
  "verbosity",
}
# Fields of features that this server lacks, with the values that do not ask for the feature.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
  "presence_penalty": (None, 0),
  "frequency_penalty": (None, 0),
  "logit_bias": (None, {}),
  "suffix": (None, ""),
  "tools": (None, []),
  "functions": (None, []),
  "tool_choice": (None, "none", "auto"),
  "function_call": (None, "none", "auto"),
  "response_format": (None, {"type": "text"}),
  "modalities": (None, ["text"]),
}


class ApiError(Exception):
  """A refusal in the form of OpenAI's errors."""

  def __init__(
    self,
    message: str,
    param: str | None = None,
    code: str | None = None,
    status: int = 400,
    type: str = "invalid_request_error",
  ):
    """Makes the error's body.

    Args:
      message: the rule that was broken, and the values.
      param: the field at fault.
      code: a name for programs to test.
      status: of HTTP.
      type: the class of error, in OpenAI's names.
    """
    super().__init__(message)
    self.status = status
    self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


class ChoiceRequest(NamedTuple):
  """A prompt to continue for one choice of the answer."""

  prompt: list[int]
  sampling: Sampling


@dataclasses.dataclass(frozen=True)
class Request:
  """A checked request."""

  choices: list[ChoiceRequest]  # prompts in order, the choices of each together
  num_prompt_tokens: int  # each prompt counted once
  is_chat: bool
  stream: bool
  include_usage: bool
  echo: bool
  stops: tuple[str, ...]


class _Fields:
  """Reads the fields of a JSON object and checks types and ranges; knows which were not read."""

  def __init__(self, values: dict[str, Any]):
    self._values, self._known = values, set(_IGNORED)

  def get(self, name: str, default: Any = None) -> Any:
    """Returns a field's value, or the default when it is absent or null."""
    self._known.add(name)
    value = self._values.get(name)
    return default if value is None else value

  def boolean(self, name: str, default: bool = False) -> bool:
    value = self.get(name, default)
    if not isinstance(value, bool):
      raise ApiError(f"{name} must be a boolean, got {_show(value)}", name)
    return value

  def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
    value = self.get(name, default)
    if value is None:
      return None
    if type(value) is not int or not low <= value <= high:
      raise ApiError(f"{name} must be an integer from {low} to {high}, got {_show(value)}", name)
    return value

  def number(self, name: str, default: float, low: float, high: float) -> float:
    value = self.get(name, default)
    if type(value) not in (int, float) or not low <= value <= high:
      raise ApiError(f"{name} must be a number from {low} to {high}, got {_show(value)}", name)
    return float(value)

  def refuse_others(self) -> None:
    """Raises ApiError for a field that was not read, unless its value asks for nothing."""
    for name, value in self._values.items():
      if name not in self._known and value not in _NEUTRAL.get(name, (None,)):
        message = f"{_show(name)} is not supported here, got {_show(value)}"
        raise ApiError(message, ascii(name)[1:-1][:80], "unsupported_parameter")


def _show(value: Any) -> str:
  return ascii(value)[:80]  # ascii: a message must be valid text whatever was sent


def _text(value: Any, name: str) -> str:
  """Returns a string that is valid Unicode: JSON can spell halves of surrogate pairs."""
  if not isinstance(value, str):
    raise ApiError(f"{name} must be a string, got {_show(value)}", name)
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ApiError(f"{name} must be valid Unicode, got {_show(value)}", name) from error
  return value


def parse_json(body: bytes) -> dict[str, Any]:
  """Returns a JSON object; raises ApiError for anything else, NaN and Infinity included."""

  def no_constant(name):
    raise ValueError(f"{name} is not JSON")

  try:
    values = json.loads(body, parse_constant=no_constant)
  except (ValueError, RecursionError) as error:
    raise ApiError(f"the body must be valid JSON: {ascii(str(error))[1:-1][:200]}") from error
  if not isinstance(values, dict):
    raise ApiError(f"the body must be a JSON object, got {_show(values)}")
  return values


def _prompts(fields: _Fields, served: ServedModel) -> list[list[int]]:
  """Returns the token ids of a string, strings, token ids, or lists of token ids."""
  value, special = fields.get("prompt"), fields.boolean("add_special_tokens", True)
  if value == [] or value is None:
    raise ApiError(f"prompt must have at least 1 token, got {_show(value)}", "prompt")
  if isinstance(value, str) or (isinstance(value, list) and type(value[0]) is int):
    value = [value]
  if not isinstance(value, list):
    raise ApiError(f"prompt must be text or token ids, got {_show(value)}", "prompt")
  prompts = []
  for entry in value:
    if isinstance(entry, list):
      if not entry or any(type(token) is not int for token in entry):
        raise ApiError(f"prompt must be lists of token ids, got {_show(entry)}", "prompt")
      prompts.append(entry)
    else:
      ids = served.encode(_text(entry, "prompt"), special)
      prompts.append(ids or [served.stop_tokens[0]])
  return prompts


def _stops(value: Any) -> tuple[str, ...]:
  stops = [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or len(stops) > MAX_STOPS:
    raise ApiError(f"stop must be a string or at most {MAX_STOPS}, got {_show(value)}", "stop")
  for stop in stops:
    if not 1 <= len(_text(stop, "stop")) <= MAX_STOP_CHARACTERS:
      raise ApiError(f"stop must have 1 to {MAX_STOP_CHARACTERS} characters each", "stop")
  return tuple(stops)


def _messages(value: Any) -> list[dict[str, Any]]:
  """Returns messages with their text as one string each."""
  if not isinstance(value, list) or not value:
    raise ApiError(f"messages must be a list of at least 1, got {_show(value)}", "messages")
  result = []
  for i, message in enumerate(value):
    where = f"messages[{i}]"
    if not isinstance(message, dict) or message.get("role") not in _ROLES:
      raise ApiError(f"{where}.role must be one of {', '.join(_ROLES)}", "messages")
    content = message.get("content")
    if isinstance(content, list):
      for part in content:
        if not isinstance(part, dict) or part.get("type") != "text":
          raise ApiError(f"{where}.content must be text only, got {_show(part)}", "messages")
      content = "".join(_text(part.get("text"), f"{where}.content") for part in content)
    elif content is not None or not message.get("tool_calls"):
      _text(content, f"{where}.content")
    result.append(message | {"content": content})
  return result


def _chat_prompt(fields: _Fields, served: ServedModel) -> list[int]:
  messages = _messages(fields.get("messages"))
  variables = fields.get("chat_template_kwargs", {})
  if not isinstance(variables, dict) or variables.keys() & {"messages", "add_generation_prompt"}:
    name = "chat_template_kwargs"
    raise ApiError(f"{name} must be an object of the template's own variables", name)
  if served.template is None:
    raise ApiError("this model has no chat template: use /v1/completions", "messages")
  try:
    text = served.template.render(messages, **variables)
  except ValueError as error:
    raise ApiError(ascii(str(error))[1:-1], "messages") from error
  # As in vLLM: a template writes its own special tokens.
  ids = served.encode(_text(text, "messages"), fields.boolean("add_special_tokens"))
  return ids or [served.stop_tokens[0]]


def _max_tokens(wanted: int | None, default: int, num_prompt: int, limit: int, where: str) -> int:
  """Returns how many tokens to generate; with the prompt they must fit in the context."""
  room = limit - num_prompt
  num_tokens = min(default, max(room, 1)) if wanted is None else wanted
  if num_tokens > room:
    raise ApiError(
      f"This model's maximum context length is {limit} tokens. However, you requested "
      f"{num_prompt + num_tokens} tokens ({num_prompt} in the {where}, {num_tokens} in the "
      f"completion). Please reduce the length of the {where} or completion.",
      where,
      "context_length_exceeded",
    )
  return num_tokens


def _check_model(fields: _Fields, served: ServedModel) -> None:
  name = fields.get("model")
  if name is None:
    raise ApiError("you must provide a model parameter", "model")
  if name != served.name:
    message = f"The model {_show(name)} does not exist; {served.name!r} does"
    raise ApiError(message, "model", "model_not_found", 404)


def _includes_usage(fields: _Fields, stream: bool) -> bool:
  """Returns whether a stream should end with the numbers of tokens."""
  options = fields.get("stream_options", {})
  if not isinstance(options, dict) or (options and not stream):
    raise ApiError("stream_options must be an object, and only with stream", "stream_options")
  stream_fields = _Fields(options)
  include_usage = stream_fields.boolean("include_usage")
  stream_fields.boolean("include_obfuscation")
  stream_fields.refuse_others()
  return include_usage


def _chat_logprobs(fields: _Fields) -> int | None:
  """Returns the number of alternatives reported with each token; None for no log-probabilities."""
  num_top = fields.integer("top_logprobs", None, 0, MAX_LOGPROBS)
  if fields.boolean("logprobs"):
    return num_top or 0
  if num_top:
    raise ApiError("top_logprobs must come with logprobs", "top_logprobs")
  return None


def parse(values: dict[str, Any], served: ServedModel, is_chat: bool) -> Request:
  """Checks a request and encodes its prompts.

  Raises:
    ApiError: for a field that is missing, unknown, of another type or out of range, a model that
      is not served, or more tokens than the context holds.
  """
  fields = _Fields(values)
  _check_model(fields, served)
  stream = fields.boolean("stream")
  include_usage = _includes_usage(fields, stream)
  if is_chat:
    echo, prompts, logprobs = False, [_chat_prompt(fields, served)], _chat_logprobs(fields)
    wanted = fields.integer("max_tokens", None, 1, _LARGEST)
    wanted = fields.integer("max_completion_tokens", wanted, 1, _LARGEST)
  else:
    echo, prompts = fields.boolean("echo"), _prompts(fields, served)
    logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
    wanted = fields.integer("max_tokens", None, 0, _LARGEST)
  num_choices = fields.integer("n", 1, 1, MAX_CHOICES)
  if fields.integer("best_of", num_choices, 1, MAX_CHOICES) != num_choices:
    raise ApiError(f"best_of must be n ({num_choices})", "best_of")
  seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
  settings: dict[str, Any] = {
    "temperature": fields.number("temperature", 1, 0, 2),
    "top_p": fields.number("top_p", 1, 0, 1) or 1e-9,  # 0 keeps the likeliest token alone
    "min_p": fields.number("min_p", 0, 0, 1),
    "top_k": fields.integer("top_k", 0, 0, _LARGEST),
    "repetition_penalty": fields.number("repetition_penalty", 1, 0.01, 100),
    "logprobs": logprobs,
    "prompt_logprobs": echo and logprobs is not None,
  }
  stops = _stops(fields.get("stop", []))
  fields.refuse_others()

  choices: list[ChoiceRequest] = []
  limit = served.max_tokens_per_row
  default = limit if is_chat else _DEFAULT_TOKENS
  first_seed = secrets.randbits(62) if seed is None else seed
  for prompt in prompts:
    where = "messages" if is_chat else "prompt"
    max_tokens = _max_tokens(wanted, default, len(prompt), limit, where)
    # Evaluation harnesses ask for one token with its log-probability, which must be there even
    # when the token ends the text.
    ends = () if max_tokens == 1 and logprobs is not None else served.stop_tokens
    settings |= {"max_tokens": max_tokens, "stop_tokens": ends}
    for _ in range(num_choices):
      sampling = Sampling(seed=(first_seed + len(choices)) % 2**63, **settings)
      choices.append(ChoiceRequest(prompt, sampling))
  num_prompt_tokens = sum(map(len, prompts))
  return Request(choices, num_prompt_tokens, is_chat, stream, include_usage, echo, stops)
