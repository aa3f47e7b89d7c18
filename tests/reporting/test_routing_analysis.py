"""Traces are analysed as loops over single tokens do; all dimensions are distinct."""

import json

import numpy as np
import pytest

from dsmoe import config as config_lib
from dsmoe.reporting import routing_analysis, routing_trace
from tests import runs
from tests.helpers import small_config

L, B, S, K, E, G = 3, 6, 7, 4, 10, 5
M = B * S


def random_trace(seed: int, step: int = 4) -> routing_trace.Trace:
  """Draws a trace of uneven load, with a dead expert in the first layer."""
  rng = np.random.default_rng(seed)
  expert_LMK = np.zeros((L, M, K), np.uint8)
  for l in range(L):
    weight_E = rng.random(E) ** 3
    weight_E[2] *= l > 0
    for m in range(M):
      expert_LMK[l, m] = rng.choice(E, K, replace=False, p=weight_E / weight_E.sum())
  counts_LE = np.stack([np.bincount(e.ravel(), minlength=E) for e in expert_LMK])
  return routing_trace.Trace(expert_LMK, counts_LE.astype(np.int32), step, B, S, 1)


def domains(seed: int) -> routing_analysis.Domains:
  domain_M = np.random.default_rng(seed).integers(0, 2, M)
  return routing_analysis.Domains(("a", "b"), domain_M)


def tokens_of(trace, layer: int, expert: int) -> set[int]:
  return {m for m in range(M) if expert in trace.expert_LMK[layer, m].tolist()}


