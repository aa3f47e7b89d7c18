"""One optimizer step, one jitted function: microbatches, gradient, update, balance.

Losses, gradients and their norms are computed inside `shard_map`, from one device's view; the
optimizer's elementwise update runs outside it on the sharded arrays.

Shapes: B batch, S sequence, D hidden, L MoE layers, E routed experts.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from dsmoe import model as model_lib
from dsmoe import platforms
from dsmoe.config import EXCHANGE_FIELDS, Config, ModelConfig
from dsmoe.model import mtp, parameters
from dsmoe.parallel import collectives, context
from dsmoe.parallel import mesh as mesh_lib
from dsmoe.parallel.stats import DispatchStats
from dsmoe.training import balance, hyperparameters, losses, optim
from dsmoe.training.hyperparameters import Hyperparameters, Initialisation
from pallas_kernels import varying


class TrainState(NamedTuple):
  """Everything a step reads and writes; what a checkpoint holds besides the data position."""

  step: Any  # int32 scalar, optimizer steps done
  params: Any  # float32 masters
  opt_state: Any
  router_bias: Any  # float32, one leaf [L, E] a stack of MoE layers


class Losses(NamedTuple):
  """Float32 scalars, means over targets (balance: over sequences); `total` is minimised."""

  total: jax.Array
  cross_entropy: jax.Array
  z_loss: jax.Array
  mtp_loss: jax.Array
  balance_loss: jax.Array


class LoadStats(NamedTuple):
  """Of every MoE layer, over the whole batch, the MTP ones last."""

  counts_LE: jax.Array  # int32
  groups_per_token_L: jax.Array  # float32
  dispatch: DispatchStats  # int32 [L] each: what the exchanges of rows counted


def _initial_state(config: Config, initial: Initialisation) -> TrainState:
  """Returns a new state.

  Args:
    config: with an initializer_range of 1.
    initial: its arguments.
  """
  _, params, router_bias = model_lib.split(model_lib.build(config.model, initial.seed))
  # What is drawn are the matrices; norms' scales and biases begin as ones and zeros.
  params = jax.tree.map_with_path(
    lambda path, x: initial.initializer_range * x if parameters.is_matrix(path) else x, params
  )
  return _state_with(config, params, router_bias)


def _state_with(config: Config, params, router_bias) -> TrainState:
  """Returns the state before the first step."""
  opt_state = _optimizer(config).init(params)
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, router_bias)


def _optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer for what does not depend on its numbers: how its state is laid out."""
  return optim.make(config.optim, hyperparameters.of(config))


def state_shapes(config: Config) -> TrainState:
  """Returns the state as ShapeDtypeStructs, without shardings."""
  _, params, router_bias = model_lib.shapes_of(config.model)
  return jax.eval_shape(functools.partial(_state_with, config), params, router_bias)


def state_shardings(config: Config, mesh) -> TrainState:
  """Returns the NamedSharding of every leaf of the state.

  Raises:
    ValueError: when a parameter does not divide over the mesh.
  """
  shapes = state_shapes(config)
  specs = parameters.specs(shapes.params, mesh)
  # Optimizer moments are trees like the parameters; its counters are replicated.
  opt_specs = optax.tree_map_params(
    _optimizer(config),
    lambda _, spec: spec,
    shapes.opt_state,
    specs,
    transform_non_params=lambda _: jax.sharding.PartitionSpec(),
  )
  replicated = jax.sharding.PartitionSpec()
  bias_specs = jax.tree.map(lambda _: replicated, shapes.router_bias)
  return mesh_lib.named(mesh, TrainState(replicated, specs, opt_specs, bias_specs))


def init_state(config: Config, mesh) -> TrainState:
  """Creates the state on the mesh, each array already in its final sharding."""
  return make_init(config, mesh)(hyperparameters.initialisation_of(config))


def make_init(config: Config, mesh) -> Callable[[Initialisation], TrainState]:
  """Returns the jitted function that creates the state of a run whose `program_key` is the config's."""
  config = hyperparameters.program_key(config)
  replicated = mesh_lib.named(mesh, jax.sharding.PartitionSpec())
  return jax.jit(
    functools.partial(_initial_state, config),
    in_shardings=replicated,
    out_shardings=state_shardings(config, mesh),
  )


