"""Requests in OpenAI's JSON: checked field by field, and turned into work for the batcher.

Fields of vLLM's API have the meaning that its documentation gives them.
"""

import dataclasses
import secrets
from typing import Any, NamedTuple

from dsmoe.inference.sampling import MAX_LOGPROBS, MAX_STOP_TOKENS, Sampling
from dsmoe.inference.text_model import ServedModel
from dsmoe.serving.fields import LARGEST, ApiError, Fields, show, text_of
from dsmoe.serving.prompts import chat_prompt, completion_prompts

MAX_STOPS = 64
MAX_STOP_CHARACTERS = 256
MAX_CHOICES = 128
MAX_BIASES = 1024
MAX_PROMPT_LOGPROBS = 2**21  # of all prompts' tokens, alternatives included
_DEFAULT_TOKENS = 16  # of a completion; a chat message may fill the context


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
  stops: tuple[str, ...]  # texts that end a choice and are not returned
  ends: tuple[int, ...]  # tokens that do the same
  skip_special_tokens: bool
  # The number of likeliest tokens reported with each token's log-probability, None for none: of
  # new tokens, with `echo` of the prompt's too; and of the prompt's tokens in vLLM's form.
  logprobs: int | None
  prompt_logprobs: int | None


def _max_tokens(
  wanted: int | None, num_prompt: int, limit: int, is_chat: bool, min_tokens: int
) -> int:
  """Returns how many tokens to generate; with the prompt they must fit in the context."""
  room, where = limit - num_prompt, "messages" if is_chat else "prompt"
  default = limit if is_chat else _DEFAULT_TOKENS
  num_tokens = min(default, max(room, 1)) if wanted is None else wanted
  if num_tokens > room:
    raise ApiError(
      f"This model's maximum context length is {limit} tokens. However, you requested "
      f"{num_prompt + num_tokens} tokens ({num_prompt} in the {where}, {num_tokens} in the "
      f"completion). Please reduce the length of the {where} or completion.",
      where,
      "context_length_exceeded",
    )
  if min_tokens > num_tokens:
    message = f"min_tokens ({min_tokens}) must be at most max_tokens ({num_tokens})"
    raise ApiError(message, "min_tokens")
  return num_tokens


def _num_choices(fields: Fields, max_choices: int) -> int:
  """Returns the number of choices of each prompt."""
  num_choices = fields.integer("n", 1, 1, MAX_CHOICES)
  if fields.integer("best_of", num_choices, 1, MAX_CHOICES) != num_choices:
    raise ApiError(f"best_of must be n ({num_choices})", "best_of")
  if num_choices > max_choices:
    raise ApiError(f"n times prompts ({num_choices}) must be at most {max_choices}", "prompt")
  return num_choices


def _count_logprobs(num_logprobs: int) -> None:
  """Refuses an answer that would be too large: a small request can ask for gigabytes."""
  if num_logprobs > MAX_PROMPT_LOGPROBS:
    message = f"the prompts' log-probabilities must be at most {MAX_PROMPT_LOGPROBS}"
    raise ApiError(f"{message}, got {num_logprobs}: send fewer prompts at once", "prompt")


def _check_model(fields: Fields, served: ServedModel) -> None:
  name = fields.get("model")
  if name is None:
    raise ApiError("you must provide a model parameter", "model")
  if name != served.name:
    message = f"The model {show(name)} does not exist; {served.name!r} does"
    raise ApiError(message, "model", "model_not_found", 404)


def _stops(fields: Fields) -> tuple[str, ...]:
  """Returns the texts of the field `stop`; an empty one by itself asks for none."""
  value = fields.get("stop", [])
  if value == "":
    return ()
  stops = [value] if isinstance(value, str) else value
  if not isinstance(stops, list) or len(stops) > MAX_STOPS:
    raise ApiError(f"stop must be a string or at most {MAX_STOPS}, got {show(value)}", "stop")
  for stop in stops:
    if not 1 <= len(text_of(stop, "stop")) <= MAX_STOP_CHARACTERS:
      raise ApiError(f"stop must have 1 to {MAX_STOP_CHARACTERS} characters each", "stop")
  return tuple(stops)


def _ends(fields: Fields, served: ServedModel) -> tuple[int, ...]:
  """Returns the tokens that end a choice: the model's, unless ignored, and the request's."""
  wanted = fields.integers("stop_token_ids", 0, LARGEST)
  own = () if fields.boolean("ignore_eos") else served.stop_tokens
  ends = tuple(dict.fromkeys([*own, *wanted]))  # without duplicates
  if len(ends) > MAX_STOP_TOKENS:
    most = MAX_STOP_TOKENS - len(own)
    message = f"stop_token_ids must be at most {most} beside the model's {len(own)}"
    raise ApiError(f"{message}, got {len(ends) - len(own)}", "stop_token_ids")
  return ends


def _logit_bias(fields: Fields) -> tuple[tuple[int, float], ...]:
  """Returns what is added to the logits, by token."""
  name = "logit_bias"
  value = fields.get(name, {})
  rule = f"{name} must be an object of at most {MAX_BIASES} token ids with numbers from -100 to 100"
  if not isinstance(value, dict) or len(value) > MAX_BIASES:
    raise ApiError(f"{rule}, got {show(value)}", name)
  for token, bias in value.items():
    if not (token.isascii() and token.isdecimal() and len(token) < 10):
      raise ApiError(f"{rule}, got the token {show(token)}", name)
    if type(bias) not in (int, float) or not -100 <= bias <= 100:
      raise ApiError(f"{rule}, got {show(bias)}", name)
  return tuple({int(token): float(bias) for token, bias in value.items()}.items())