@pytest.mark.parametrize("seed", range(3))
def test_load_pairs_and_groups_match_loops(seed):
  trace = random_trace(seed)
  found = routing_analysis.analyze(trace, G)
  for l in range(L):
    sets = [tokens_of(trace, l, e) for e in range(E)]
    loads = [len(tokens) for tokens in sets]
    assert found.counts_LE[l].tolist() == loads
    assert found.load["dead_experts"][l] == sum(load == 0 for load in loads)
    assert found.load["starved_experts"][l] == sum(load < 0.1 * M * K / E for load in loads)
    np.testing.assert_allclose(found.load["max_vio"][l], max(loads) / (M * K / E) - 1, rtol=1e-12)
    for e in range(E):
      for f in range(E):
        assert found.pairs_LEE[l, e, f] == len(sets[e] & sets[f])
    numbers = [len({int(e) // (E // G) for e in trace.expert_LMK[l, m]}) for m in range(M)]
    assert found.groups_LG[l].tolist() == [numbers.count(n) for n in range(1, G + 1)]
    mean = routing_analysis.mean_groups(found.groups_LG)[l]
    np.testing.assert_allclose(mean, sum(numbers) / M, rtol=1e-12)
    strongest = routing_analysis.strongest_pairs(found, l, 4)
    assert [n for *_, n, _ in strongest] == sorted(
      (len(sets[e] & sets[f]) for e in range(E) for f in range(e)), reverse=True
    )[:4]
    for e, f, number, lift in strongest:
      assert number == len(sets[e] & sets[f])
      np.testing.assert_allclose(lift, number * M / (loads[e] * loads[f]), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_overlap_of_layers_matches_loops(seed):
  trace = random_trace(seed)
  found = routing_analysis.analyze(trace)
  assert found.overlap_tokens == M and found.groups_LG is None and found.domains is None
  for a in range(L):
    for b in range(L):
      own = [tokens_of(trace, a, e) for e in range(E)]
      others = [tokens_of(trace, b, e) for e in range(E)]
      best, chance = [], []
      for x in own:
        if x:
          best.append(max(len(x & y) / len(x | y) for y in others))
          together = [(len(x) * len(y) / M, len(x) + len(y)) for y in others]
          chance.append(max(both / (total - both) for both, total in together))
      np.testing.assert_allclose(found.layer_overlap_LL[a, b], np.mean(best), rtol=1e-12)
      if a != b:
        np.testing.assert_allclose(found.chance_overlap_LL[a, b], np.mean(chance), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_domains_match_loops(seed):
  trace, found_in = random_trace(seed), domains(seed)
  found = routing_analysis.analyze(trace, domains=found_in)
  for l in range(L):
    counts_DE = np.zeros((2, E), int)
    for m in range(M):
      for k in range(K):
        counts_DE[found_in.domain_M[m], trace.expert_LMK[l, m, k]] += 1
    np.testing.assert_array_equal(found.domain_counts_LDE[l], counts_DE)
    shares = [counts / counts.sum() for counts in counts_DE]
    both = sum(min(p, q) for p, q in zip(*shares))
    np.testing.assert_allclose(found.domain_overlap_LDD[l], [[1, both], [both, 1]], rtol=1e-12)


def test_rows_come_from_the_sources_that_training_draws_them_from():
  """Row n comes from the source whose number of rows grows from n to n + 1."""
  weights = [1.0, 3.0, 2.0]
  data = {"train_globs": ["a", "b", "c"], "train_weights": weights, "sequence_length": S}
  found = []
  for step in range(1, 11):
    names, domain_M = routing_analysis.domains_of(random_trace(0, step), data)
    assert names == ("a", "b", "c")
    rows_BS = domain_M.reshape(B, S)
    assert (rows_BS == rows_BS[:, :1]).all()
    found += rows_BS[:, 0].tolist()
  for number in range(1, len(found)):
    for source, weight in enumerate(weights):
      assert abs(found[:number].count(source) - number * weight / 6) <= 3
  assert routing_analysis.domains_of(random_trace(0), data | one_source()) is None


def one_source():
  return {"train_globs": ["a"], "train_weights": [1.0]}


def test_json_has_no_nan():
  trace = random_trace(0)
  only_a = routing_analysis.Domains(("a", "b"), np.zeros(M, np.int64))
  text = json.dumps(
    routing_analysis.to_dict(routing_analysis.analyze(trace, G, only_a)), allow_nan=False
  )
  values = json.loads(text)
  [[one, *no], nothing] = values["domain_overlap"][0]
  assert one == pytest.approx(1.0, rel=1e-12) and no == [None] and nothing == [None, None]
  assert values["domains"] == ["a", "b"] and len(values["tokens_by_groups"]) == L


def test_rules():
  trace = random_trace(0)
  with pytest.raises(
    ValueError, match=r"groups \(3\) must be at least 1 and divide the 10 experts"
  ):
    routing_analysis.analyze(trace, 3)
  beyond = trace._replace(counts_LE=trace.counts_LE[:, :3])
  with pytest.raises(ValueError, match="experts are below 3, got 42 tokens and experts up to 9"):
    routing_analysis.analyze(beyond)
  short = routing_analysis.Domains(("a",), np.zeros(5, int))
  with pytest.raises(ValueError, match="each of 42 tokens, got 5"):
    routing_analysis.analyze(trace, domains=short)
  data = {"train_globs": ["a", "b"], "train_weights": [1.0], "sequence_length": S}
  for wrong in ({}, data, data | {"train_weights": [1.0, 0.0]}):
    with pytest.raises(ValueError, match="the config must say what the rows were drawn from"):
      routing_analysis.domains_of(trace, wrong)
  with pytest.raises(ValueError, match=r"sequence_length \(8\) must be that of the trace \(7\)"):
    routing_analysis.domains_of(trace, data | {"train_weights": [1, 1], "sequence_length": 8})


def write(folder, trace: routing_trace.Trace):
  folder.mkdir(parents=True)
  path = folder / f"step_{trace.step}_process_0.npz"
  arrays = trace._asdict() | {"place_M": np.arange(M), "num_processes": 1}
  np.savez_compressed(path, **arrays)
  return path


@pytest.mark.slow
def test_the_script_prints_tables_a_picture_and_json(tmp_path):
  one, other = random_trace(0), random_trace(1, step=5)
  path = write(tmp_path / "run" / routing_trace.FOLDER, one)
  globs = {"data.train_globs": ("[a]", "b"), "data.train_weights": (1.0, 1.0)}
  config = small_config(**globs, **{"data.sequence_length": S})
  (tmp_path / "run" / "config.json").write_text(json.dumps(config_lib.to_dict(config)))
  lonely = write(tmp_path / "lonely", other)
  file, picture = tmp_path / "found.json", tmp_path / "found.png"
  args = ("scripts/analyze_routing.py", path, lonely, f"--groups={G}")
  code, out, err = runs.call(*map(str, (*args, f"--json={file}", f"--plot={picture}")))
  assert code == 0, err
  for text in ("MaxVio", "groups a token", "[a] / b", "Commonest pairs", "Domains are not known"):
    assert text in out, text
  assert picture.read_bytes().startswith(b"\x89PNG")
  first, second = json.loads(file.read_text())
  domains = routing_analysis.domains_of(one, config_lib.to_dict(config)["data"])
  expected = routing_analysis.to_dict(routing_analysis.analyze(one, G, domains))
  assert {name: first[name] for name in expected} == json.loads(json.dumps(expected))
  assert (first["step"], first["tokens"], second["step"]) == (4, M, 5)
  assert "domains" not in second
  code, out, _ = runs.call(*map(str, (*args, "--json=-")))
  assert code == 0 and json.loads(out) == [first, second]
  for wrong, message in (
    ((), "the file of at least one routing trace must be given"),
    (("/nowhere.npz",), "the file of a routing trace must exist, got /nowhere.npz"),
    ((path, "--groups=3"), "groups (3) must be at least 1 and divide the 10 experts"),
    ((path, "--plot=/nowhere/a.png"), "the folder of --plot must exist"),
  ):
    code, out, err = runs.call("scripts/analyze_routing.py", *map(str, wrong))
    assert code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1, err


def test_layers_that_are_shown_are_spread_evenly():
  assert list(routing_analysis.shown_layers(5, 6)) == [0, 1, 2, 3, 4]
  assert list(routing_analysis.shown_layers(58, 4)) == [0, 19, 38, 57]
