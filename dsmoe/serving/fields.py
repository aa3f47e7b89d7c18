"""The fields of a request's JSON, checked one by one, and refusals in OpenAI's form."""

import json
from typing import Any

LARGEST = 2**31 - 1  # int32, as tokens are counted

# Fields that do not change the answer.
IGNORED = {
  "metadata",
  "parallel_tool_calls",
  "prompt_cache_key",
  "prompt_cache_retention",
  "request_id",
  "safety_identifier",
  "service_tier",
  "spaces_between_special_tokens",
  "store",
  "user",
  "verbosity",
}
# Fields of features that this server lacks, with the values that do not ask for the feature.
NEUTRAL: dict[str, tuple[Any, ...]] = {
  "suffix": (None, ""),
  "tools": (None, []),
  "functions": (None, []),
  "tool_choice": (None, "none", "auto"),
  "function_call": (None, "none", "auto"),
  "response_format": (None, {"type": "text"}),
  "modalities": (None, ["text"]),
  # Of vLLM's API.
  "allowed_token_ids": (None, []),
  "bad_words": (None, []),
  "continue_final_message": (None, False),
  "continuous_usage_stats": (None, False),
  "documents": (None, []),
  "early_stopping": (None, False),
  "include_stop_str_in_output": (None, False),
  "length_penalty": (None, 1),
  "priority": (None, 0),
  "return_token_ids": (None, False),
  "return_tokens_as_token_ids": (None, False),
  "use_beam_search": (None, False),
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


class Fields:
  """Reads the fields of a JSON object and checks types and ranges; knows which were not read."""

  def __init__(self, values: dict[str, Any]):
    self._values, self._known = values, set(IGNORED)

  def get(self, name: str, default: Any = None) -> Any:
    """Returns a field's value, or the default when it is absent or null."""
    self._known.add(name)
    value = self._values.get(name)
    return default if value is None else value

  def boolean(self, name: str, default: bool = False) -> bool:
    value = self.get(name, default)
    if not isinstance(value, bool):
      raise ApiError(f"{name} must be a boolean, got {show(value)}", name)
    return value

  def integer(self, name: str, default: int | None, low: int, high: int) -> Any:
    value = self.get(name, default)
    if value is None:
      return None
    if type(value) is not int or not low <= value <= high:
      raise ApiError(f"{name} must be an integer from {low} to {high}, got {show(value)}", name)
    return value

  def integers(self, name: str, low: int, high: int) -> tuple[int, ...]:
    """Returns a list of integers; empty when the field is absent."""
    values = self.get(name, [])
    if not isinstance(values, list) or not all(type(v) is int and low <= v <= high for v in values):
      message = f"{name} must be a list of integers from {low} to {high}, got {show(values)}"
      raise ApiError(message, name)
    return tuple(values)

  def number(self, name: str, default: float, low: float, high: float) -> float:
    value = self.get(name, default)
    if type(value) not in (int, float) or not low <= value <= high:
      raise ApiError(f"{name} must be a number from {low} to {high}, got {show(value)}", name)
    return float(value)

  def refuse_others(self) -> None:
    """Raises ApiError for a field that was not read, unless its value asks for nothing."""
    for name, value in self._values.items():
      if name not in self._known and value not in NEUTRAL.get(name, (None,)):
        message = f"{show(name)} is not supported here, got {show(value)}"
        raise ApiError(message, ascii(name)[1:-1][:80], "unsupported_parameter")


def show(value: Any) -> str:
  """Returns the beginning of a value as it is written; valid text whatever was sent."""
  try:
    return ascii(value)[:80]
  except RecursionError:
    return f"a {type(value).__name__} of very many levels"


def text_of(value: Any, name: str) -> str:
  """Returns a string that is valid Unicode: JSON can spell halves of surrogate pairs."""
  if not isinstance(value, str):
    raise ApiError(f"{name} must be a string, got {show(value)}", name)
  try:
    value.encode()
  except UnicodeEncodeError as error:
    raise ApiError(f"{name} must be valid Unicode, got {show(value)}", name) from error
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
    raise ApiError(f"the body must be a JSON object, got {show(values)}")
  return values
