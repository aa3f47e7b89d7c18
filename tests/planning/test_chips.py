"""The table of chips against published figures and jax's own names."""

import types

import pytest

from dsmoe.planning import accounting, chips

TERA = 1e12


# Dense bfloat16 and FP8 peaks of a chip, TFLOP/s, as peers report their utilization against.
@pytest.mark.parametrize(
  "name, bfloat16, fp8",
  [
    ("v5p", 459, None),
    ("v6e", 918, None),
    ("tpu7x", 2307, 4614),
    ("h100", 989, 1979),
    ("h800", 989, 1979),
  ],
)
def test_peaks_are_the_published_ones(name, bfloat16, fp8):
  chip = chips.CHIPS[name]
  assert chip.peak_flops * chip.devices_per_chip == bfloat16 * TERA
  assert (chip.fp8_flops or 0) * chip.devices_per_chip == (fp8 or 0) * TERA


def test_b200_is_within_what_is_published():
  assert 2250 * TERA <= chips.CHIPS["b200"].peak_flops <= 2500 * TERA


def test_bandwidths_are_the_published_ones():
  # Measured on TPU7x: 3,199 GB/s a device, which must not exceed the peak. H800: 3,350 GB/s.
  assert 3199e9 < chips.CHIPS["tpu7x"].hbm_bytes_per_sec == 3690e9
  assert chips.CHIPS["h800"].hbm_bytes_per_sec == pytest.approx(3350e9, rel=1e-3)
  # All-to-all over NVLink of an H800, one direction: 160 GB/s of 200 are reported.
  assert chips.CHIPS["h800"].interconnect_bytes_per_sec / 2 == 200e9


def test_every_device_kind_is_listed_once():
  kinds = [kind for chip in chips.CHIPS.values() for kind in chip.device_kinds]
  assert len(kinds) == len(set(kinds))
  assert all(chip.name == name and chip.source for name, chip in chips.CHIPS.items())
  for chip in chips.CHIPS.values():
    for kind in chip.device_kinds:
      assert chips.of_device(types.SimpleNamespace(device_kind=kind)) is chip
  assert chips.of_device(types.SimpleNamespace(device_kind="cpu")) is None


def test_tpus_are_those_jax_knows():
  tpu_info = pytest.importorskip(
    "jax._src.pallas.mosaic.tpu_info", reason="jax's private table of TPUs has moved"
  )
  names = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "7x"}
  for name, version in names.items():
    chip = chips.CHIPS[name]
    for kind in chip.device_kinds:
      assert tpu_info.chip_version_from_device_kind(kind).value == version
    cores = 2 if name in ("v4", "v5p") else 1  # a device has both cores of these
    info = tpu_info.get_tpu_info_for_chip(tpu_info.chip_version_from_device_kind(kind), cores)
    assert info.bf16_ops_per_second * cores == pytest.approx(chip.peak_flops, rel=5e-3)
    assert info.hbm_capacity_bytes * cores == pytest.approx(chip.hbm_bytes, rel=1e-2)
    assert info.mxu_column_size == (chip.mxu_size or info.mxu_column_size)


@pytest.mark.parametrize("name, macs_a_cycle", [("v5p", 8), ("v6e", 4), ("tpu7x", 4)])
def test_clocks_reach_the_peaks(name, macs_a_cycle):
  """Rows all matrix units of a device take a cycle, times size^2, times two, is the peak."""
  chip = chips.CHIPS[name]
  reached = macs_a_cycle * chip.mxu_size**2 * 2 * chip.clock_hz
  assert reached == pytest.approx(chip.peak_flops, rel=2e-3)


def test_accounting_takes_peaks_from_the_table():
  assert accounting.peak_flops(types.SimpleNamespace(device_kind="NVIDIA H200")) == 989 * TERA
  assert accounting.peak_flops(types.SimpleNamespace(device_kind="cpu")) is None
