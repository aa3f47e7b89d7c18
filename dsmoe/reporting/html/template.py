"""The page's template, for jinja2 with autoescape, and its style sheet.

The tabs of a figure are radio buttons, and the style sheet shows the view of the chosen one: the page
has no script. Its Content-Security-Policy forbids scripts and anything that is not in the file.
"""

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1c2128; --faint: #5b6470;
  --line: #d4d9df; --panel: #f4f6f8; --link: #0b5cad; --shade: #1c212840; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14171b; --ink: #e4e7ea; --faint: #a2abb5; --line: #3a4048; --panel: #1e2329;
    --link: #7db8f5; --shade: #e4e7ea40; } }
@media print {
  :root { color-scheme: light; --ground: #ffffff; --ink: #000000; --faint: #444444; --line: #bbbbbb;
    --panel: #ffffff; --link: #000000; --shade: transparent; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 84rem; background: var(--ground); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
  overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.5rem; padding-top: 0.5rem;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
p { max-width: 46rem; margin: 0.5rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
a:focus-visible, input:focus-visible + label, .scroll:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px; }
nav ol { margin: 0; padding-left: 2rem; }
nav li { padding: 0.15rem 0; overflow-wrap: anywhere; }
.note, figcaption + p, caption { color: var(--faint); }
.figures { display: grid; gap: 1rem 1.5rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0.75rem 0; min-width: 0; max-width: 40rem; break-inside: avoid; }
figcaption { font-weight: 600; margin-bottom: 0.25rem; overflow-wrap: anywhere; }
figure .note { font-size: 0.875rem; margin: 0.25rem 0 0; }
svg.picture { display: block; width: 100%; height: auto; color: var(--ink); fill: currentColor; }
svg.picture * { stroke-linejoin: round; stroke-linecap: butt; }
img.picture { display: block; max-width: 100%; height: auto; background: #ffffff; }
.keys { display: flex; flex-wrap: wrap; gap: 0.1rem 1rem; margin: 0.25rem 0 0; padding: 0;
  list-style: none; font-size: 0.875rem; }
.keys li { display: flex; align-items: center; gap: 0.4rem; min-width: 0; overflow-wrap: anywhere; }
.keys svg { flex: none; width: 1.75rem; height: 0.75rem; }
.tabs { border: 0; margin: 0; padding: 0; min-width: 0; }
.tabs > legend, .tabs > input { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); margin: 0; padding: 0; }
.tabs > label { display: inline-block; padding: 0.2rem 0.7rem; margin: 0 0.25rem 0.25rem 0;
  border: 1px solid var(--line); border-radius: 1rem; font-size: 0.875rem; cursor: pointer; }
.tabs > input:checked + label { background: var(--ink); color: var(--ground);
  border-color: var(--ink); }
.tabs > .view { display: none; }
.scroll { overflow-x: auto; margin: 0.75rem 0; background: no-repeat local,
  no-repeat local, no-repeat scroll, no-repeat scroll; background-color: var(--ground);
  background-image: linear-gradient(to right, var(--ground) 40%, transparent),
  linear-gradient(to left, var(--ground) 40%, transparent),
  linear-gradient(to right, var(--shade), transparent),
  linear-gradient(to left, var(--shade), transparent);
  background-position: left, right, left, right;
  background-size: 2rem 100%, 2rem 100%, 0.6rem 100%, 0.6rem 100%; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.25rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: min(46rem, 100vw - 2rem); }
caption b { color: var(--ink); font-weight: 600; }
th, td { padding: 0.25rem 0.75rem 0.25rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { vertical-align: bottom; }
tbody th { font-weight: 400; }
td, th { max-width: 26rem; overflow-wrap: break-word; }
.number { text-align: right; white-space: nowrap; }
@media (max-width: 40rem) {
  table { font-size: 0.8125rem; width: max-content; }
  th, td { padding-right: 0.5rem; max-width: 14rem; }
  .number { white-space: normal; } }
.text { margin: 0.75rem 0; max-width: 60rem; }
.text pre { margin: 0.25rem 0; padding: 0.75rem; background: var(--panel);
  border: 1px solid var(--line); border-radius: 0.25rem; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 0.85rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; }
.text b { font-weight: 600; }
@media (min-width: 68rem) {
  body { display: grid; grid-template-columns: 14rem minmax(0, 1fr); gap: 0 2.5rem; }
  header { grid-column: 1 / -1; }
  nav { position: sticky; top: 1rem; align-self: start; max-height: calc(100vh - 2rem);
    overflow-y: auto; padding-top: 2.5rem; font-size: 0.9rem; }
  main > section:first-child h2 { border-top: 0; } }
@media print {
  body { display: block; max-width: none; padding: 0; font-size: 10pt; }
  nav { position: static; max-height: none; padding: 0; }
  .figures { grid-template-columns: 1fr 1fr; }
  .scroll { overflow: visible; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
  caption, thead { break-after: avoid; }
  .tabs > label { display: none; }
  .tabs > input:checked + label { display: inline-block; background: none; color: var(--ink);
    border: 0; padding: 0; }
  @page { margin: 15mm; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
{% if note %}<p class="note">{{ note }}</p>{% endif %}
</header>
<nav aria-label="Contents">
<ol>
{% for section in sections %}<li><a href="#{{ section.anchor }}">{{ section.title }}</a></li>
{% endfor %}</ol>
</nav>
<main>
{% for section in sections %}
<section aria-labelledby="{{ section.anchor }}">
<h2 id="{{ section.anchor }}">{{ section.title }}</h2>
{% for part in section.parts %}{{ part }}{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
"""

PARAGRAPH = """<p>{{ text }}</p>
"""

FIGURES = """<div class="figures">
{% for figure in figures %}
<figure id="{{ figure.anchor }}" aria-labelledby="{{ figure.anchor }}-title">
<figcaption id="{{ figure.anchor }}-title">{{ figure.title }}</figcaption>
{% if figure.views | length == 1 %}
{{ figure.views[0].picture }}
{% else %}
<fieldset class="tabs">
<legend>{{ figure.title }}: {{ figure.views | map(attribute="label") | join(", ") }}</legend>
{% for view in figure.views %}
<input type="radio" name="{{ figure.anchor }}" id="{{ view.anchor }}"
 {%- if loop.first %} checked{% endif %}><label for="{{ view.anchor }}">{{ view.label }}</label>
{% endfor %}
{% for view in figure.views %}<div class="view">{{ view.picture }}</div>
{% endfor %}
</fieldset>
{% endif %}
{% if figure["keys"] %}<ul class="keys">
{% for key in figure["keys"] %}<li><svg viewBox="0 0 28 12" aria-hidden="true"><line x1="1" x2="27" y1="6"
 y2="6" stroke="{{ key.color }}" stroke-width="3" stroke-dasharray="{{ key.dash }}"/></svg
 >{{ key.label }}</li>
{% endfor %}</ul>{% endif %}
{% if figure.note %}<p class="note">{{ figure.note }}</p>{% endif %}
</figure>
{% endfor %}
</div>
"""

TABLE = """<div class="scroll" tabindex="0" role="region" aria-label="{{ table.title }}"><table>
<caption><span><b>{{ table.title }}</b>{% if table.note %} {{ table.note }}{% endif %}</span></caption>
<thead><tr>{% for cell in table.header %}<th scope="col"
{%- if loop.index0 in numeric %} class="number"{% endif %}>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}{% if loop.first %}<th scope="row"
{%- if 0 in numeric %} class="number"{% endif %}>{{ cell }}</th>{% else %}<td
{%- if loop.index0 in numeric %} class="number"{% endif %}>{{ cell }}</td>{% endif %}{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
"""

TEXT = """<div class="text"><b>{{ text.title }}</b>
<pre>{{ text.text }}</pre></div>
"""
