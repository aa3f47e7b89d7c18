"""Compile-only H100s, what their compiler said, and Mosaic GPU's interpreter for CPU.

The one place that touches the interpreter's private modules.
"""

import contextlib
import dataclasses
import functools
import os
import tempfile
import threading
from unittest import mock

import jax
import numpy as np
import pytest
from jax._src import custom_derivatives
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from dsmoe.compilers import compile_only
from pallas_kernels.mla_attention import gpu_decode
from pallas_kernels.quantized_matmul import gpu as quantized


def h100_devices():
  """Returns 16 H100s that can be compiled for; skips where the CUDA plugin is missing."""
  if missing := compile_only.missing_compiler("h100"):
    pytest.skip(missing)
  return compile_only.h100_devices()


@contextlib.contextmanager
def _output(file):
  """Sends what the process writes, C++ too, to a file."""
  saved = [os.dup(fd) for fd in (1, 2)]
  try:
    for fd in (1, 2):
      os.dup2(file.fileno(), fd)
    yield
  finally:
    for fd, old in zip((1, 2), saved):
      os.dup2(old, fd)
      os.close(old)


def compile_for_h100(fn, *shapes):
  """Compiles fn for one H100.

  Returns:
    The executable, and what was printed about its kernels; for `gpu_resources`. A kernel that
    this process has compiled before prints nothing.
  """
  mesh = jax.sharding.Mesh(np.array(h100_devices()[:1]), ("data",))
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  structs = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole), shapes)
  os.environ |= {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_HOST_LLVM": "1"}
  cached = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)  # a hit prints nothing
  try:
    with tempfile.TemporaryFile("w+") as file:
      with _output(file), jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(fn, out_shardings=whole).lower(*structs).compile()
      file.seek(0)
      return compiled, file.read()
  finally:
    jax.config.update("jax_enable_compilation_cache", cached)


def _multiply(original, **call):
  """The interpreter's wgmma, for operands it does not know: transposed, or in registers."""
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks
  from jax._src.state.types import TransposeTransform

  content = {}
  in_registers = np.ndim(call["a_allocation_key_as_array"]) == 2
  for name in ("acc", "b") if in_registers else ("acc", "a", "b"):
    key = callbacks.HostAllocationKey.from_array(call[f"{name}_allocation_key_as_array"])
    transforms = callbacks._remove_noop_transforms(call[f"{name}_transforms"])
    turned = [t for t in transforms if isinstance(t, TransposeTransform)]
    at = [t for t in transforms if not isinstance(t, TransposeTransform)]
    if turned and transforms[-1:] != tuple(turned):
      raise NotImplementedError(f"slices of a transposed reference: {transforms}")
    content[name] = (key, callbacks.interpret_utils.to_range(jax.tree.map(int, at)), bool(turned))
  if not in_registers and not any(turned for *_, turned in content.values()):
    return original(**call)
  memory = callbacks._get_shared_memory()
  thread = memory.get_global_thread_id(int(call["device_id"]), int(call["thread_id"]))
  values = {name: memory.get_buffer_content(*at[:2], thread)[0] for name, at in content.items()}
  values = {name: v.T if content[name][2] else v for name, v in values.items()}
  a = np.asarray(call["a_allocation_key_as_array"]) if in_registers else values["a"]
  result = values["acc"] + np.matmul(a, values["b"], dtype=call["acc_dtype"])
  memory.store_buffer_content(*content["acc"][:2], result, thread)
  return call["token"]


def _transfer(original, **call):
  """The interpreter's copy, for copies that an H100 makes as well."""
  from jax._src.pallas.mosaic_gpu import core
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as callbacks

  tilings = [t.tiling for t in call["dst_transforms"] if isinstance(t, core.UntilingTransform)]
  at = callbacks.interpret_utils.to_range(jax.tree.map(int, call["src_transforms"]))
  starts = [s.start if isinstance(s, slice) else s for s in at if isinstance(s, slice)]
  for tiling in tilings:
    # A tile's inside is a dimension of its own to the copy engine: one begun in the middle ends
    # early, and zeros follow.
    if any(start % tile for start, tile in zip(starts[-len(tiling) :], tiling)):
      raise ValueError(f"a copy into tiles of {tiling} must begin at a whole one, got {at}")
  return original(**call)


