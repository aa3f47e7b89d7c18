"""Reads an HTML page strictly, and checks what every report's page promises."""

import html.parser
import re
from typing import Any

VOID = {"meta", "input", "img", "br", "line"}
ADDRESSES = ("href", "src", "srcset", "action", "data", "poster", "xlink:href", "xmlns")


class Node:
  """An element: its tag, attributes, children (elements and text)."""

  def __init__(self, tag: str, attributes: dict[str, str | None], parent: "Node | None"):
    self.tag, self.attributes, self.parent = tag, attributes, parent
    self.children: list[Any] = []

  def all(self, *tags: str) -> list["Node"]:
    """Returns the elements below with one of these tags, in the order of the page; none: all."""
    found = []
    for child in self.children:
      if isinstance(child, Node):
        found += [child] if not tags or child.tag in tags else []
        found += child.all(*tags)
    return found

  def text(self) -> str:
    """Returns all text below."""
    return "".join(child.text() if isinstance(child, Node) else child for child in self.children)


class _Parser(html.parser.HTMLParser):
  def __init__(self):
    super().__init__(convert_charrefs=True)
    self.root = self.at = Node("", {}, None)

  def handle_starttag(self, tag, attrs):
    names = [name for name, _ in attrs]
    assert len(names) == len(set(names)), f"<{tag}> has an attribute twice: {names}"
    node = Node(tag, dict(attrs), self.at)
    self.at.children.append(node)
    if tag not in VOID:
      self.at = node

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in VOID:
      self.at = self.at.parent

  def handle_endtag(self, tag):
    assert tag == self.at.tag, f"</{tag}> closes <{self.at.tag}>"
    self.at = self.at.parent

  def handle_data(self, data):
    self.at.children.append(data)

  def handle_comment(self, data):
    raise AssertionError(f"a comment: {data}")


def parse(text: str) -> Node:
  """Returns the root of a page, whose elements must all be closed in order."""
  parser = _Parser()
  parser.feed(text)
  parser.close()
  assert parser.at is parser.root, f"<{parser.at.tag}> is not closed"
  return parser.root


def check(text: str) -> Node:
  """Checks a page and returns its root.

  Every figure has a title and a text for those who do not see it, every table a caption and
  headers; every anchor, label and url(#...) leads to an id, and ids are unique; nothing is loaded
  from elsewhere; there is no script.
  """
  root = parse(text)
  nodes = root.all()
  ids = [node.attributes["id"] for node in nodes if "id" in node.attributes]
  assert len(ids) == len(set(ids)), "an id is there twice"
  for node in nodes:
    assert node.tag not in ("script", "iframe", "object", "embed", "link", "base", "form"), node.tag
    for name, value in node.attributes.items():
      assert not name.startswith("on"), (node.tag, name)
      if name in ADDRESSES:
        assert value.startswith(("#", "data:image/png;base64,")), (node.tag, name, value[:80])
      if name in ("href", "for", "aria-labelledby") and not value.startswith("data:"):
        assert value.removeprefix("#") in ids, (node.tag, name, value)
      for inner in re.findall(r"url\(([^)]*)\)", value or ""):
        assert inner.startswith("#") and inner[1:] in ids, (node.tag, name, inner)
  for style in root.all("style"):
    assert "url(" not in style.text() and "@import" not in style.text()
  for figure in root.all("figure"):
    [caption] = figure.all("figcaption")
    assert caption.text().strip()
    pictures = [
      n for n in figure.all("svg", "img") if "picture" in (n.attributes.get("class") or "")
    ]
    assert pictures
    for picture in pictures:
      name = "alt" if picture.tag == "img" else "aria-label"
      assert picture.attributes[name].strip()
      assert picture.tag == "img" or picture.attributes["role"] == "img"
  for table in root.all("table"):
    assert table.all("caption")[0].text().strip()
    columns = table.all("thead")[0].all("th")
    assert columns and all(th.attributes["scope"] == "col" for th in columns)
    for row in table.all("tbody")[0].all("tr"):
      cells = row.all("th", "td")
      assert len(cells) == len(columns) and cells[0].attributes["scope"] == "row"
  headings = [h.attributes["id"] for h in root.all("h2")]
  assert [a.attributes["href"] for a in root.all("nav")[0].all("a")] == [f"#{h}" for h in headings]
  return root
