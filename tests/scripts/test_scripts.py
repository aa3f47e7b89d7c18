"""Every script runs, once; what it prints is what it promises."""

import json
import os
import subprocess

import pytest

from dsmoe import train
from tests import runs
from tests.data.cases import VOCAB, make_folder
from tests.helpers import small_config

PUBLISHED = ("deepseek_v3", "deepseek_v2", "deepseek_v2_lite", "moonlight_16b", "kimi_k2")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return make_folder(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def workdir(corpus, tmp_path_factory):
  """A run of three steps on text, the last two traced."""
  folder = tmp_path_factory.mktemp("run")
  config = small_config(
    **runs.TWO_LAYERS,
    **{"model.vocab_size": VOCAB, "num_steps": 3, "log.log_every_steps": 1},
    **{"profile.steps": "2:4"},
    **{"data.train_globs": (f"{corpus}/a/*.txt",)},
    **{"data.validation_globs": (f"{corpus}/v/*.txt",)},
  )
  assert train.train(config, folder).step == 3
  return folder


def failure(*args) -> str:
  code, out, err = runs.call(*args)
  assert code != 0, out
  assert "Traceback" not in err
  return err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", PUBLISHED)
def test_compute_report_json(name):
  out = runs.run("scripts/compute_report.py", f"--config=experiments/{name}.py", "--json=-")
  values = json.loads(out)
  assert values["active_params"] < values["total_params"]
  assert set(values["flops_per_token"]) == {"causal", "non_causal", "causal_mtp"}
  assert values["kv_cache_bytes_per_token"] > 0
  assert values["training_flops"]["6nd"] == pytest.approx(
    6 * values["active_params"] * values["training_tokens"]
  )


def test_compute_report_table():
  # 14.8T tokens in 2.664M GPU hours. Source: DeepSeek-V3 (arXiv:2412.19437), table 1.
  args = ("--config=experiments/deepseek_v3.py", "--tokens_per_sec=1543", "--chip=h100")
  out = runs.run("scripts/compute_report.py", *args)
  for text in ("671,026,419,200", "70,272", "250.4 GFLOP", "39.1%", "43.9%"):
    assert text in out
  last = failure("scripts/compute_report.py", *args[:2])
  assert last == "error: --tokens_per_sec needs --chip or --peak_flops"


def test_compute_report_counts_both_devices_of_a_chip():
  # MaxText on Ironwood: 612.7 TFLOP/s a chip are 26.6% of its peak, at 2,446 tokens/s.
  args = ("--config=experiments/deepseek_v3.py", "--tokens_per_sec=2446", "--chip=tpu7x")
  values = json.loads(runs.run("scripts/compute_report.py", *args, "--json=-"))
  assert values["mfu"]["causal"] == pytest.approx(0.266, abs=5e-4)


@pytest.mark.slow
def test_bench_train(tmp_path):
  args = ("scripts/bench_train.py", f"--config={runs.SHORT_RUN}", "--steps=2")
  values = json.loads(runs.run(*args, "--json=-"))
  for name in ("tokens_per_sec", "compile_secs", "peak_rss_mib", "loss", "gflops_per_sec"):
    assert values[name] > 0, name
  assert "tokens per sec" in runs.run(*args, f"--json={tmp_path}/figures.json")
  assert json.loads((tmp_path / "figures.json").read_text()).keys() == values.keys()


def test_generate(workdir):
  args = ("scripts/generate.py", f"--workdir={workdir}", "--num_tokens=8")
  sampled = runs.run(*args, "--prompt=alpha beta", "--temperature=1")
  likeliest = runs.run(*args, "--prompt=alpha beta", "--temperature=0", "--step=3")
  assert sampled.startswith("alpha beta") and likeliest.startswith("alpha beta")
  assert len(sampled) > len("alpha beta\n") and sampled != likeliest


@pytest.mark.slow
def test_generate_on_a_mesh(workdir):
  """The likeliest tokens of one device; a mesh that does not fit is refused by name."""
  args = ("scripts/generate.py", f"--workdir={workdir}", "--num_tokens=8", "--temperature=0")
  args = (*args, "--prompt=alpha beta")
  eight = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"

  def on_mesh(mesh):
    return runs.finish(runs.start(*args, f"--mesh={mesh}", env={"XLA_FLAGS": eight}))

  code, out, err = on_mesh("data:2,expert:4")
  assert (code, out) == (0, runs.run(*args)), err
  code, _, err = on_mesh("expert:4,model:2")
  assert code == 2 and "Traceback" not in err
  assert "dimension heads (3) must be divisible by the mesh axis 'model' (2)" in err


@pytest.mark.slow
def test_generate_from_a_file(workdir, tmp_path):
  path = tmp_path / "prompts.jsonl"
  prompts = ["alpha", "beta gamma", "alpha beta"]
  path.write_text("\n".join(json.dumps({"prompt": p}) for p in prompts))
  args = ("scripts/generate.py", f"--workdir={workdir}", "--num_tokens=8", "--temperature=0")
  rows = [json.loads(line) for line in runs.run(*args, f"--prompts={path}").splitlines()]
  assert sorted(row["prompt"] for row in rows) == sorted(prompts)
  text = {row["prompt"]: row["text"] for row in rows}
  assert runs.run(*args, "--prompt=alpha beta").rstrip("\n") == "alpha beta" + text["alpha beta"]
  missing = failure(*args, "--prompts=/nowhere.txt")
  assert missing == "error: the file of prompts must exist, got /nowhere.txt"


@pytest.mark.slow
def test_generate_talks(workdir):
  """Without a template it says what is missing; with one, two turns and a fresh start."""
  args = ("scripts/generate.py", f"--workdir={workdir}", "--num_tokens=8", "--chat")
  assert "--chat needs a chat template" in failure(*args)
  template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
  path = workdir / "data" / "tokenizer_config.json"
  path.write_text(json.dumps({"chat_template": template}))
  try:
    process = runs.start(*args, stdin=subprocess.PIPE)
    out, err = process.communicate("alpha\nbeta\n\ngamma\n", timeout=runs.LIMIT_SECS)
  finally:
    path.unlink()
  assert process.returncode == 0, err
  assert out.count("> ") >= 5 and "(a new conversation)" in out
  assert "new tokens" in err


@pytest.mark.slow
def test_bench_decode(tmp_path):
  args = ["scripts/bench_decode.py", "--config=experiments/bench_small.py", "--prompt_tokens=9"]
  args += ["--config.model.hidden_size=32", "--config.model.vocab_size=64", "--new_tokens=65"]
  rows = json.loads(runs.run(*args, "--batches=1,3", "--json=-"))["runs"]
  path = tmp_path / "figures.json"
  assert "decode tok/s" in runs.run(*args, "--batches=1", "--repeats=1", f"--json={path}")
  assert [row["batch"] for row in json.loads(path.read_text())["runs"]] == [1]
  assert [row["batch"] for row in rows] == [1, 3]
  for row in rows:
    assert row["cache_bytes_per_token"] == 4 * 4 * (64 + 16)
    for name in ("prefill", "decode", "decode_bound"):
      assert row[f"{name}_tokens_per_sec"] > 0
  one, three = (row["weight_bytes_per_step"] for row in rows)
  assert one < three < 3 * one


@pytest.mark.slow
def test_bench_decode_with_a_full_cache(tmp_path):
  """Rows end with 33 tokens in the cache, of a model with 40 positions."""
  path = tmp_path / "figures.json"
  args = ["scripts/bench_decode.py", "--config=experiments/bench_small.py", "--batches=3"]
  args += ["--config.model.hidden_size=32", "--config.model.vocab_size=64", "--repeats=1"]
  args += ["--config.model.max_position_embeddings=40", "--config.data.sequence_length=40"]
  assert "decode tok/s" in runs.run(*args, "--cache_tokens=33", f"--json={path}")
  found = json.loads(path.read_text())
  [row] = found["runs"]
  assert row["cache_bytes_per_step"] == 3 * 33 * row["cache_bytes_per_token"]
  assert row["decode_tokens_per_sec"] == pytest.approx(3 / row["step_secs"])
  read_bytes = row["weight_bytes_per_step"] + row["cache_bytes_per_step"]
  bound = 3 * found["read_bytes_per_sec"] / read_bytes
  assert row["decode_bound_tokens_per_sec"] == pytest.approx(bound)
  for tokens in (8, 41):
    assert failure(*args, f"--cache_tokens={tokens}") == (
      "error: cache_tokens must be above the 8 tokens of a round and at most "
      f"max_position_embeddings (40), got {tokens}"
    )


@pytest.mark.parametrize(
  "args, message",
  [
    (("--prompt=",), "a prompt must have at least 1 token, got 0"),
    (("--prompt=a", "--step=2"), "([3]), got 2"),
    (("--prompt=a", "--workdir=/nowhere"), "must hold config.json, got /nowhere"),
  ],
)
def test_generate_refuses_in_one_sentence(workdir, args, message):
  last = failure("scripts/generate.py", f"--workdir={workdir}", *args)
  assert last.startswith("error: ") and last.endswith(message)


@pytest.mark.slow
def test_evaluate_text_is_the_runs_own_validation(workdir, corpus):
  args = ("scripts/evaluate.py", f"--workdir={workdir}")
  values = json.loads(runs.run(*args, f"--text={corpus}/v/*.txt", "--json=-"))
  last = [json.loads(line) for line in (workdir / "metrics.jsonl").open()][-1]
  assert values["step"] == last["step"] == 3
  assert values["nats_per_token"] == pytest.approx(last["validation_loss"], rel=1e-5)
  assert values["bits_per_byte"] == pytest.approx(last["validation_bits_per_byte"], rel=1e-5)
  assert failure(*args, "--text=/nowhere/*").startswith("error: ")


def test_evaluate_choices(workdir, tmp_path):
  path = tmp_path / "questions.jsonl"
  questions = [{"question": "alpha", "choices": ["beta", "qqqq", "##"], "answer": 0}] * 2
  path.write_text("\n".join(map(json.dumps, questions)))
  args = ("scripts/evaluate.py", f"--workdir={workdir}", f"--choices={path}")
  out = runs.run(*args, f"--json={tmp_path}/scores.json")
  assert json.loads((tmp_path / "scores.json").read_text())["questions"] == 2
  for text in ("accuracy", "accuracy per byte", "margin"):
    assert text in out


@pytest.mark.parametrize(
  "args, message",
  [
    (("generate", "--prompt=a", "--top_p=2"), "top_p must be above 0 and at most 1, got 2.0"),
    (("generate", "--prompt=a", "--num_tokens=0"), "flag --num_tokens=0: 0 is not"),
    (
      ("generate", "--prompt=a", "--mesh=exp:8"),
      "--mesh must name axes and sizes as data:2,expert",
    ),
    (("generate",), "give one of --prompt, --prompts and --chat"),
    (("generate", "--prompt=a"), "a run's workdir must hold config.json, got /nowhere"),
    (("serve", "--port=70000"), "flag --port=70000: 70000 is not an integer"),
    (("serve",), "a run's workdir must hold config.json, got /nowhere"),
    (("serve", "--api_key_file=nokey"), "api_key_file must hold a key, nokey does not"),
    (("evaluate", "--text=a", "--step=x"), "flag --step=x: invalid literal for int()"),
    (
      ("evaluate", "--text=a", "--choices=b"),
      "one of --text and --choices must be given, and one only",
    ),
    (("evaluate", "--text=a"), "a run's workdir must hold config.json, got /nowhere"),
    (("evaluate", "--choices=/nowhere.jsonl"), "file of questions must exist, got /nowhere"),
    (("bench_train", "--steps=0"), "flag --steps=0: 0 is not a positive"),
    (("bench_train",), "--config must be given"),
    (("bench_train", "--config=/nowhere.py"), "there is no '/nowhere.py'"),
    (("bench_decode", "--batches=1,x"), "flag --batches=['1', 'x']: must be positive integers"),
    (
      ("bench_train", "--config=experiments/tiny.py", "--config.model.kernels.routing=mosaic_tpu"),
      "kernels.routing must be an implementation for cpu or None, got 'mosaic_tpu'",
    ),
    (("bench_decode",), "--config must be given"),
    (
      ("bench_decode", "--config=experiments/tiny.py", "--cache_tokens=9", "--new_tokens=2"),
      "--cache_tokens measures decoding alone, so --new_tokens must not be given",
    ),
    (("bench_decode", "--json=/nowhere/a.json"), "the folder of the file must exist"),
    (("report", "--workdir= "), "--workdir must not be empty"),
    (("serve", "--workdir="), "a workdir must be the name of a folder, got ''"),
    (("convert_hf", "import", "--folder="), "--folder must be given, and not empty"),
    (("evaluate", "--text="), "--text must not be empty"),
    (("evaluate", "--text= "), "--text must not be empty"),
    (("evaluate", "--choices="), "--choices must not be empty"),
    (("evaluate", "--choices=tests"), "the questions must be in a file, tests is a folder"),
    (("evaluate", "--text=a", "--json=tests"), "it must name a file, not a folder"),
    (("generate", "--prompts="), "--prompts must not be empty"),
    (("generate", "--prompts=tests"), "the prompts must be in a file, tests is a folder"),
    (("generate", "--prompt=a\udcff"), r"--prompt must be valid Unicode, got 'a\udcff'"),
    (("generate", "--prompt=a", "--stop=\udcff"), r"--stop must be valid Unicode, got '\udcff'"),
    (("generate", "--prompt=a", "--stop="), "--stop must have at least 1 character"),
    (("generate", "--prompt=a", "--temperature=inf"), "temperature must be"),
    (("generate", "--prompt=a", "--temperature=nan"), "temperature must be"),
  ],
)
def test_mistakes_end_in_one_sentence(args, message):
  name, *flags = args
  if name in ("generate", "serve", "evaluate") and not any("workdir" in flag for flag in flags):
    flags.append("--workdir=/nowhere")
  found, out, err = runs.call(f"scripts/{name}.py", *flags)
  assert found == 2 and out == "" and "Traceback" not in err
  [line] = err.splitlines()
  assert line.startswith("error: ") and message in line


@pytest.mark.slow
def test_read_profile(workdir, tmp_path):
  picture, file = tmp_path / "profile.png", tmp_path / "profile.json"
  args = ("scripts/read_profile.py", workdir)
  out = runs.run(*args, "--step=2", f"--plot={picture}", f"--json={file}")
  assert "steps 2 to 3, 8 x cpu" in out and "No bound is known for cpu" in out
  for text in ("attention", "experts", "optimizer", "recomputed", "no operation is seen"):
    assert text in out
  assert picture.read_bytes().startswith(b"\x89PNG")
  found = json.loads(file.read_text())
  assert found["steps"] == [2, 3] and "other programs" not in found["parts"]
  total = sum(sum(row.values()) for row in found["parts"].values())
  assert total == pytest.approx(found["secs"])
  for args, message in (
    ((), "give one workdir, or one folder of a trace"),
    ((tmp_path,), f"{tmp_path} must hold a trace, it has none in profiles/: a run leaves one with"),
    (("/nowhere",), "a run's workdir or a trace's folder must exist, got /nowhere"),
    ((workdir, "--step=3"), "the first traced step must be one of 2, got 3"),
  ):
    code, out, err = runs.call("scripts/read_profile.py", *args)
    assert (code, out) == (2, "") and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_report(workdir):
  out = runs.run("-m", "scripts.report", f"--workdir={workdir}", "--noplots")
  assert "validation loss" in out


def test_report_of_metrics_without_a_line(tmp_path):
  for text in ("", '{"step": 1, "lo'):
    (tmp_path / "metrics.jsonl").write_text(text)
    last = failure("scripts/report.py", f"--workdir={tmp_path}")
    assert last == f"error: {tmp_path}/metrics.jsonl must have a whole line, it has none"


@pytest.mark.slow
def test_bench_kernels():
  small = ["--config.model.hidden_size=32", "--config.model.moe_intermediate_size=16"]
  out = runs.run(
    *("scripts/bench_kernels.py", "--config=experiments/bench_small.py", *small),
    *("--tokens=96", "--rounds=2", "--implementations=ragged_dot,mosaic_tpu", "--json=-"),
  )
  rows = json.loads(out)
  wrong = [row for row in rows if "error" in row]
  assert [row["direction"] for row in wrong] == ["forward", "forward + backward"]
  assert all(row["implementation"] == "mosaic_tpu" and "CPU" in row["error"] for row in wrong)
  rows = [row for row in rows if row not in wrong]
  assert {row["implementation"] for row in rows} == {"dense", "ragged_dot", "local dispatch"}
  for row in rows:
    assert row["median_secs"] > 0 and row["of_dense"] > 0
    work = 6 * 96 * 4 * 32 * 16 * (1 if row["direction"] == "forward" else 3)
    assert row["gflops_per_sec"] * 1e9 * row["median_secs"] == pytest.approx(work)


@pytest.mark.tpu
def test_bench_kernels_compiles(tmp_path):
  pytest.importorskip("libtpu", reason="needs libtpu, the compiler of TPUs: pip install .[tpu]")
  args = ("scripts/bench_kernels.py", "--compile-only", "--topology=v6e:2x2x1", "--shapes=tiny")
  picture = tmp_path / "roofline.png"
  file = tmp_path / "rows.json"
  out = runs.run(*args, "--kernels=routing,grouped_matmul", f"--json={file}", f"--plot={picture}")
  rows = json.loads(file.read_text())
  assert "mosaic_tpu" in out
  found = {(row["kernel"], row["implementation"]): row for row in rows}
  assert "absent" in found["grouped_matmul", "tokamax"]["error"]
  for kernel in ("routing", "grouped_matmul"):
    for name in ("reference", "mosaic_tpu"):
      row = found[kernel, name]
      assert row["chip"] == "v6e" and row["shape"] == "tiny"
      assert row["bytes"] > 0 and row["bundles"] > 0 and row["cycles_bound"] > 0
  assert found["grouped_matmul", "mosaic_tpu"]["mxu_occupancy"] > 0
  assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
  "args, message",
  [
    (("--compile-only", "--kernels=sorting"), "--kernels must be among routing,"),
    (("--compile-only", "--shapes=v9"), "--shapes must be among v3, v2_lite, tiny, got v9"),
    (("--compile-only", "--topology=v9:2x2"), "of a chip among v5p, v6e, tpu7x, h100, got 'v9"),
    ((), "give one of --config and --shapes, whose sizes are timed, or --compile-only"),
    (("--shapes=tiny", "--tokens=8"), "--tokens goes with --config"),
    (
      ("--shapes=tiny", "--oracle=xla"),
      "--oracle must be an implementation of grouped_swiglu (ref",
    ),
    (("--shapes=tiny", "--tune=t.json", "--oracle=blocked"), "so --oracle must not be given"),
    (("--compile-only", "--tune=t.json"), "--tune times kernels on a device, which --compile-only"),
    (("--tune=t.json", "--implementations=ragged_dot"), "--tune's implementations must be among"),
  ],
)
def test_bench_kernels_refuses_in_one_sentence(args, message):
  code, out, err = runs.call("scripts/bench_kernels.py", *args)
  assert (code, out) == (2, "")
  [line] = [line for line in err.splitlines() if line.startswith("error: ")]
  assert message in line and "Traceback" not in err
