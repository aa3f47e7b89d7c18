"""Reads small files of lines: questions and prompts."""

from etils import epath


def read_lines(path: epath.PathLike, what: str) -> list[str]:
  """Reads a UTF-8 file's lines, without their ends and a byte-order mark.

  A line ends with a newline, perhaps after a carriage return, and nowhere else: JSON may hold other
  separators of lines, such as U+2028, as they are.

  Args:
    path: the file, on disk or gs://.
    what: its content, for messages: "questions".

  Raises:
    ValueError: if it is no file, or not UTF-8.
  """
  path = epath.Path(path)
  if path.is_dir():
    raise ValueError(f"the {what} must be in a file, {path} is a folder")
  if not path.exists():
    raise ValueError(f"the file of {what} must exist, got {path}")
  try:
    text = path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"the file of {what} must be UTF-8, {path} is not: {error}") from error
  return [line.removesuffix("\r") for line in text.split("\n")]


def check_unicode(text: str, what: str) -> None:
  """Raises ValueError for half a surrogate pair, which JSON can spell and UTF-8 cannot hold."""
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f"{what} must be valid Unicode, got {ascii(text)[:80]}") from error
