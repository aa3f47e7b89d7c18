"""A small compiled program, and traces made of given events."""

import jax

HLO = """HloModule jit_train_step, is_scheduled=true

%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %mul.1 = f32[8]{0} multiply(%p, %p), metadata={op_name="jit(train_step)/jvp(layers)/attention/mul"}
  ROOT %copy.4 = f32[8]{0} copy(%mul.1)
}

%cond (p.1: f32[8]) -> pred[] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

%fused (p.2: f32[8]) -> f32[16] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %all-gather.2 = f32[16]{0} all-gather(%p.2), replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (a: f32[8]) -> f32[16] {
  %a = f32[8]{0} parameter(0)
  %while.1 = f32[8]{0} while(%a), condition=%cond, body=%body, metadata={op_name="jit(train_step)/jvp(layers)/while"}
  %dot.1 = f32[8]{0} multiply(%while.1, %a), metadata={op_name="jit(train_step)/transpose(jvp(layers))/checkpoint/rematted_computation/moe/experts/dot_general"}
  %dot.2 = f32[8]{0} multiply(%dot.1, %a), metadata={op_name="jit(train_step)/transpose(jvp(moe))/experts/combine/add"}
  %ag-start = (f32[8]{0}, f32[16]{0}) all-gather-start(%dot.2), replica_groups={{0,1}}, dimensions={0}, metadata={op_name="jit(train_step)/jvp(weights)/all_gather"}
  %ag-done = f32[16]{0} all-gather-done(%ag-start), metadata={op_name="jit(train_step)/jvp(weights)/all_gather"}
  %async-start = ((f32[8]{0}), f32[16]{0}) async-start(%dot.2), calls=%fused
  %async-done = f32[16]{0} async-done(%async-start)
  %copy-start = (f32[8]{0}, f32[8]{0}, u32[]) copy-start(%dot.2)
  %copy-done = f32[8]{0} copy-done(%copy-start)
  %sum = f32[8]{0} all-reduce(%copy-done), replica_groups={{0,1}}, to_apply=%body, metadata={op_name="jit(train_step)/moe/psum"}
  %odd = f32[16]{0} add(%ag-done, %async-done), metadata={op_name="jit(train_step)/jvp()/add"}
  ROOT %add = f32[16]{0} add(%ag-done, %async-done), metadata={op_name="jit(train_step)/optimizer/add"}
}
"""
# By instruction: part, direction.
EXPECTED = {
  "mul.1": ("attention", "forward"),
  "copy.4": ("attention", "forward"),  # without a user: of what it copies
  "while.1": ("layers, rest", "forward"),
  "dot.1": ("experts", "recomputed"),
  "dot.2": ("combine", "backward"),
  "ag-start": ("weights", "forward"),
  "ag-done": ("weights", "forward"),
  # Without a name: of their first users.
  "async-start": ("optimizer", "other"),
  "async-done": ("optimizer", "other"),
  "copy-start": ("moe, rest", "other"),
  "copy-done": ("moe, rest", "other"),
  "sum": ("moe, rest", "other"),
  "odd": ("unnamed", "forward"),
  "add": ("optimizer", "other"),
}
COLLECTIVES = {"ag-start", "ag-done", "async-start", "async-done", "sum"}


def xspace(planes: dict[str, dict[str, list[tuple]]]) -> bytes:
  """Returns a trace: by plane and line events (name, start ns, end ns, stats)."""
  text = []
  for plane, lines in planes.items():
    names: dict[str, int] = {}
    stat_names: dict[str, int] = {}
    body = []
    for line, events in lines.items():
      body.append(f'lines {{ name: "{line}" timestamp_ns: 0')
      for name, start, end, stats in events:
        number = names.setdefault(name, len(names) + 1)
        body.append(f"events {{ metadata_id: {number} offset_ps: {start * 1000}")
        body.append(f"duration_ps: {(end - start) * 1000}")
        for stat, value in stats.items():
          kind = f'str_value: "{value}"' if isinstance(value, str) else f"int64_value: {value}"
          key = stat_names.setdefault(stat, len(stat_names) + 1)
          body.append(f"stats {{ metadata_id: {key} {kind} }}")
        body.append("}")
      body.append("}")
    for kind, known in (("event", names), ("stat", stat_names)):
      for name, number in known.items():
        body.append(f'{kind}_metadata {{ key: {number} value {{ id: {number} name: "{name}" }} }}')
    text.append(f'planes {{ name: "{plane}" {" ".join(body)} }}')
  return jax.profiler.ProfileData.text_proto_to_serialized_xspace(" ".join(text))
