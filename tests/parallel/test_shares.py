"""The plan that gives every device equally many rows, against a count of single rows."""

import functools

import jax
import numpy as np
import pytest

from dsmoe.parallel import shares

X, O, ROWS = 6, 3, 40  # devices, experts of each, rows of each on average


def _counts(kind: str, seed: int):
  rng = np.random.default_rng(seed)
  E, total = X * O, X * ROWS
  if kind == "one_expert":
    return np.eye(E, dtype=np.int64)[rng.integers(E)] * total
  if kind == "one_device_alike":
    first = rng.integers(X) * O
    return np.where(np.arange(E) // O == first // O, total // O, 0)
  if kind == "just_above":  # all but the last device are one row above, which lacks them all
    counts = np.full((X, O), ROWS // O)
    counts[:, 0] += ROWS - counts.sum(axis=1) + 1
    counts[-1] = 0
    counts[-1, 1] = ROWS - (X - 1)
    return counts.reshape(-1)
  share = {
    "even": np.ones(E),
    "zipf": rng.permutation(1 / np.arange(1, E + 1) ** 1.3),
    "few": rng.permutation(np.arange(E) < 4).astype(float),
    "wild": rng.exponential(size=E) ** 4,
  }[kind]
  return rng.multinomial(total, share / share.sum())


def devices_by_loops(expert_P, num_devices: int, per_device: int):
  """Returns the device that computes each row: one device after the other is filled, row by row."""
  share = len(expert_P) // num_devices
  device_P = expert_P // per_device
  left = []  # of each device's rows: the hottest expert's first
  for x in range(num_devices):
    rows = [np.flatnonzero(expert_P == x * per_device + o) for o in range(per_device)]
    left.append(np.concatenate(sorted(rows, key=len, reverse=True)))
  above = [x for x in range(num_devices) if len(left[x]) > share]
  for taker in [x for x in range(num_devices) if len(left[x]) < share]:
    while taker is not None:
      donor, lacking = above[0], share - len(left[taker])
      device_P[left[donor][:lacking]] = taker
      left[donor] = left[donor][lacking:]
      taker = donor if len(left[donor]) < share else None
      if len(left[donor]) <= share:
        above.pop(0)
  return device_P


@functools.cache
def _planned():
  def run(counts_E, expert, rank):
    plan = shares.plan(counts_E, X)
    return plan, shares.device_of_rows(plan, expert, rank)

  return jax.jit(run)


@pytest.mark.parametrize(
  "kind", ["even", "zipf", "few", "wild", "one_expert", "one_device_alike", "just_above"]
)
def test_every_device_has_its_share_and_one_donor(kind):
  for seed in range(20):
    counts_E = _counts(kind, seed).astype(np.int32)
    expert_P = np.repeat(np.arange(X * O, dtype=np.int32), counts_E)
    rank_P = np.concatenate([np.arange(n, dtype=np.int32) for n in counts_E])
    # As NumPy arrays: elements are looked at one by one.
    plan, device_P = jax.device_get(_planned()(counts_E, expert_P[:, None], rank_P[:, None]))
    device_P = device_P[:, 0]
    np.testing.assert_array_equal(device_P, devices_by_loops(expert_P, X, O))
    assert np.bincount(device_P, minlength=X).tolist() == [ROWS] * X
    for x in range(X):
      own = expert_P // O == x
      mine = device_P == x
      donors = set((expert_P // O)[mine & ~own].tolist())
      assert donors <= {int(plan.donor_X[x])}
      assert (mine & ~own).sum() == plan.taken_X[x]
      kept = np.bincount(expert_P[mine & own], minlength=X * O)[x * O : (x + 1) * O]
      np.testing.assert_array_equal(kept, plan.kept_E[x * O : (x + 1) * O])
      lent = np.bincount(expert_P[mine & ~own], minlength=X * O)
      donor = int(plan.donor_X[x])
      hottest = donor * O + np.argsort(plan.heat_E[donor * O : (donor + 1) * O])
      np.testing.assert_array_equal(lent[hottest], plan.lent_XO[x])
      # Who gives rows away keeps none of its experts that is hotter than one it gives.
      given = np.bincount(expert_P[own & ~mine], minlength=X * O)[x * O : (x + 1) * O]
      heat = np.asarray(plan.heat_E[x * O : (x + 1) * O])
      assert heat[given > 0].max(initial=-1) <= heat[kept > 0].min(initial=O)


def test_even_loads_move_nothing():
  plan, _ = _planned()(np.full(X * O, 20, np.int32), np.zeros((1, 1), int), np.zeros((1, 1), int))
  assert not plan.taken_X.any() and not plan.given_X.any() and not plan.lent_XO.any()
  assert plan.donor_X.tolist() == list(range(X))


def test_copies_of_a_single_hot_expert():
  """It lies on every device; the fewest copies there can be."""
  plan, _ = _planned()(_counts("one_expert", 0).astype(np.int32), *[np.zeros((1, 1), int)] * 2)
  copies_X = (np.asarray(plan.lent_XO) > 0).sum(axis=1)
  assert sorted(copies_X.tolist()) == [0] + [1] * (X - 1)


@pytest.mark.parametrize("num_devices", [8, 64])
def test_few_copies_at_deepseek_v3_s_shapes(num_devices):
  """256 experts, 4,096 tokens a device, 8 experts a token; Zipf's law with these exponents."""
  rng, total = np.random.default_rng(0), num_devices * 4096 * 8
  planned = jax.jit(shares.plan, static_argnums=1)
  for exponent in (0, 0.6, 1.2):
    share = rng.permutation(np.arange(1, 257) ** -float(exponent))
    share = np.minimum(share / share.sum(), 1 / 8)  # a token chooses an expert once
    counts_E = rng.multinomial(total, share / share.sum()).astype(np.int32)
    plan = planned(counts_E, num_devices)
    copies_X = (np.asarray(plan.lent_XO) > 0).sum(axis=1)
    sent_X = np.bincount(plan.donor_X, weights=copies_X, minlength=num_devices)
    assert copies_X.max() <= 2 and copies_X.mean() < 1.2
    assert sent_X.max() <= 22
