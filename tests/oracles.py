"""The model again, in plain NumPy and float64, one token, head and expert at a time.

Nothing here shares code with dsmoe. `p` holds a module's parameters by name, `c` is a ModelConfig.
"""

import math

import numpy as np


def sigmoid(x):
  return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def softmax(x):
  """Returns the softmax of one vector."""
  e = np.exp(np.asarray(x, np.float64) - np.max(x))
  return e / e.sum()


def rms_norm(x, scale, eps):
  """Returns one vector divided by its root mean square, times `scale`."""
  x = np.asarray(x, np.float64)
  return x / math.sqrt((x * x).sum() / len(x) + eps) * scale


def swiglu(x, w_gate, w_up, w_down):
  """Returns the SwiGLU feed-forward layer's output for one vector."""
  gate, up = x @ np.asarray(w_gate, np.float64), x @ np.asarray(w_up, np.float64)
  return (gate * sigmoid(gate) * up) @ np.asarray(w_down, np.float64)


def swiglu_gradients(x, weight, w_gate, w_up, w_down, dy):
  """Returns the gradients of weight * swiglu(x) for one row, given that of the result, `dy`.

  In the order x, weight, w_gate, w_up, w_down.
  """
  gate, up = x @ w_gate, x @ w_up
  s = sigmoid(gate)
  act = gate * s * up
  dact = w_down @ dy
  dgate = weight * dact * up * (s + gate * s * (1 - s))
  dup = weight * dact * gate * s
  return (
    w_gate @ dgate + w_up @ dup,
    act @ dact,
    np.outer(x, dgate),
    np.outer(x, dup),
    weight * np.outer(act, dy),
  )


def turn_adjacent_pairs(x, angles):
  """Rotates the pairs of elements (0, 1), (2, 3), ... of one vector, as complex numbers."""
  z = (np.asarray(x[0::2]) + 1j * np.asarray(x[1::2])) * np.exp(1j * np.asarray(angles))
  return np.stack([z.real, z.imag], -1).reshape(-1)


def turn_halves(x, angles):
  """Rotates the pairs of elements (0, R/2), (1, R/2 + 1), ... of one vector."""
  half = len(x) // 2
  z = (np.asarray(x[:half]) + 1j * np.asarray(x[half:])) * np.exp(1j * np.asarray(angles))
  return np.concatenate([z.real, z.imag])


def attention(q_SHA, k_SHA, v_SHU, segments_S, scale):
  """Returns one row's attention: a query sees itself and the earlier tokens of its segment."""
  S, H, _ = q_SHA.shape
  out = np.zeros(v_SHU.shape)
  for h in range(H):
    for s in range(S):
      seen = [t for t in range(s + 1) if segments_S is None or segments_S[t] == segments_S[s]]
      probs = softmax([scale * (q_SHA[s, h] @ k_SHA[t, h]) for t in seen])
      out[s, h] = sum(prob * v_SHU[t, h] for prob, t in zip(probs, seen))
  return out


