"""Converts published checkpoints to the workdir of a run and back, on disk, piece by piece.

Shapes: see `dsmoe/huggingface/loading.py`, whose table of names serves both directions.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from dsmoe import checkpoint
from dsmoe import config as config_lib
from dsmoe import model as model_lib
from dsmoe.checkpoint import slices
from dsmoe.config import Config, ModelConfig
from dsmoe.huggingface import files, loading, staging, text
from dsmoe.huggingface.config import FIELDS, config_to_hf, fail, fp8_settings
from dsmoe.huggingface.fp8 import FP8_BLOCK, quantise
from dsmoe.model import parameters

STEP = 0  # step of an imported checkpoint
FORMATS = ("float32", "bfloat16", "fp8")
# Matrices that DeepSeek leaves in bfloat16 when the others are FP8.
NOT_FP8 = ("head", "router", "eh_proj")


def _piece_numbers(slots: Mapping[str, loading.Slot]) -> int:
  """Returns the size of a piece, in numbers: several pieces are small beside a tensor."""
  largest = max(math.prod(slot.shape) for slot in slots.values())
  return min(max(largest // 16, 2 << 20), 16 << 20)


def state_path(path: tuple[str, ...]) -> tuple[str, ...]:
  """Returns a leaf's path in a checkpoint's state."""
  return ("router_bias" if path[-1] == "router_bias" else "params", *path)


def leaf_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns the shape of every leaf of the model by its path in a checkpoint's state."""
  _, params, router_bias = model_lib.shapes_of(config)
  leaves = loading.flat(params) | loading.flat(router_bias)
  return {state_path(path): leaf.shape for path, leaf in leaves.items()}


def config_for(base: Config, model: ModelConfig) -> Config:
  """Returns `base` with another model, without the settings that do not fit that model."""
  methods = base.balance.methods
  if model.num_moe_layers and not model.uses_router_bias:
    methods = tuple(method for method in methods if method != "bias")
  length = min(base.data.sequence_length, model.max_position_embeddings)
  return dataclasses.replace(
    base,
    model=model,
    balance=dataclasses.replace(base.balance, methods=methods),
    data=dataclasses.replace(base.data, sequence_length=length),
  )


def _on_disk(path: str | pathlib.Path) -> pathlib.Path:
  if "://" in str(path):
    fail(f"checkpoints are converted from disk to disk, got {path}")
  return pathlib.Path(path).resolve()


