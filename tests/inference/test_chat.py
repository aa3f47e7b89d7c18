"""Tests of dsmoe/inference/chat.py and what is loaded beside a tokenizer."""

import concurrent.futures
import datetime
import json

import jinja2
import pytest
from tokenizers import Tokenizer, processors

from dsmoe.data.tokenizer import CONFIG_FILE
from dsmoe.inference import chat, text_model
from tests.serving.running_server import TOKENIZER

# In the manner of DeepSeek's.
DEEPSEEK = """\
{% if not add_generation_prompt is defined %}
  {% set add_generation_prompt = false %}
{% endif %}
{{ bos_token }}
{%- for message in messages %}
  {%- if message['role'] == 'user' %}
    {{- '<｜User｜>' + message['content'] }}
  {%- elif message['role'] == 'assistant' %}
    {{- '<｜Assistant｜>' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
  {%- elif message['role'] == 'tool' %}
    {{- message | tojson }}
    {%- continue %}
  {%- else %}
    {{- raise_exception('unknown role ' + message['role']) }}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}
{%- if enable_thinking %}<think>{% endif -%}
"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
MESSAGES = [
  {"role": "user", "content": "Tom & <Jerry>"},
  {"role": "assistant", "content": "日本"},
  {"role": "tool", "content": "é", "name": "t"},
]
RENDERED = (
  '<s><｜User｜>Tom & <Jerry><｜Assistant｜>日本</s>{"role": "tool", "content": "é", "name": "t"}'
)


def test_render():
  template = chat.ChatTemplate(DEEPSEEK, TOKENS)
  assert template.render(MESSAGES, add_generation_prompt=False).strip() == RENDERED
  assert template.render(MESSAGES).strip() == RENDERED + "<｜Assistant｜>"
  thinking = template.render(MESSAGES, enable_thinking=True)
  assert thinking.strip() == RENDERED + "<｜Assistant｜><think>"


TEMPLATES = {
  "deepseek": DEEPSEEK,
  "white space": "{% for m in messages %}\n  {% if m.role %}\n {{ m.content }}\n{% endif %}\n{% endfor %}\n",
  "json": "{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<'} | tojson(sort_keys=true) }}",
  "tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ tools is none }}{{ documents }}",
  "loop": "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
}


@pytest.mark.parity
@pytest.mark.parametrize("name", TEMPLATES)
def test_hugging_face_renders_the_same(name):
  utils = pytest.importorskip("transformers.utils.chat_template_utils")
  ours = chat.ChatTemplate(TEMPLATES[name], TOKENS).render(MESSAGES)
  [theirs], _ = utils.render_jinja_template(
    conversations=[MESSAGES],
    chat_template=TEMPLATES[name],
    add_generation_prompt=True,
    **TOKENS,
  )
  assert ours == theirs


def test_the_date():
  template = chat.ChatTemplate("{{ strftime_now('%Y-%m-%d') }}")
  before = datetime.date.today()
  text = template.render(MESSAGES)
  assert str(before) <= text <= str(datetime.date.today())


@pytest.mark.parametrize(
  "source, message",
  [
    ("{{ raise_exception('only users') }}", "refused the messages: only users"),
    ("{{ messages[7].content.strip() }}", "refused the messages: .*no element 7"),
    ("{{ 1 / 0 }}", "refused the messages: division by zero"),
    ("{{ messages.append(1) }}", "refused the messages: .*unsafe"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused the messages: .*unsafe"),
    ("{% for x in range(10**9) %}x{% endfor %}", "refused the messages: Range too big"),
  ],
)
def test_what_a_template_may_not_do(source, message):
  with pytest.raises(ValueError, match=message):
    chat.ChatTemplate(source).render(MESSAGES)
  assert len(MESSAGES) == 3


def test_invalid_jinja():
  with pytest.raises(ValueError, match="must be valid Jinja, got: Unexpected end") as error:
    chat.ChatTemplate("{% if x %}")
  assert isinstance(error.value.__cause__, jinja2.TemplateError)


def write(folder, name, values):
  (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))


def test_where_templates_are_found(tmp_path):
  assert chat.load_template(tmp_path) is None
  config = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": None}
  write(tmp_path, CONFIG_FILE, config | {"chat_template": "config{{ eos_token }}"})
  assert chat.load_template(tmp_path).render(MESSAGES) == "config</s>"
  several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "default"}]
  write(tmp_path, CONFIG_FILE, config | {"chat_template": several})
  assert chat.load_template(tmp_path).render(MESSAGES) == "default"
  write(tmp_path, chat.TEMPLATE_FILE, "file{{ eos_token }}")
  assert chat.load_template(tmp_path).render(MESSAGES) == "file</s>"


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_files_that_are_no_json_objects(tmp_path, text):
  write(tmp_path, CONFIG_FILE, text)
  with pytest.raises(ValueError, match=r"tokenizer_config.json must be"):
    chat.load_template(tmp_path)
  (tmp_path / CONFIG_FILE).unlink()
  write(tmp_path, "generation_config.json", text)
  with pytest.raises(ValueError, match=r"generation_config.json must be"):
    text_model.load(tmp_path, TOKENIZER, "tiny", 64)


def test_a_template_that_is_no_text(tmp_path):
  write(tmp_path, CONFIG_FILE, {"chat_template": 5})
  with pytest.raises(ValueError, match="must be text, got a int"):
    chat.load_template(tmp_path)


@pytest.mark.parametrize("entries", [["x"], [{"name": "default", "template": "a"}, 1]])
def test_entries_that_are_no_templates(tmp_path, entries):
  write(tmp_path, CONFIG_FILE, {"chat_template": entries})
  with pytest.raises(
    ValueError, match=r"chat_template in .*_config.json must be objects with name"
  ):
    chat.load_template(tmp_path)
  write(tmp_path, CONFIG_FILE, {"chat_template": [{"name": ["default"], "template": "a"}]})
  assert chat.load_template(tmp_path) is None
  (tmp_path / chat.TEMPLATE_FILE).write_bytes(b"\xff{{")
  with pytest.raises(ValueError, match=r"chat_template.jinja must be UTF-8, got: "):
    chat.load_template(tmp_path)


def test_ends_that_no_request_could_have(tmp_path):
  write(tmp_path, "generation_config.json", {"eos_token_id": [0, TOKENIZER.get_vocab_size()]})
  with pytest.raises(ValueError, match=r"eos_token_id of .* must be ids of the tokenizer, got \d+"):
    text_model.load(tmp_path, TOKENIZER, "tiny", 64)
  write(tmp_path, "generation_config.json", {"eos_token_id": list(range(9))})
  with pytest.raises(ValueError, match=r"must have a name and 1 to 8 stop tokens, got 'tiny' and"):
    text_model.load(tmp_path, TOKENIZER, "tiny", 64)


def test_what_ends_and_begins_a_text(tmp_path):
  assert text_model.load(tmp_path, TOKENIZER, "tiny", 64).stop_tokens == (0,)
  config = {"eos_token": "<|fim_suffix|>", "bos_token": {"content": "<|fim_prefix|>"}}
  write(tmp_path, CONFIG_FILE, config)
  write(tmp_path, "generation_config.json", {"eos_token_id": [3, 2]})
  served = text_model.load(tmp_path, TOKENIZER, "tiny", 64)
  # The first is also the prompt in place of an empty one: what eos_token names.
  assert (served.stop_tokens, served.prefix, served.template) == ((2, 3, 0), (), None)
  write(tmp_path, CONFIG_FILE, config | {"add_bos_token": True})
  write(tmp_path, "generation_config.json", {"eos_token_id": 4})
  served = text_model.load(tmp_path, TOKENIZER, "tiny", 64)
  assert (served.stop_tokens, served.prefix) == ((2, 4, 0), (1,))


def test_a_prefix_goes_before_a_text_once(tmp_path):
  tokenizer = Tokenizer.from_str(TOKENIZER.to_str())
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<|fim_prefix|> $A <|endoftext|>",
    special_tokens=[("<|fim_prefix|>", 1), ("<|endoftext|>", 0)],
  )
  served = text_model.load(tmp_path, tokenizer, "tiny", 64)
  text = TOKENIZER.encode("def f", add_special_tokens=False).ids
  assert served.encode("def f") == served.encode("<|fim_prefix|>def f") == [1, *text]
  assert served.encode("<|fim_prefix|><|fim_prefix|>def f") == [1, 1, *text]  # as it is written
  assert served.encode("def f<|fim_prefix|>") == [1, *text, 1]
  assert served.encode("") == served.encode("<|fim_prefix|>") == [1]
  assert served.encode("def f", add_special_tokens=False) == text
  assert served.encode("<|fim_prefix|>def f", add_special_tokens=False) == [1, *text]


# Each doubles, multiplies, pads or loops for ever within a few dozen characters.
ENDLESS = {
  "strings multiplied": "{{ 'x' * 10 ** 10 }}",
  "by a variable": "{{ messages[0].content * 10 ** 9 }}",
  "lists multiplied": "{{ ([0] * 10 ** 9) | length }}",
  "ljust": "{{ messages[0].content.ljust(10 ** 10) }}",
  "center": "{{ messages[0].content | center(10 ** 10) }}",
  "indent": "{{ (messages[0].content ~ '\\n' * 9) | indent(10 ** 9, true) }}",
  "format width": "{{ '%10000000000d' | format(1) }}",
  "format method": "{{ '{:10000000000}'.format(1) }}",
  "join": "{{ (range(99999) | join('x' * 100000)) | length }}",
  "replace": "{{ ('x' * 100000) | replace('x', 'y' * 100000) | length }}",
  "doubling": "{% set ns = namespace(x='ab') %}{% for _ in range(99) %}"
  "{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
  "doubling a list": "{% set ns = namespace(x=[1]) %}{% for _ in range(99) %}"
  "{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
  "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
  "powers": "{{ (10 ** (10 ** 10)) | string | length }}",
  "sorting": "{% for a in range(99999) %}{{ (range(99999) | sort | list | length) }}{% endfor %}",
  "a text too long": "{{ 'x' * (2 ** 24 + 1) }}",
  "a message too long": "{{ raise_exception('x' * 10 ** 8) }}",
  "macros": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
}


@pytest.fixture
def quick(monkeypatch):
  """A second of processor time for a text, however long a busy machine takes to give that."""
  monkeypatch.setattr(chat, "_RENDERER", chat._Renderer(limit_secs=1))
  monkeypatch.setattr(chat, "_PATIENCE", 300)


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_without_bounds_is_ended(name, quick):
  with pytest.raises(ValueError, match=r"chat template (must|refused)") as error:
    chat.ChatTemplate(ENDLESS[name]).render(MESSAGES)
  assert len(str(error.value)) < 700
  assert chat.ChatTemplate(DEEPSEEK, TOKENS).render(MESSAGES[:1]).strip() == (
    "<s><｜User｜>Tom & <Jerry><｜Assistant｜>"
  )


def test_the_limits_are_said(quick):
  for name, message in (
    ("loops", "it needs more than 1 seconds of processor time"),
    ("by a variable", "it needs more than 512 MiB of memory"),
    ("a text too long", "its text of 16,777,217 characters exceeds the limit of 16,777,216"),
  ):
    with pytest.raises(ValueError, match=message):
      chat.ChatTemplate(ENDLESS[name]).render(MESSAGES)


def test_one_process_renders_for_all_and_another_after_its_end():
  template = chat.ChatTemplate("{{ messages[0].content }}")
  process = chat._RENDERER._process
  assert template.render(MESSAGES) == chat.ChatTemplate("Tom & <Jerry>").render(MESSAGES)
  assert chat._RENDERER._process is process
  process.kill()
  process.wait()
  assert template.render(MESSAGES) == "Tom & <Jerry>"
  assert chat._RENDERER._process is not process


def test_threads_get_their_own_texts():
  template = chat.ChatTemplate("{{ messages[0].content }}")
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    texts = [str(i) * 1000 for i in range(200)]
    assert list(pool.map(lambda t: template.render([{"content": t}]), texts)) == texts


def test_values_that_are_not_json():
  deep = []
  for _ in range(100_000):
    deep = [deep]
  for value in (deep, object(), b"x"):
    with pytest.raises(ValueError, match="must be values of JSON"):
      chat.ChatTemplate("x").render(MESSAGES, odd=value)
  assert chat.ChatTemplate("x{{ self }}").render(MESSAGES, self="me").startswith("x")
