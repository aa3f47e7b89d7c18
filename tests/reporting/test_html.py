"""The page: what it shows is escaped, and its DOM keeps what every report's page promises."""

import io

import pytest
from matplotlib import figure

from dsmoe.reporting import html
from dsmoe.reporting.html import svg
from tests import html_dom

# What a file might hold to break out of text, an attribute, a style sheet or an SVG.
HOSTILE = "</pre></title></style><script>alert(1)</script>\"'><img src=x onerror=y>&amp;{{ 7 }}$x$"
ODD = "\x00\x1b[31m\u202e\ud800\ufffe"


def picture(text: str = "x") -> figure.Figure:
  drawn = figure.Figure(figsize=(3, 2))
  axes = drawn.subplots()
  axes.plot([1, 2, 3], [2, 1, 3], "o-", color="#336699")
  axes.plot([1, 2, 3], [1, 2, 3], color="black")
  axes.pcolorfast([1, 2], [1, 2], [[0.5]])
  axes.set_xlabel(svg.literal(text))
  return drawn


def png() -> bytes:
  buffer = io.BytesIO()
  picture().savefig(buffer, format="png")
  return buffer.getvalue()


def whole_page(text: str) -> str:
  """Returns a page with this text in every place that takes any."""
  two = html.Figure(text, text, {text: picture(text), "b": picture()}, [html.Key(text, text, text)])
  one = html.Figure(text, text, {"only": png()}, note=text)
  table = html.Table(text, [text, "n"], [[text, "1"], ["", "2.5"]], note=text)
  parts = [text, two, one, table, html.Text(text, text), two]
  return html.page(text, [html.Section(text, parts), html.Section(text, [])], note=text)


@pytest.mark.parametrize("text", [HOSTILE, ODD, "a plain name"], ids=["hostile", "odd", "plain"])
def test_what_is_shown_is_escaped(text):
  page = whole_page(text)
  page.encode()  # has no half of a pair of surrogates
  root = html_dom.check(page)
  shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
  assert root.all("h1")[0].text() == root.all("title")[0].text() == shown
  assert [h2.text() for h2 in root.all("h2")] == [shown, shown]
  assert root.all("pre")[0].text() == shown
  assert root.all("figcaption")[0].text() == shown and root.all("td")[0].text() == "1"
  labels = [node.text() for node in root.all("text")]
  assert labels.count(shown) == 2  # in the two pictures that have it below their axis
  assert "onerror" not in {name for node in root.all() for name in node.attributes}


def test_pictures_suit_a_light_and_a_dark_ground():
  root = html_dom.check(whole_page("x"))
  pictures = [n for n in root.all("svg") if n.attributes.get("role") == "img"]
  assert len(pictures) == 4
  for drawn in pictures:
    assert not {"width", "height"} & set(drawn.attributes) and drawn.attributes["viewbox"]
    styles = [node.attributes.get("style") or "" for node in drawn.all()]
    assert any("currentColor" in style for style in styles)
    assert not any("#000000" in style or "#ffffff" in style for style in styles)
    assert any("#336699" in style for style in styles)
    assert not drawn.all("style", "metadata", "title")
  style = root.all("style")[0].text()
  assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_the_tabs_are_radio_buttons_of_which_one_is_chosen():
  root = html_dom.check(whole_page("x"))
  first, png_figure, last = root.all("figure")
  assert not png_figure.all("input") and len(png_figure.all("img")) == 1
  names = set()
  for one in (first, last):
    buttons = one.all("input")
    names |= {button.attributes["name"] for button in buttons}
    assert [button.attributes["type"] for button in buttons] == ["radio", "radio"]
    assert [("checked" in button.attributes) for button in buttons] == [True, False]
    assert [label.text() for label in one.all("label")] == ["x", "b"]
    assert len([d for d in one.all("div") if d.attributes.get("class") == "view"]) == 2
  assert len(names) == 2


def test_columns_of_numbers_are_flush_right():
  table = html.Table("t", ["run", "loss", "mixed"], [["1", "−2.5", "3"], ["a", "", "b"]])
  root = html_dom.check(html.page("t", [html.Section("s", [table])]))
  classes = [node.attributes.get("class") for node in root.all("th", "td")]
  assert classes == [None, "number", None] * 3


def test_the_same_page_twice_is_the_same_text():
  assert whole_page("x") == whole_page("x")


def test_rules():
  one = {"a": picture()}
  for parts, message in (
    ([html.Figure("t", " ", one)], "a figure must have a title and alt, got 't', ' '"),
    ([html.Figure("t", "a", {})], "'t' must have from 1 to 16 views, got 0"),
    ([html.Figure("t", "a", dict.fromkeys(range(17), b""))], "from 1 to 16 views, got 17"),
    ([html.Table("t", ["a"], [["1"], ["1", "2"]])], "'t' must have 1 cells .*, got 2"),
  ):
    with pytest.raises(ValueError, match=message):
      html.page("p", [html.Section("s", parts)])
  with pytest.raises(ValueError, match="at least one section"):
    html.page("p", [])