def _sampling(fields: Fields) -> dict[str, Any]:
  """Returns how tokens are drawn."""
  return {
    "temperature": fields.number("temperature", 1, 0, 2),
    "top_p": fields.number("top_p", 1, 0, 1) or 1e-9,  # 0 keeps the likeliest token alone
    "min_p": fields.number("min_p", 0, 0, 1),
    "top_k": max(fields.integer("top_k", 0, -1, LARGEST), 0),  # -1 and 0 are all tokens
    "repetition_penalty": fields.number("repetition_penalty", 1, 0.01, 100),
    "presence_penalty": fields.number("presence_penalty", 0, -2, 2),
    "frequency_penalty": fields.number("frequency_penalty", 0, -2, 2),
    "logit_bias": _logit_bias(fields),
    "min_tokens": fields.integer("min_tokens", 0, 0, LARGEST),
  }


def _includes_usage(fields: Fields, stream: bool) -> bool:
  """Returns whether a stream should end with the numbers of tokens."""
  options = fields.get("stream_options", {})
  if not isinstance(options, dict) or (options and not stream):
    raise ApiError("stream_options must be an object, and only with stream", "stream_options")
  stream_fields = Fields(options)
  include_usage = stream_fields.boolean("include_usage")
  stream_fields.boolean("include_obfuscation")
  stream_fields.refuse_others()
  return include_usage


def _prompt_logprobs(fields: Fields, stream: bool) -> int | None:
  num_top = fields.integer("prompt_logprobs", None, 0, MAX_LOGPROBS)
  if num_top is not None and stream:
    raise ApiError("prompt_logprobs must come without stream", "prompt_logprobs")
  return num_top


def _chat_logprobs(fields: Fields) -> int | None:
  """Returns the number of alternatives reported with each token; None for no log-probabilities."""
  num_top = fields.integer("top_logprobs", None, 0, MAX_LOGPROBS)
  if fields.boolean("logprobs"):
    return num_top or 0
  if num_top:
    raise ApiError("top_logprobs must come with logprobs", "top_logprobs")
  return None


def parse(
  values: dict[str, Any], served: ServedModel, is_chat: bool, max_choices: int = LARGEST
) -> Request:
  """Checks a request and encodes its prompts, which takes as long as they are.

  Args:
    values: of the request's JSON.
    served: the model.
    is_chat: whether it has messages in place of prompts.
    max_choices: prompts times n.

  Raises:
    ApiError: for a field that is missing, unknown, of another type or out of range, a model that
      is not served, more choices, or more tokens than the context holds.
  """
  fields = Fields(values)
  _check_model(fields, served)
  stream = fields.boolean("stream")
  include_usage = _includes_usage(fields, stream)
  if is_chat:
    echo, logprobs, lowest = False, _chat_logprobs(fields), 1
  else:
    echo, lowest = fields.boolean("echo"), 0
    logprobs = fields.integer("logprobs", None, 0, MAX_LOGPROBS)
  wanted = fields.integer("max_tokens", None, lowest, LARGEST)
  if is_chat:
    wanted = fields.integer("max_completion_tokens", wanted, 1, LARGEST)
  num_choices = _num_choices(fields, max_choices)
  seed = fields.integer("seed", None, -(2**63), 2**63 - 1)
  settings, stops, ends = _sampling(fields), _stops(fields), _ends(fields, served)
  prompt_logprobs = _prompt_logprobs(fields, stream)
  of_prompt = prompt_logprobs is not None or (echo and logprobs is not None)
  tops = [top for top in (logprobs, prompt_logprobs) if top is not None]
  settings |= {"logprobs": max(tops, default=None), "prompt_logprobs": of_prompt}
  skip_special_tokens = fields.boolean("skip_special_tokens", True)
  limit = served.max_tokens_per_row
  room = limit - (1 if wanted is None else wanted)
  if is_chat:
    prompts = [chat_prompt(fields, served, room)]
  else:
    prompts = completion_prompts(fields, served, num_choices, room, max_choices)
  fields.refuse_others()

  num_prompt_tokens = sum(map(len, prompts))
  if of_prompt:
    _count_logprobs(num_prompt_tokens * num_choices * (1 + max(tops)))
  choices: list[ChoiceRequest] = []
  first_seed = secrets.randbits(62) if seed is None else seed
  for prompt in prompts:
    max_tokens = _max_tokens(wanted, len(prompt), limit, is_chat, settings["min_tokens"])
    # Evaluation harnesses ask for one token with its log-probability, which must be there even
    # when the token ends the text.
    alone = max_tokens == 1 and logprobs is not None and not settings["min_tokens"]
    settings |= {"max_tokens": max_tokens, "stop_tokens": () if alone else ends}
    for _ in range(num_choices):
      sampling = Sampling(seed=(first_seed + len(choices)) % 2**63, **settings)
      choices.append(ChoiceRequest(prompt, sampling))
  return Request(
    choices=choices,
    num_prompt_tokens=num_prompt_tokens,
    is_chat=is_chat,
    stream=stream,
    include_usage=include_usage,
    echo=echo,
    stops=stops,
    ends=ends,
    skip_special_tokens=skip_special_tokens,
    logprobs=logprobs,
    prompt_logprobs=prompt_logprobs,
  )
