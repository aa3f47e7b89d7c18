"""OpenAI's answers: whole ones, and the chunks of a stream."""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from dsmoe.inference.text_model import ServedModel
from dsmoe.serving.choices import Choice, Entry, Piece, chat_logprobs, completion_logprobs
from dsmoe.serving.requests import Request


class Answer:
  """The answer to one request, as it grows."""

  def __init__(self, served: ServedModel, request: Request):
    self.choices = [Choice(served, request, place) for place in range(len(request.rows))]
    self._request = request
    self._wants_logprobs = request.rows[0].sampling.logprobs is not None
    self._head = {
      "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
      "object": "chat.completion" if request.is_chat else "text_completion",
      "created": int(time.time()),
      "model": served.name,
    }

  def whole(self, pieces: Sequence[Sequence[Piece]]) -> dict[str, Any]:
    """Returns the JSON of a complete answer, given all pieces of each choice."""
    choices = []
    for place, parts in enumerate(pieces):
      text = "".join(part.text for part in parts)
      entries = [entry for part in parts for entry in part.entries]
      values: dict[str, Any] = {"index": place, "logprobs": self._logprobs(entries)}
      if self._request.is_chat:
        values["message"] = {"role": "assistant", "content": text, "refusal": None}
      else:
        values["text"] = text
      choices.append(values | {"finish_reason": parts[-1].finish})
    return self._head | {"choices": choices, "usage": self._usage()}

  def opening(self) -> list[dict[str, Any]]:
    """Returns the chunks a stream begins with."""
    if not self._request.is_chat:
      return []
    delta = {"role": "assistant", "content": "", "refusal": None}
    return [
      self._chunk([{"index": i, "delta": delta, "logprobs": None, "finish_reason": None}])
      for i in range(len(self.choices))
    ]

  def chunks(self, place: int, piece: Piece) -> list[dict[str, Any]]:
    """Returns what a stream has to say of a piece, nothing for an empty one."""
    if not (piece.text or piece.entries or piece.finish):
      return []
    values: dict[str, Any] = {"index": place, "logprobs": self._logprobs(piece.entries)}
    if self._request.is_chat:
      values["delta"] = {"content": piece.text} if piece.text or piece.entries else {}
    else:
      values["text"] = piece.text
    return [self._chunk([values | {"finish_reason": piece.finish}])]

  def closing(self) -> list[dict[str, Any]]:
    """Returns the chunks a stream ends with."""
    return [self._chunk([]) | {"usage": self._usage()}] if self._request.include_usage else []

  def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
    kind = {"object": "chat.completion.chunk"} if self._request.is_chat else {}
    usage = {"usage": None} if self._request.include_usage else {}
    return self._head | kind | {"choices": choices} | usage

  def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any] | None:
    if not self._wants_logprobs:
      return None
    return chat_logprobs(entries) if self._request.is_chat else completion_logprobs(entries)

  def _usage(self) -> dict[str, int]:
    written = sum(choice.num_tokens for choice in self.choices)
    return {
      "prompt_tokens": self._request.num_prompt_tokens,
      "completion_tokens": written,
      "total_tokens": self._request.num_prompt_tokens + written,
    }
