"""Tests of the server over the real batcher, and of scripts/serve.py."""

import concurrent.futures
import re
import signal
import socket
import urllib.request

import numpy as np
import openai
import pytest

from dsmoe import checkpoint, train
from dsmoe.evaluation import multiple_choice
from dsmoe.inference import batcher as batcher_lib
from dsmoe.inference.sampling import Sampling
from tests import runs
from tests.data.cases import VOCAB, make_folder
from tests.helpers import small_config
from tests.serving.running_server import wait_until

TEXT = "alpha beta gamma"


# A run, and a server that compiles its programs; tests/serving/test_server.py is quick.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run of two steps on text."""
  corpus = make_folder(tmp_path_factory.mktemp("corpus"))
  folder = tmp_path_factory.mktemp("run")
  config = small_config(
    **runs.TWO_LAYERS,
    **{"model.vocab_size": VOCAB, "model.max_position_embeddings": 256, "num_steps": 2},
    **{"optim.warmup_steps": 1},
    **{"data.train_globs": (f"{corpus}/a/*.txt",)},
    **{"data.validation_globs": (f"{corpus}/v/*.txt",)},
  )
  assert train.train(config, folder).step == 2
  return folder


@pytest.fixture(scope="module")
def run(workdir):
  return checkpoint.load_run(workdir)


@pytest.fixture(scope="module")
def batcher(workdir):
  """A batcher of our own, to know what the server should say."""
  return batcher_lib.make(checkpoint.load_run(workdir), batcher_lib.BatcherOptions(max_rows=2))


@pytest.fixture(scope="module")
def client(workdir):
  key = workdir / "key"
  key.write_text("secret\n")
  args = ("--port=0", "--max_rows=2", "--model_name=tiny", f"--api_key_file={key}")
  process = runs.start("scripts/serve.py", f"--workdir={workdir}", *args)
  line = process.stdout.readline()
  assert line.startswith("serving tiny on http://127.0.0.1:"), runs.finish(process)
  url = re.search(r"http://\S+", line).group()
  yield openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0, timeout=120)
  process.send_signal(signal.SIGTERM)
  code, _, err = runs.finish(process)
  assert code == 0 and "Traceback" not in err, err


def complete(client, prompt=TEXT, **kwargs):
  return client.completions.create(model="tiny", prompt=prompt, **kwargs)


def test_the_likeliest_text(run, batcher, client):
  tokenizer = run.tokenizer()
  ids = tokenizer.encode(TEXT).ids
  [tokens] = batcher_lib.generate(batcher, [ids], Sampling(max_tokens=24, temperature=0))
  [choice] = complete(client, temperature=0, max_tokens=24).choices
  assert choice.text == tokenizer.decode(tokens)
  stream = complete(client, ids, temperature=0, max_tokens=24, stream=True)
  assert "".join(chunk.choices[0].text for chunk in stream) == choice.text


def test_sampled_texts_of_clients_at_once(run, batcher, client):
  tokenizer = run.tokenizer()
  words = "alpha beta gamma delta epsilon zeta eta theta".split()
  prompts = [" ".join(words[i:] + words[:i]) for i in range(8)]

  def one(i):
    return [c.text for c in complete(client, prompts[i], seed=i, n=2, max_tokens=12).choices]

  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    texts = list(pool.map(one, range(8)))
  for i, prompt in enumerate(prompts):
    ids = tokenizer.encode(prompt).ids
    stop = Sampling(max_tokens=12, seed=i, stop_tokens=(0,))
    assert texts[i] == [
      tokenizer.decode(t) for t in batcher_lib.generate(batcher, [ids, ids], stop)
    ]


def test_a_harness_gets_the_loglikelihoods(run, client):
  tokenizer = run.tokenizer()
  pairs = [
    (tokenizer.encode(context).ids, tokenizer.encode(rest).ids)
    for context, rest in (("alpha", " beta gamma"), ("beta beta", " delta"), ("eta", " zeta eta"))
  ]
  prompts = [context + rest for context, rest in pairs]
  answer = complete(client, prompts, echo=True, logprobs=1, max_tokens=1, temperature=0)
  scores = [
    sum(choice.logprobs.token_logprobs[len(context) : -1])
    for choice, (context, _) in zip(answer.choices, pairs)
  ]
  np.testing.assert_allclose(scores, multiple_choice.loglikelihoods(run, pairs), rtol=2e-4)
  for choice, prompt in zip(answer.choices, prompts):
    assert len(choice.logprobs.tokens) == len(prompt) + 1


def test_refusals(client):
  with pytest.raises(openai.BadRequestError, match="maximum context length is 256 tokens"):
    complete(client, max_tokens=256)
  with pytest.raises(openai.BadRequestError, match="vocab_size"):
    complete(client, [VOCAB])
  with pytest.raises(openai.AuthenticationError):
    complete(client.with_options(api_key="public"))
  with pytest.raises(openai.BadRequestError, match="no chat template"):
    message = {"role": "user", "content": "hi"}
    client.chat.completions.create(model="tiny", messages=[message])


def test_a_client_that_leaves_gives_its_pages_back(client):
  headers = {"Authorization": "Bearer secret"}
  url = str(client.base_url).replace("/v1/", "/metrics")

  def metric(name):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
      lines = answer.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

  before = metric("dsmoe_batcher_new_tokens_total")
  # Two rows run at once, so that 60 choices take seconds: the client leaves long before the end.
  stream = complete(client, max_tokens=230, n=60, stream=True)
  next(iter(stream))
  stream.close()
  wait_until(lambda: metric("dsmoe_vanished_clients_total") == 1)
  wait_until(lambda: metric("dsmoe_running_rows") == 0)
  assert metric("dsmoe_batcher_new_tokens_total") - before < 60 * 230


def test_the_programs_were_compiled_at_the_start(client):
  """And nothing that clients asked for since has added one."""
  headers = {"Authorization": "Bearer secret"}
  url = str(client.base_url).replace("/v1/", "/metrics")
  for fields in (
    {"logprobs": 3, "echo": True},
    {"presence_penalty": 1.0, "extra_body": {"repetition_penalty": 1.2}, "n": 2},
    {"logit_bias": {"5": 3}, "extra_body": {"min_tokens": 2}},
  ):
    assert complete(client, "alpha " * 20, max_tokens=9, **fields).choices
  with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
    # For 1 and 2 rows: decoding, and prompts of 16, 64 and 256 tokens.
    lines = answer.read().decode().splitlines()
    assert "dsmoe_batcher_programs 8.0" in lines


def test_a_port_in_use_is_refused_at_once():
  with socket.create_server(("127.0.0.1", 0)) as other:
    args = ("--workdir=nowhere", f"--port={other.getsockname()[1]}")
    code, _, err = runs.call("scripts/serve.py", *args)
  assert code and "of 127.0.0.1 must be free, got: Address already in use" in err
  assert "Traceback" not in err


def test_a_key_file_must_hold_a_key():
  args = ("--workdir=nowhere", "--api_key_file=nokey")
  code, _, err = runs.call("scripts/serve.py", *args)
  assert code == 2 and "api_key_file must hold a key, nokey does not" in err
  assert "Traceback" not in err