def device_bytes(state: TrainState) -> int:
  """Returns the bytes of a device's part of a state with shardings, from `abstract_state` say."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state)
  )


def check_memory(state: TrainState, mesh) -> None:
  """Raises ValueError when a device cannot even hold its part of the state.

  A step needs more: gradients, activations, weights in the compute dtype.

  Args:
    state: from `abstract_state`.
    mesh: over whose devices it is split.
  """
  part = device_bytes(state)
  room = platforms.device_memory(jax.local_devices()[0])
  if room is not None and part > room:
    raise ValueError(
      f"parameters and optimizer moments take {part / 2**30:,.1f} GiB on each of {mesh.size} "
      f"devices, which must be at most a device's memory ({room / 2**30:,.1f} GiB): take more "
      "devices along mesh.data or mesh.expert, or a smaller model"
    )


def abstract_state(config: Config, mesh) -> TrainState:
  """Returns the state as ShapeDtypeStructs with shardings, for restoring into."""
  shapes = state_shapes(config)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    state_shardings(config, mesh),
  )


def _mtp_weight(hyper: Hyperparameters, step):
  """Lambda at this step. Source: DeepSeek-V3 section 4.2, 0.3 and later 0.1."""
  late = (hyper.mtp_switch_step >= 0) & (step >= hyper.mtp_switch_step)
  return jnp.where(late, hyper.mtp_final_loss_weight, hyper.mtp_loss_weight)


def _segments(batch, config: Config):
  return None if config.data.cross_document_attention else batch["segments"]


def _target_weights(batch, config: Config):
  """Returns this device's weights of the next-token targets, then of each MTP depth's."""
  depths = range(1, config.model.num_nextn_predict_layers + 1)
  segments = _segments(batch, config)
  later = [mtp.depth_weights(batch["weights"], segments, k) for k in depths]
  return context.own_tokens([batch["weights"], *later])


def _loss(
  graphdef,
  params,
  router_bias,
  batch,
  totals,
  num_sequences,
  mtp_weight,
  config: Config,
  hyper: Hyperparameters,
  record: bool,
):
  """Returns the loss on one microbatch, what it consists of, and each token's experts.

  These are this device's share of the total loss, ((Losses, LoadStats) summed over devices, int32
  [L, B, S, K] of this device's tokens or None).

  Args:
    params: in compute dtype, sharded.
    batch: this device's rows of the microbatch, arrays [B, S].
    totals: sum of target weights over the whole batch, one float32 for each of
      `_target_weights`.
    num_sequences: of the whole batch.
    mtp_weight: lambda.
    hyper: the other weights.
    record: whether the experts are returned.
  """
  model = nnx.merge(graphdef, params, router_bias)
  balancer = balance.make(config.balance.methods, hyper)
  targets = batch["targets"]
  out = model(
    batch["tokens"], batch["positions"], _segments(batch, config), targets, balancer.loss, record
  )
  head_DV = model.gathered_head()

  def cross_entropy(hidden_BSD, depth, weights):
    with jax.named_scope("head"):
      loss, parts = losses.chunked_cross_entropy(
        hidden_BSD.reshape(-1, hidden_BSD.shape[-1]),
        head_DV,
        context.own_tokens(mtp.shift(targets, depth)).reshape(-1),
        weights.reshape(-1),
        hyper.z_loss_weight,
        config.loss.cross_entropy_chunk_tokens,
      )
      return jax.tree.map(lambda x: x / jnp.maximum(totals[depth], 1), (loss, parts))

  weights = _target_weights(batch, config)
  main, parts = cross_entropy(out.hidden_BSD, 0, weights[0])
  total = main
  zero = jnp.zeros_like(main)
  num_depths = config.model.num_nextn_predict_layers
  depths = [cross_entropy(out.mtp_hidden[k], k + 1, weights[k + 1]) for k in range(num_depths)]
  mtp_mean = sum((loss for loss, _ in depths), zero) / max(len(depths), 1)
  total += mtp_weight * mtp_mean
  balance_loss, stats = zero, None
  if out.stats is not None:
    balance_loss += jnp.sum(out.stats.balance_loss) / num_sequences
    total += balance_loss
    share = out.hidden_BSD[..., 0].size / (num_sequences * batch["tokens"].shape[1])
    stats = LoadStats(out.stats.counts_E, out.stats.groups_per_token * share, out.stats.dispatch)
  mtp_loss = sum((p.cross_entropy for _, p in depths), zero) / max(len(depths), 1)
  each = Losses(
    total, parts.cross_entropy, hyper.z_loss_weight * parts.z_loss, mtp_loss, balance_loss
  )
  with jax.named_scope("head"):
    each, stats = collectives.sum_over_batch((each, stats))
  return each.total, ((each, stats), None if out.stats is None else out.stats.expert_BSK)


def _loss_and_grads(config: Config, graphdef, record: bool = False):
  """Returns the function run inside shard_map: (params, bias, step, batch, hyper) -> sums, gradients.

  Its third result are the experts of each token, see `_loss`.
  """

  def run(params, router_bias, step, batch, hyper: Hyperparameters):
    n = config.num_microbatches
    with jax.named_scope("head"):
      totals = collectives.sum_over_batch([jnp.sum(w) for w in _target_weights(batch, config)])
    num_sequences = batch["tokens"].shape[0] * collectives.num_batch_shards()
    cast = context.vary(parameters.compute_cast(params, config.model))
    weight = _mtp_weight(hyper, step)

    def microbatch(part):
      def loss(p):
        return _loss(
          graphdef, p, router_bias, part, totals, num_sequences, weight, config, hyper, record
        )

      (_, (aux, experts)), grads = jax.value_and_grad(loss, has_aux=True)(cast)
      with jax.named_scope("gradients"):
        return aux, jax.tree.map(lambda g: g.astype(jnp.float32), grads), experts

    @jax.named_scope("gradients")
    def whole(aux, grads, experts):
      return aux, context.sum_gradients(grads, params), experts

    if n == 1:
      return whole(*microbatch(batch))
    parts = jax.tree.map(lambda x: x.reshape(n, x.shape[0] // n, *x.shape[1:]), batch)

    def accumulate(total, part):
      *sums, experts = microbatch(part)
      with jax.named_scope("gradients"):
        return jax.tree.map(jnp.add, total, tuple(sums)), experts

    zeros = _no_microbatch(config.model, cast)
    (aux, grads), experts = jax.lax.scan(accumulate, zeros, parts)
    return whole(aux, grads, jax.tree.map(_join_microbatches, experts))

  return run


def _join_microbatches(a):
  """Joins microbatches, [n, L, B, ...] -> [L, n B, ...]."""
  a = jnp.moveaxis(a, 0, 1)
  return a.reshape(a.shape[0], a.shape[1] * a.shape[2], *a.shape[3:])


def _on_mesh(config: Config, mesh, record: bool) -> Callable:
  """Returns `_loss_and_grads` as a function of global arrays."""
  graphdef, params, router_bias = model_lib.shapes_of(config.model)
  specs, bias_specs = parameters.specs(params, mesh), parameters.specs(router_bias, mesh)
  replicated = jax.sharding.PartitionSpec()
  return mesh_lib.shard_map(
    _loss_and_grads(config, graphdef, record),
    mesh,
    in_specs=(specs, bias_specs, replicated, mesh_lib.batch_spec(), replicated),
    out_specs=(
      (replicated, replicated),
      specs,
      jax.sharding.PartitionSpec(None, *mesh_lib.batch_spec(), context.AXIS),
    ),
  )


def _dropless(config: Config) -> Config:
  """Returns the config with which no row is dropped: by a fallback, else by buffers for all rows."""
  exchange, fields = config.model.exchange, EXCHANGE_FIELDS[config.model.dispatch]
  if "dropless_fallback" in fields:
    exchange = dataclasses.replace(exchange, dropless_fallback="layer")
  elif "receive_capacity" in fields:
    exchange = dataclasses.replace(exchange, receive_capacity=float(config.mesh.expert))
  return dataclasses.replace(config, model=dataclasses.replace(config.model, exchange=exchange))


def _again_if_dropped(first: Callable, second: Callable, num_microbatches: int) -> Callable:
  """Returns a function with the results of `first`, or of `second` where `first` dropped a row.

  The fallbacks counted are then those of this: every layer, once for each microbatch.
  """

  def again(*args):
    (each, load), *rest = second(*args)
    counted = jnp.full_like(load.dispatch.fallbacks, num_microbatches)
    dispatched = load.dispatch._replace(fallbacks=counted)
    return (each, load._replace(dispatch=dispatched)), *rest

  def run(*args):
    (_, load), *_ = result = first(*args)
    if load is None:  # no layer has experts
      return result
    dropped = jnp.any(load.dispatch.dropped_rows > 0)
    return jax.lax.cond(dropped, lambda: again(*args), lambda: result)

  return run


def _no_microbatch(config: ModelConfig, params):
  """Returns zeros of what a microbatch yields: ((Losses, LoadStats or None), gradients)."""
  depths = config.num_nextn_predict_layers
  zero, L = jnp.zeros(()), config.num_moe_layers + (depths if config.num_moe_layers else 0)
  none_L = jnp.zeros(L, jnp.int32)
  counts_LE = jnp.zeros((L, config.n_routed_experts), jnp.int32)
  load = LoadStats(counts_LE, jnp.zeros(L), DispatchStats(none_L, none_L, none_L)) if L else None
  grads = jax.tree.map(lambda p: varying.zeros_like_operands(p.shape, jnp.float32, p), params)
  return (Losses(zero, zero, zero, zero, zero), load), grads


class Gate(NamedTuple):
  """What a step must meet to change the state; the host knows it before it dispatches the step."""

  step: Any  # int32 scalar, optimizer steps done before: else the step before made no update
  max_loss: Any = np.float32(np.inf)  # float32 scalars, the largest that are no spikes
  max_grad_norm: Any = np.float32(np.inf)


def make_train_step(config: Config, mesh, record_routing: bool = False, is_gated: bool = False):
  """Returns the jitted step: (state, batch, hyper) -> (state, metrics).

  The state is donated. `batch` holds global arrays [B, S] as `data.py` yields them. `hyper` are the
  Hyperparameters of any run whose `program_key` is the config's.
  Metrics: `losses` (Losses), `load` (LoadStats or None), `grad_norm`, `grad_norms`,
  `learning_rate`, `router_bias` after the step, `finite` (bool: losses and gradients), `is_made`
  (bool: whether the state moved; when false the state returned is the old one), and with
  `record_routing` `expert_LBSK`: int32, the experts that each token chose in each MoE layer, split
  over the mesh like the batch.

  With `is_gated` the step takes a Gate as fourth argument, and returns the old state too where that
  is not met. A step may so be dispatched before it is known whether the one before it was finite:
  if that one was not, no later one moves the state. With recovery.bad_step "skip" the old state
  counts the step all the same, and later ones move it.

  Raises:
    ValueError: when the batch does not divide over the mesh and microbatches.
  """
  check_batch(config, mesh)
  config = hyperparameters.program_key(config)
  loss_and_grads = _on_mesh(config, mesh, record_routing)
  if config.model.exchange.dropless_fallback == "step":
    exact = _on_mesh(_dropless(config), mesh, record_routing)
    loss_and_grads = _again_if_dropped(loss_and_grads, exact, config.num_microbatches)
  shardings = state_shardings(config, mesh)
  specs = parameters.specs(state_shapes(config).params, mesh)
  norms = mesh_lib.shard_map(optim.norms, mesh, (specs,), jax.sharding.PartitionSpec())

  def train_step(state: TrainState, batch, hyper: Hyperparameters, gate: Gate | None = None):
    optimizer = optim.make(config.optim, hyper)
    learning_rate = optim.schedule(config.optim.schedule, hyper)
    (each, load), grads, experts = loss_and_grads(
      state.params, state.router_bias, state.step, batch, hyper
    )
    with jax.named_scope("optimizer"):
      grad_norm, grad_norms = norms(grads)
      updates, opt_state = optimizer.update(grads, state.opt_state, state.params, norm=grad_norm)
      params = optax.apply_updates(state.params, updates)
    router_bias = state.router_bias
    if jax.tree.leaves(router_bias):
      with jax.named_scope("balance"):
        balancer = balance.make(config.balance.methods, hyper)
        router_bias = update_bias(router_bias, load.counts_LE, balancer, state.step)
    with jax.named_scope("optimizer"):
      finite = jnp.isfinite(each.total) & jnp.isfinite(grad_norm)
      is_made = finite
      if gate is not None:
        is_made &= (each.total <= gate.max_loss) & (grad_norm <= gate.max_grad_norm)
        is_made &= state.step == gate.step
      new = TrainState(state.step + 1, params, opt_state, router_bias)
      new = jax.tree.map(lambda a, b: jnp.where(is_made, a, b), new, state)
    if is_gated and config.recovery.bad_step == "skip":
      new = new._replace(step=state.step + 1)
    metrics = {
      "losses": each,
      "load": load,
      "grad_norm": grad_norm,
      "grad_norms": grad_norms,
      "learning_rate": learning_rate(optim.updates_made(state.opt_state)),
      "router_bias": new.router_bias,
      "finite": finite,
      "is_made": is_made,
    }
    if record_routing:
      take = functools.partial(context.in_row_order, devices=mesh.shape[context.AXIS], axis=2)
      metrics["expert_LBSK"] = jax.tree.map(take, experts)
    return new, metrics

  replicated = mesh_lib.named(mesh, jax.sharding.PartitionSpec())
  of_rows = mesh_lib.named(mesh, mesh_lib.batch_spec())
  return jax.jit(
    train_step,
    donate_argnums=0,
    in_shardings=(shardings, of_rows, replicated, *[replicated] * is_gated),
    out_shardings=(shardings, None),
    compiler_options=platforms.compiler_options(mesh_lib.platform_of(mesh)),
  )


def update_bias(router_bias, counts_LE, balancer: balance.Balancer, step):
  """Applies the balancer to each stack's bias.

  Args:
    router_bias: float32, a leaf [layers, E] for each stack that has one.
    counts_LE: int32, of every MoE layer, the stacks in the order of `parameters.STACKS`.
    balancer: whose update is applied.
    step: int32 scalar, optimizer steps done.
  """
  first, moved = 0, {}
  for name, bias_LE in parameters.by_stack(router_bias):
    moved[name] = balancer.update(bias_LE, counts_LE[first : first + bias_LE.shape[0]], step)
    first += bias_LE.shape[0]
  return jax.tree.map_with_path(lambda path, _: moved[path[0].key], router_bias)


def make_eval_step(config: Config, mesh):
  """Returns the jitted function (state, batch) -> (nats, weight): sums over the batch.

  No exchange drops rows here.
  """
  check_batch(config, mesh)
  config = hyperparameters.program_key(config)
  graphdef, params, router_bias = model_lib.shapes_of(_dropless(config).model)

  def evaluate(params, router_bias, batch):
    model = nnx.merge(graphdef, parameters.compute_cast(params, config.model), router_bias)
    hidden_BSD = model(batch["tokens"], batch["positions"], _segments(batch, config)).hidden_BSD
    targets_BS, weights_BS = context.own_tokens((batch["targets"], batch["weights"]))
    _, parts = losses.chunked_cross_entropy(
      hidden_BSD.reshape(-1, hidden_BSD.shape[-1]),
      model.gathered_head(),
      targets_BS.reshape(-1),
      weights_BS.reshape(-1),
      0.0,
      config.loss.cross_entropy_chunk_tokens,
    )
    return collectives.sum_over_batch((parts.cross_entropy, jnp.sum(weights_BS)))

  replicated = jax.sharding.PartitionSpec()
  run = mesh_lib.shard_map(
    evaluate,
    mesh,
    in_specs=(
      parameters.specs(params, mesh),
      parameters.specs(router_bias, mesh),
      mesh_lib.batch_spec(),
    ),
    out_specs=replicated,
  )
  return jax.jit(
    lambda state, batch: run(state.params, state.router_bias, batch),
    compiler_options=platforms.compiler_options(mesh_lib.platform_of(mesh)),
  )


def make_mesh(config: Config, devices: list[Any] | None = None) -> jax.sharding.Mesh:
  """Builds the mesh of a run over `devices` (default: all there are).

  Raises:
    ValueError: where the mesh fits the devices, the model or the batch not; it names the nearest
      that does.
  """
  return mesh_lib.make_mesh(config.mesh, devices, functools.partial(check_fit, config))


def check_fit(config: Config, sizes: Mapping[str, int]) -> None:
  """Raises ValueError unless model and batch can be split over a mesh of these axis sizes."""
  axes: dict[str, Any] = dict(sizes)
  config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **axes))
  mesh = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
  check_batch(config, mesh)
  parameters.check_fit(model_lib.whole_shapes(config.model), mesh)


def check_no_padding(batch: Mapping[str, Any]) -> None:
  """Raises ValueError where a training batch has padding, whose segment is 0.

  The router chooses experts for every token of a batch. Padding would be counted in the load that
  moves the bias, and take room in the exchanges' buffers. Training rows have none: `data.batches`
  cuts them from an endless stream. Only the last batch of a validation set is padded, and there
  nothing is counted and no exchange drops a row.

  Args:
    batch: this process's rows, NumPy arrays [B, S].
  """
  if num_padding := int(np.sum(batch["segments"] == 0)):
    raise ValueError(
      f"a training batch must have no padding (segment 0), got {num_padding} such tokens"
    )


def check_batch(config: Config, mesh) -> None:
  """Raises ValueError unless every device gets equally many sequences a microbatch."""
  shards = mesh_lib.num_batch_shards(mesh) * config.num_microbatches
  if config.batch_size % shards:
    raise ValueError(
      f"batch_size ({config.batch_size}) must be divisible by devices along the batch "
      f"({mesh_lib.num_batch_shards(mesh)}) times num_microbatches ({config.num_microbatches})"
    )