def _run_state(body):
  """`pl.run_state` of an accumulator, for a body that only adds products to it."""

  def run(init):
    scope = lambda ref: (body(ref), ref[...])[1]  # noqa: E731
    return init._init + pl.run_scoped(scope, plgpu.ACC(init.shape, init.dtype))

  return run


def _load(ref, idx, *, layout, **_):
  """`plgpu.load`, also of a transposed reference."""
  from jax._src.state.types import TransposeTransform

  transforms = getattr(ref, "transforms", ())
  if transforms and isinstance(transforms[-1], TransposeTransform):
    value = dataclasses.replace(ref, transforms=transforms[:-1])[...].T[idx]
  else:
    value = ref[idx]
  return plgpu.layout_cast(value, layout)


def _forward_rule(fun, debug_fun, fwd, *_, **__):
  """`optimize_remat` that does not: the forward rule runs even where nothing keeps its codes."""
  del fun, debug_fun
  return fwd


class _CompiledOnce:
  """Runs the warpgroups' programs, which the interpreter would compile for each thread block."""

  def __init__(self):
    self.lock, self.compiled = threading.Lock(), {}

  def __call__(self, jaxpr, consts, *args):
    with self.lock:
      if id(jaxpr) not in self.compiled:

        def program(consts, *args):
          jax.core.eval_jaxpr(jaxpr, consts, *args)

        self.compiled[id(jaxpr)] = (jaxpr, jax.jit(program).lower(consts, *args).compile())
    self.compiled[id(jaxpr)][1](consts, *args)


@contextlib.contextmanager
def interpreted():
  """Runs Mosaic GPU kernels traced inside on CPU, uninitialised memory being NaN.

  On a GPU (DSMOE_TEST_PLATFORM=cuda) the kernels themselves run.

  Rows a copy takes from past an array's end are NaN too; an H100 would give zeros. Layouts of
  registers mean nothing here. A thread block's warpgroups wait for each other in XLA's threads:
  there must be as many, which the 8 devices of conftest.py see to. jax 0.10's interpreter knows no
  clusters: there each thread block fetches for itself, and what a cluster shares has its values
  untested.
  """
  if jax.default_backend() == "gpu":
    yield
    return
  run_state = mock.patch.object(pl, "run_state", _run_state)  # which it does not know
  # The interpreter's callbacks have effects, which jax does not let a custom gradient choose by.
  either = mock.patch.object(custom_derivatives, "optimize_remat_of_custom_vjp_fwd", _forward_rule)
  if hasattr(plgpu, "force_gpu_interpret_mode"):  # jax 0.12
    params = plgpu.InterpretGPUParams(out_of_bounds_reads="uninitialized")
    with plgpu.force_gpu_interpret_mode(params), run_state, either:
      yield
    return
  from jax._src.interpreters import mlir
  from jax._src.pallas.mosaic.interpret import thread_map
  from jax._src.pallas.mosaic_gpu import core
  from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params

  mlir.register_lowering(core.layout_cast_p, lambda ctx, x, **_: [x], platform="cpu")
  gpu_callbacks.reset_gpu_interpret_mode_state()
  wgmma = functools.partial(_multiply, gpu_callbacks.wgmma)
  copy_name = "_execute_device_local_memory_transfer"
  transfer = functools.partial(_transfer, getattr(gpu_callbacks, copy_name))
  interpret = params.InterpretGPUParams(out_of_bounds_reads="uninitialized")
  with (
    mock.patch.object(gpu_callbacks, "wgmma", wgmma),
    mock.patch.object(gpu_callbacks, copy_name, transfer),
    mock.patch.object(thread_map, "_run_jaxpr", _CompiledOnce()),
    mock.patch.object(plgpu, "load", _load),  # nor this
    mock.patch.object(gpu_decode, "CLUSTER", 1),
    mock.patch.object(quantized, "CLUSTER", 1),
    run_state,
    either,
    params.force_gpu_interpret_mode(interpret),
  ):
    yield
