"""Tests of dsmoe/data/lines.py."""

import pytest

from dsmoe.data.lines import check_unicode, read_lines

# What str.splitlines takes for the end of a line, a newline aside.
SEPARATORS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029\r"


def test_lines_end_with_a_newline_only(tmp_path):
  lines = [*(f"a{c}b" for c in SEPARATORS), f"é{SEPARATORS}c", "", " x "]
  for end, mark in (("\n", ""), ("\r\n", ""), ("\n", "\ufeff")):
    (tmp_path / "x").write_bytes((mark + end.join(lines)).encode())
    assert read_lines(tmp_path / "x", "questions") == lines


def test_what_is_no_file_of_lines(tmp_path):
  (tmp_path / "latin").write_bytes("é\n".encode("latin-1"))
  (tmp_path / "wide").write_bytes("a\n".encode("utf-16"))
  for name, message in (
    ("absent", r"the file of questions must exist, got .*absent"),
    (".", r"the questions must be in a file, .* is a folder"),
    ("latin", r"the file of questions must be UTF-8, .*latin is not"),
    ("wide", r"the file of questions must be UTF-8, .*wide is not"),
  ):
    with pytest.raises(ValueError, match=message):
      read_lines(tmp_path / name, "questions")


@pytest.mark.parametrize("text", ["\ud83d", "a\udc80b", "\ude42\ud83d"])
def test_half_a_surrogate_pair(text):
  with pytest.raises(ValueError, match=r"the prompt must be valid Unicode, got '.*\\ud"):
    check_unicode(text, "the prompt")
  check_unicode("🙂\u2028\0", "the prompt")
