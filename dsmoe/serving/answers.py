"""Answers as OpenAI's JSON: complete ones, and the chunks of a stream."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from dsmoe.inference.text_model import ServedModel
from dsmoe.serving.choices import Choice, Delta, Entry, chat_logprobs, completion_logprobs
from dsmoe.serving.requests import Request


class Answer:
  """The answer to one HTTP request."""

  def __init__(self, served: ServedModel, request: Request):
    self.choices = [Choice(served, request, index) for index in range(len(request.choices))]
    self._request = request
    self._head = {
      "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
      "object": "chat.completion" if request.is_chat else "text_completion",
      "created": int(time.time()),
      "model": served.name,
    }

  def complete(self, deltas: Sequence[Sequence[Delta]]) -> dict[str, Any]:
    """Returns the JSON of a complete answer, given all deltas of each choice."""
    choices = []
    for index, parts in enumerate(deltas):
      text = "".join(part.text for part in parts)
      entries = [entry for part in parts for entry in part.entries]
      values: dict[str, Any] = {"index": index, "logprobs": self._logprobs(entries)}
      if self._request.is_chat:
        values["message"] = {"role": "assistant", "content": text, "refusal": None}
      else:
        values["text"] = text
        if self._request.prompt_logprobs is not None:
          values["prompt_logprobs"] = self.choices[index].prompt_logprobs
      choices.append(values | {"finish_reason": parts[-1].finish})
    answer: dict[str, Any] = self._head | {"choices": choices, "usage": self._usage()}
    if self._request.is_chat and self._request.prompt_logprobs is not None:
      answer["prompt_logprobs"] = self.choices[0].prompt_logprobs
    return answer

  def opening(self) -> list[dict[str, Any]]:
    """Returns the first chunks of a stream: in a chat, one with the role for each choice."""
    if not self._request.is_chat:
      return []
    delta = {"role": "assistant", "content": "", "refusal": None}
    return [
      self._chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])
      for i in range(len(self.choices))
    ]

  def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
    """Returns the chunk that reports a choice's delta; none for an empty delta."""
    if not (delta.text or delta.entries or delta.finish):
      return []
    values: dict[str, Any] = {"index": index, "logprobs": self._logprobs(delta.entries)}
    if self._request.is_chat:
      values["delta"] = {"content": delta.text} if delta.text or delta.entries else {}
    else:
      values["text"] = delta.text
    return [self._chunk([values | {"finish_reason": delta.finish}])]

  def closing(self) -> list[dict[str, Any]]:
    """Returns the last chunks of a stream: the usage, if it was asked for."""
    return [self._chunk([]) | {"usage": self._usage()}] if self._request.include_usage else []

  def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = {"object": "chat.completion.chunk"} if self._request.is_chat else {}
    usage = {"usage": None} if self._request.include_usage else {}
    return self._head | kind | {"choices": choices} | usage

  def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
    if self._request.logprobs is None:
      return None
    return chat_logprobs(entries) if self._request.is_chat else completion_logprobs(entries)

  def _usage(self) -> dict[str, int]:
    num_generated = sum(choice.num_tokens for choice in self.choices)
    return {
      "prompt_tokens": self._request.num_prompt_tokens,
      "completion_tokens": num_generated,
      "total_tokens": self._request.num_prompt_tokens + num_generated,
    }
