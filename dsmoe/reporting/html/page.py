"""The parts of a page, and the page: one HTML file that needs no network and holds no script.

Everything that is shown is escaped; what is not printable is shown as an escape sequence. Pictures
are matplotlib's figures, drawn for a light and a dark ground by `charts`.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import markupsafe
from matplotlib import figure as mpl_figure

from dsmoe.reporting.html import svg, template

MOST_VIEWS = 16  # of a figure


class Key(NamedTuple):
  """An entry of a figure's legend, shown below it as HTML, so that it wraps on a narrow screen."""

  label: str
  color: str
  dash: str = ""  # stroke-dasharray of SVG; "": a whole line


class Figure(NamedTuple):
  """A picture, or several of which a reader chooses one by its tab."""

  title: str
  alt: str  # what the picture shows, in a sentence, for those who do not see it
  views: Mapping[str, mpl_figure.Figure | bytes]  # by the label of its tab; bytes are a PNG file
  keys: Sequence[Key] = ()
  note: str = ""  # shown below it


class Table(NamedTuple):
  """A table; the first cell of a row names it. Columns of numbers are set flush right."""

  title: str
  header: Sequence[str]
  rows: Sequence[Sequence[str]]
  note: str = ""


class Text(NamedTuple):
  """Text whose line ends and spaces are kept, such as what a model wrote."""

  title: str
  text: str


class Section(NamedTuple):
  """A part of a page with a heading and an entry in the table of contents; str is a paragraph."""

  title: str
  parts: Sequence[str | Figure | Table | Text]


def page(title: str, sections: Sequence[Section], note: str = "") -> str:
  """Returns a self-contained HTML page.

  Args:
    title: of the page.
    sections: in order, at least one. Neighbouring figures stand beside each other where there is room.
    note: a sentence below the title.

  Raises:
    ValueError: for a page without sections; a figure without a picture, with more than MOST_VIEWS,
      without a title or alt; a table whose rows do not have as many cells as its header.
  """
  if not sections:
    raise ValueError("a page must have at least one section, it has none")
  anchors = _Anchors()
  rendered = [
    {
      "title": section.title,
      "anchor": anchors.of(section.title),
      "parts": [
        _figures(group, anchors) if isinstance(group, list) else _other(group)
        for group in _grouped(section.parts)
      ],
    }
    for section in sections
  ]
  style = template.STYLE + "".join(
    f".tabs > input:nth-of-type({n}):checked ~ .view:nth-of-type({n}) {{ display: block; }}\n"
    for n in range(1, MOST_VIEWS + 1)
  )
  return _render(
    template.PAGE, title=title, note=note, sections=rendered, style=markupsafe.Markup(style)
  )


def printable(text: str) -> str:
  """Returns a text in which control characters and the like are escape sequences."""
  return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def _finalize(value: Any) -> Any:
  return printable(value) if type(value) is str else value


_ENVIRONMENT = jinja2.Environment(
  autoescape=True, finalize=_finalize, undefined=jinja2.StrictUndefined
)


def _render(source: str, **values: Any) -> markupsafe.Markup:
  return markupsafe.Markup(_ENVIRONMENT.from_string(source).render(values))


class _Anchors:
  """Gives out ids that are unique in the page."""

  def __init__(self):
    self._used: set[str] = set()

  def of(self, title: str) -> str:
    """Returns an id made of a title's letters and digits."""
    slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:48] or "part"
    name, number = slug, 2
    while name in self._used:
      name, number = f"{slug}-{number}", number + 1
    self._used.add(name)
    return name


def _grouped(parts: Sequence[str | Figure | Table | Text]) -> list[Any]:
  """Returns the parts, neighbouring figures as a list."""
  groups: list[Any] = []
  for part in parts:
    if not isinstance(part, Figure):
      groups.append(part)
    elif groups and isinstance(groups[-1], list):
      groups[-1].append(part)
    else:
      groups.append([part])
  return groups


def _other(part: str | Table | Text) -> markupsafe.Markup:
  if isinstance(part, Table):
    _check_table(part)
    return _render(template.TABLE, table=part, numeric=_numeric_columns(part))
  if isinstance(part, Text):
    return _render(template.TEXT, text=part)
  return _render(template.PARAGRAPH, text=part)


def _check_table(table: Table) -> None:
  if odd := [row for row in table.rows if len(row) != len(table.header)]:
    raise ValueError(
      f"each row of the table {table.title!r} must have {len(table.header)} cells as its header "
      f"does, got {len(odd[0])}"
    )


def _numeric_columns(table: Table) -> set[int]:
  """Returns the columns in which every cell that is not empty begins as a number does."""
  number = re.compile(r"[-+−±]?[\d.]|nan|$", re.IGNORECASE)
  return {
    n
    for n in range(len(table.header))
    if table.rows and all(number.match(row[n]) for row in table.rows)
  }


def _figures(figures: Sequence[Figure], anchors: _Anchors) -> markupsafe.Markup:
  return _render(template.FIGURES, figures=[_figure(one, anchors) for one in figures])


def _figure(figure: Figure, anchors: _Anchors) -> dict[str, Any]:
  if not (figure.title.strip() and figure.alt.strip()):
    raise ValueError(f"a figure must have a title and alt, got {figure.title!r}, {figure.alt!r}")
  if not 1 <= len(figure.views) <= MOST_VIEWS:
    raise ValueError(
      f"the figure {figure.title!r} must have from 1 to {MOST_VIEWS} views, got {len(figure.views)}"
    )
  anchor = anchors.of(f"figure {figure.title}")
  views = []
  for label, picture in figure.views.items():
    name = anchors.of(f"{anchor} view")
    alt = printable(figure.alt if len(figure.views) == 1 else f"{figure.alt} ({label})")
    views.append({"label": label, "anchor": name, "picture": _picture(picture, name, alt)})
  return figure._asdict() | {"anchor": anchor, "views": views}


def _picture(picture: mpl_figure.Figure | bytes, name: str, alt: str) -> markupsafe.Markup:
  if isinstance(picture, bytes):
    data = base64.b64encode(picture).decode()
    image = '<img class="picture" alt="{}" src="data:image/png;base64,{}">'
    return markupsafe.Markup(image).format(alt, data)
  return markupsafe.Markup(svg.inline(picture, f"{name}-", alt))