def import_folder(
  folder: str | pathlib.Path,
  workdir: str | pathlib.Path,
  base: Config,
  compute_dtype: str = "bfloat16",
  dtype: str | None = None,
  no_mtp: bool = False,
) -> loading.Account:
  """Turns a published checkpoint into the workdir of a run at step 0.

  Vectors and the router's weights and bias are float32 on disk whatever `dtype` says. An
  interrupted conversion resumes when it is called again; `workdir` exists only when it is done.

  Args:
    folder: see `loading.load_pretrained`.
    workdir: on disk; must not exist.
    base: settings that a published config.json does not have.
    compute_dtype: dtype of the model's matrix products.
    dtype: dtype of matrices on disk, float32 or bfloat16; None: bfloat16 if every published matrix
      has it, else float32, which scaled FP8 weights need.
    no_mtp: whether to leave out MTP layers.

  Returns:
    How every tensor was used.

  Raises:
    ValueError: see `loading.load_pretrained` and `Staging`.
  """
  folder, workdir = _on_disk(folder), _on_disk(workdir)
  checkpoint.check_path(workdir)
  staging.check_absent(workdir)
  own = {f.name: getattr(base.model, f.name) for f in dataclasses.fields(ModelConfig)}
  own = {k: v for k, v in own.items() if k not in FIELDS and not k.startswith("rope_")}
  own["compute_dtype"] = compute_dtype
  if no_mtp:
    own["num_nextn_predict_layers"] = 0
  opened = loading.open_pretrained(folder, **own)
  slots, stored = opened.slots, opened.weights.stored
  config = config_for(base, opened.config)
  if dtype is None:
    matrices = {stored[name].dtype for name, slot in slots.items() if len(slot.shape) > 1}
    dtype = "bfloat16" if matrices <= {"BF16"} else "float32"
  shapes, limit = leaf_shapes(config.model), _piece_numbers(slots)

  tensors = [*stored.values(), *opened.weights.scales.values()]
  sources = {tensor.file: tensor.file.stat() for tensor in tensors}
  job: dict[str, Any] = {
    "import": str(folder),
    "dtype": dtype,
    "config": config_lib.to_dict(config),
    "files": {path.name: [stat.st_size, stat.st_mtime_ns] for path, stat in sources.items()},
  }
  width = {"float32": 4, "bfloat16": 2}[dtype]
  text.generation_tokens(folder)
  tokenizer_json = text.converted(folder, config.model.vocab_size)
  loading.check_copies(opened)
  total = width * sum(math.prod(shape) for shape in shapes.values())
  with staging.Staging(workdir, job, total) as stage:
    step_folder = stage.folder / checkpoint.CHECKPOINTS / str(STEP)
    (step_folder / "state").mkdir(parents=True, exist_ok=True)
    arrays = {}
    for slot in slots.values():
      path = state_path(slot.path)
      if path not in arrays:
        part = list(slot.shape)
        part[slot.inputs] = slot.block(limit)
        exact = parameters.of(slot.path).float32
        arrays[path] = slices.create(
          step_folder / "state",
          path,
          shapes[path],
          "float32" if exact else dtype,
          (*(1,) * len(slot.at), *part),
        )

    def make(name: str) -> None:
      slot = slots[name]
      array = arrays[state_path(slot.path)]
      for rows, index in slot.pieces(limit):
        piece = opened.read(name, rows.start, rows.stop)
        target = array.dtype.numpy_dtype
        if piece.dtype.itemsize > target.itemsize:  # transpose the narrower of the two
          piece = piece.astype(target)
        array[index].write(slot.to_ours(piece).astype(target, copy=False)).result()

    order = sorted(slots, key=lambda name: (stored[name].file, stored[name].start))
    sizes = {name: stored[name].num_bytes for name in order}
    staging.run(stage, sizes, make, lambda: None, "import")  # tensorstore flushes every chunk
    slices.write_metadata(step_folder, shapes)
    checkpoint.record_config(epath.Path(stage.folder), config, STEP)
    text.copy(folder, stage.folder / "data")
    if tokenizer_json is not None:
      (stage.folder / "data" / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    stage.finish()
  return opened.account


def _format_of(slot: loading.Slot, format: str) -> str:
  if format == "float32" or slot.path[-1] == "router_bias":
    return "F32"
  in_block = slot.inputs and slot.path[-1] not in NOT_FP8
  return "F8_E4M3" if format == "fp8" and in_block else "BF16"


def export_workdir(
  workdir: str | pathlib.Path,
  folder: str | pathlib.Path,
  format: str = "bfloat16",
  ue8m0: bool = False,
  max_shard_bytes: int = 5 * 10**9,
  step: int | None = None,
) -> int:
  """Writes a checkpoint of a run as a published one, which transformers loads.

  The router's bias is float32 in every format. `fp8` is DeepSeek's: embedding, head, norms,
  router and eh_proj stay bfloat16. MTP layers repeat embedding and head, as published ones do.
  An interrupted conversion resumes when it is called again; `folder` exists only when it is done.

  Args:
    workdir: the run's folder, on disk.
    folder: must not exist.
    format: one of `FORMATS`.
    ue8m0: whether the scales of `fp8` are powers of two, a byte each.
    max_shard_bytes: upper limit of the bytes of a file's tensors.
    step: step of the checkpoint; None: the newest.

  Returns:
    The step.

  Raises:
    ValueError: for no such checkpoint, one whose arrays are not those of its config.json, an
      unknown format, a broken tokenizer, NaN or infinity to become FP8, a model that no
      published config.json describes; and see `Staging`.
  """
  if format not in FORMATS:
    fail(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
  if max_shard_bytes < 1:
    fail(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
  if ue8m0 and format != "fp8":
    fail(f"ue8m0 is a kind of scale of the format fp8, got {format}")
  workdir, folder = _on_disk(workdir), _on_disk(folder)
  config = checkpoint.load_config(workdir)
  hf_config = config_to_hf(config.model)
  step = checkpoint.find_step(workdir, step)
  arrays = slices.open_step(workdir, step, leaf_shapes(config.model))
  slices.check_arrays(workdir, step, arrays, leaf_shapes(config.model))
  slots = loading.layout(*model_lib.shapes_of(config.model)[1:], config.model)
  # A tied head is left out, though MTP layers have theirs.
  copies = {n: o for n, o in loading.copies_of(config.model).items() if n != "lm_head.weight"}
  slots |= {name: slots[original] for name, original in copies.items()}
  limit = _piece_numbers(slots)

  tensors, scale_dtype = {}, "F8_E8M0" if ue8m0 else "F32"
  for name, slot in slots.items():
    tensors[name] = _format_of(slot, format), slot.hf_shape
    if tensors[name][0] == "F8_E4M3":
      blocks = tuple(-(-n // b) for n, b in zip(slot.hf_shape, FP8_BLOCK))
      tensors[name + files.SCALE] = scale_dtype, blocks
  job: dict[str, Any] = {
    "export": str(workdir),
    "step": step,
    "config": config_lib.to_dict(config.model),
    "format": format,
    "ue8m0": ue8m0,
    "max_shard_bytes": max_shard_bytes,
    "state": slices.identity(workdir, step),
  }
  text_folder = pathlib.Path(checkpoint.tokenizer_path(config, workdir)).parent
  tokens, text_files = text.settings(text_folder, config.model)
  hf_config |= tokens
  total = sum(files.DTYPES[dtype].itemsize * math.prod(shape) for dtype, shape in tensors.values())
  with staging.Staging(folder, job, total) as stage:
    places = files.create_shards(stage.folder, tensors, max_shard_bytes)

    def make(name: str) -> None:
      slot, place = slots[name], places[name]
      array = arrays[state_path(slot.path)]
      for rows, index in slot.pieces(limit):
        part = array[index].read().result()
        if place.dtype == "BF16":
          part = part.astype(files.DTYPES["BF16"])
        piece = slot.to_hf(part)
        if place.dtype == "F8_E4M3":
          piece, scale = quantise(piece.astype(np.float32, copy=False), ue8m0, name)
          target = places[name + files.SCALE]
          scale = scale.astype(files.DTYPES[target.dtype])
          files.write_rows(target, rows.start // FP8_BLOCK[0], scale)
        files.write_rows(place, rows.start, piece.astype(files.DTYPES[place.dtype], copy=False))

    def sync() -> None:
      for path in {place.file for place in places.values()}:
        with path.open("r+b") as file:
          os.fsync(file.fileno())

    # Array by array: a chunk of a run's own checkpoint holds every layer, and two of them may not
    # fit in memory.
    order = sorted(slots, key=lambda name: (slots[name].path, slots[name].at))
    sizes = {name: places[name].num_bytes for name in order}
    staging.run(stage, sizes, make, sync, "export", lambda name: slots[name].path)
    text.copy(text_folder, stage.folder)
    for name, content in text_files.items():
      (stage.folder / name).write_text(content)
    hf_config["torch_dtype"] = "float32" if format == "float32" else "bfloat16"
    if format == "fp8":
      hf_config["quantization_config"] = fp8_settings(ue8m0)
    (stage.folder / "config.json").write_text(json.dumps(hf_config, indent=2))
    stage.finish()
  return step