def mla(p, x_SD, positions_S, segments_S, c):
  """Returns the output of multi-head latent attention for one row, without YaRN."""
  N, R, C, H = c.qk_nope_head_dim, c.qk_rope_head_dim, c.kv_lora_rank, c.num_attention_heads
  turn = turn_adjacent_pairs if c.rope_interleave else turn_halves
  p = {name: np.asarray(w, np.float64) for name, w in p.items()}
  q, k, v = [], [], []
  for x, position in zip(x_SD, positions_S):
    angles = [position * c.rope_theta ** (-2 * i / R) for i in range(R // 2)]
    kv = x @ p["kv_a_proj"] + p.get("kv_a_bias", 0)
    latent, k_rope = rms_norm(kv[:C], p["kv_a_norm"], 1e-6), turn(kv[C:], angles)
    if c.q_lora_rank is not None:
      x = rms_norm(x @ p["q_a_proj"] + p.get("q_a_bias", 0), p["q_a_norm"], 1e-6)
    q_proj = p["q_proj"] if c.q_lora_rank is None else p["q_b_proj"]
    q_heads = [x @ q_proj[:, h] for h in range(H)]
    kv_heads = [latent @ p["kv_b_proj"][:, h] for h in range(H)]
    q.append([np.concatenate([head[:N], turn(head[N:], angles)]) for head in q_heads])
    k.append([np.concatenate([head[:N], k_rope]) for head in kv_heads])
    v.append([head[N:] for head in kv_heads])
  out = attention(np.array(q), np.array(k), np.array(v), segments_S, 1 / math.sqrt(N + R))
  y = [sum(head @ p["o_proj"][h] for h, head in enumerate(heads)) for heads in out]
  return np.array(y) + p.get("o_bias", 0)


def scores_of(logits_E, scoring_func):
  """Returns one token's score for every expert."""
  if scoring_func == "sqrtsoftplus":
    return np.sqrt(np.log1p(np.exp(np.asarray(logits_E, np.float64))))
  return sigmoid(logits_E) if scoring_func == "sigmoid" else softmax(logits_E)


def gates_of(scores_E, experts, c):
  """Returns the weights of the chosen experts' outputs."""
  gates = np.array([scores_E[e] for e in experts])
  if c.norm_topk_prob:
    gates = gates / gates.sum()
  return gates * c.routed_scaling_factor


def best(values, how_many):
  """Returns indices of the largest values in descending order; of equal ones the lower first."""
  return sorted(range(len(values)), key=lambda i: (-values[i], i))[:how_many]


def choose(scores_E, bias_E, c):
  """Returns the experts that one token chooses, the best first."""
  E, G = len(scores_E), c.n_group
  biased = [float(s) for s in scores_E]
  if c.topk_method == "noaux_tc":
    biased = [s + float(b) for s, b in zip(biased, bias_E)]
  groups = [list(range(g * (E // G), (g + 1) * (E // G))) for g in range(G)]
  if c.topk_method == "noaux_tc":
    ranks = [sum(sorted((biased[e] for e in group), reverse=True)[:2]) for group in groups]
  else:
    ranks = [max(biased[e] for e in group) for group in groups]
  allowed = sorted(e for g in best(ranks, c.topk_group) for e in groups[g])
  return [allowed[i] for i in best([biased[e] for e in allowed], c.num_experts_per_tok)]


def moe(p, bias_E, x_MD, c):
  """Returns the layer's output [M, D], shared experts included, and the chosen experts [M, K]."""
  y, chosen = [], []
  for x in x_MD:
    scores = scores_of(x @ np.asarray(p["router"], np.float64), c.scoring_func)
    experts = choose(scores, bias_E, c)
    gates = gates_of(scores, experts, c)
    weights = [[p["experts"][name][e] for name in ("w_gate", "w_up", "w_down")] for e in experts]
    out = sum(gate * swiglu(x, *w) for gate, w in zip(gates, weights))
    if c.n_shared_experts:
      out = out + swiglu(x, *(p["shared"][name] for name in ("w_gate", "w_up", "w_down")))
    y.append(out)
    chosen.append(experts)
  return np.array(y), np.array(chosen)


def at(tree, index):
  """Returns the parameters of one layer of a stack."""
  return {k: at(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}


def block(p, bias_E, x_SD, positions_S, segments_S, c):
  """Returns one block's output for one row; a block whose `p` has no router is dense."""
  normed = np.array([rms_norm(x, p["attention_norm"], c.rms_norm_eps) for x in x_SD])
  x_SD = x_SD + mla(p["attention"], normed, positions_S, segments_S, c)
  normed = np.array([rms_norm(x, p["mlp_norm"], c.rms_norm_eps) for x in x_SD])
  if "router" in p["mlp"]:
    return x_SD + moe(p["mlp"], bias_E, normed, c)[0]
  return x_SD + [swiglu(x, *(p["mlp"][n] for n in ("w_gate", "w_up", "w_down"))) for x in normed]


def transformer(p, bias, tokens_S, positions_S, segments_S, targets_S, c):
  """Returns one row's hidden states after the final norm, then those of each MTP depth."""
  embed, eps = np.asarray(p["embed"], np.float64), c.rms_norm_eps
  rest = (positions_S, segments_S, c)
  x = embed[tokens_S]
  for i in range(c.first_k_dense_replace):
    x = block(at(p["dense_layers"], i), None, x, *rest)
  for i in range(c.num_hidden_layers - c.first_k_dense_replace):
    layer_bias = bias["moe_layers"]["mlp"]["router_bias"][i] if bias else None
    x = block(at(p["moe_layers"], i), layer_bias, x, *rest)
  hiddens = [np.array([rms_norm(row, p["norm"], eps) for row in x])]
  for k in range(c.num_nextn_predict_layers if targets_S is not None else 0):
    module = at(p["mtp"], k)
    layer_bias = bias["mtp"]["block"]["mlp"]["router_bias"][k] if bias else None
    joined = []
    for s in range(len(tokens_S)):
      known = embed[targets_S[min(s + k, len(targets_S) - 1)]]
      halves = (
        rms_norm(known, module["embed_norm"], eps),
        rms_norm(hiddens[-1][s], module["hidden_norm"], eps),
      )
      joined.append(np.concatenate(halves) @ module["eh_proj"])
    x = block(module["block"], layer_bias, np.array(joined), *rest)
    hiddens.append(np.array([rms_norm(row, module["norm"], eps) for row in x]))
  return hiddens
