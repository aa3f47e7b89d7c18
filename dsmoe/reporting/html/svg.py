"""Turns matplotlib's figures into SVG elements that stand in an HTML page among others.

matplotlib writes a document of its own; inside a page its ids would collide, its style sheet would
apply to the whole page, and its black ink would vanish on a dark ground.
"""

import io
import re
import warnings
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib import figure as mpl_figure

# matplotlib lays text out with its own font; the page shows it with the reader's, in the same size.
_OPTIONS: Any = {"svg.fonttype": "none", "svg.hashsalt": "dsmoe", "svg.image_inline": True}
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def literal(text: str) -> str:
  """Returns a text, such as a name from a file, so that matplotlib shows it as it is."""
  shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
  return shown.replace("$", r"\$")


def inline(picture: mpl_figure.Figure, prefix: str, alt: str) -> str:
  """Draws a figure as an <svg> element without fixed size, on a transparent ground.

  Args:
    picture: what it draws in black takes the page's colour of text, which its style sheet gives to
      what has no colour of its own.
    prefix: of the ids in it, which must be unique in the page.
    alt: read to those who do not see it.
  """
  buffer = io.StringIO()
  with matplotlib.rc_context(_OPTIONS), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Glyph")  # the reader's font may have what matplotlib's lacks
    nothing = {name: None for name in ("Date", "Creator", "Format", "Type")}
    picture.savefig(buffer, format="svg", transparent=True, metadata=nothing)
  root = ElementTree.fromstring(_NOT_XML.sub("\N{REPLACEMENT CHARACTER}", buffer.getvalue()))
  _remove(root, ("metadata", "style"))
  used = set()
  for element in root.iter():
    _without_namespaces(element)
    element.tail = None
    if element.tag not in ("text", "tspan"):
      element.text = None
    for value in element.attrib.values():
      used |= set(re.findall(r"url\(#([^)]+)\)|^#(.+)", value))
  names = {name for pair in used for name in pair if name}
  for element in root.iter():
    _rewrite(element, names, prefix)
  for name in ("width", "height", "version"):
    root.attrib.pop(name, None)
  root.attrib |= {"class": "picture", "role": "img", "aria-label": alt}
  return ElementTree.tostring(root, encoding="unicode")


def _remove(root: ElementTree.Element, names: tuple[str, ...]) -> None:
  for parent in list(root.iter()):
    for child in list(parent):
      if child.tag.rpartition("}")[2] in names:
        parent.remove(child)


def _without_namespaces(element: ElementTree.Element) -> None:
  """HTML knows SVG's elements without their namespace, which is written as a web address."""
  element.tag = element.tag.rpartition("}")[2]
  for name in list(element.attrib):
    if "}" in name:
      element.attrib[name.rpartition("}")[2]] = element.attrib.pop(name)


def _rewrite(element: ElementTree.Element, names: set[str], prefix: str) -> None:
  """Gives the ids in use their prefix, removes the others, shortens numbers, makes black the page's ink."""
  attributes = element.attrib
  if (name := attributes.pop("id", None)) in names:
    attributes["id"] = f"{prefix}{name}"
  for key, value in attributes.items():
    if key == "href" and value.startswith("#"):
      attributes[key] = f"#{prefix}{value[1:]}"
    elif key in ("clip-path", "style", "fill", "stroke"):
      value = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", value)
      value = re.sub("font-family: [^;]*(; |$)", "", value)
      attributes[key] = value.replace("#000000", "currentColor")
    elif key in ("d", "x", "y"):
      attributes[key] = re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", value)
