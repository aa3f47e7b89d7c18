"""Writes a DeepSeek-V3 in Hugging Face's files as a GGUF file that llama.cpp reads, in float32.

  python scripts/peers/gguf_write.py --folder=/tmp/model --out=/tmp/model.gguf

Runs on its own in a virtual environment with gguf, numpy and safetensors, nothing of dsmoe. The
folder holds config.json and model.safetensors. The file has no tokenizer: prompts are token ids.

Names and layouts are those that llama.cpp's architecture "deepseek2" reads. It attends in latent
space, so kv_b_proj is stored as two tensors, that of keys transposed; each layer's experts are one
tensor; and it rotates neighbouring dimensions, as the published weights are laid out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import load_file

# Hugging Face's names of a layer's tensors, and the GGUF's.
LAYER = {
  "input_layernorm.weight": "attn_norm.weight",
  "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
  "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
  "self_attn.o_proj.weight": "attn_output.weight",
  "post_attention_layernorm.weight": "ffn_norm.weight",
}
QUERY = {"self_attn.q_proj.weight": "attn_q.weight"}
LATENT_QUERY = {
  "self_attn.q_a_proj.weight": "attn_q_a.weight",
  "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
  "self_attn.q_b_proj.weight": "attn_q_b.weight",
}
DENSE = {
  "mlp.gate_proj.weight": "ffn_gate.weight",
  "mlp.up_proj.weight": "ffn_up.weight",
  "mlp.down_proj.weight": "ffn_down.weight",
}
MOE = {
  "mlp.gate.weight": "ffn_gate_inp.weight",
  "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
  "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
  "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
  "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
EXPERTS = {
  "gate_proj": "ffn_gate_exps.weight",
  "up_proj": "ffn_up_exps.weight",
  "down_proj": "ffn_down_exps.weight",
}
OUTSIDE = {
  "model.embed_tokens.weight": "token_embd.weight",
  "model.norm.weight": "output_norm.weight",
  "lm_head.weight": "output.weight",
}


def add_metadata(writer: gguf.GGUFWriter, c: dict[str, Any]) -> None:
  """Adds the model's sizes and options, given a config.json's fields.

  Raises:
    ValueError: for a model that this file does not describe.
  """
  rope = c.get("rope_parameters") or {"rope_theta": c["rope_theta"], "rope_type": "default"}
  for name, value, only in (
    ("rope_type", rope["rope_type"], "default"),
    ("rope_interleave", c.get("rope_interleave", True), True),
    ("attention_bias", c.get("attention_bias", False), False),
    ("scoring_func", c.get("scoring_func", "sigmoid"), "sigmoid"),
  ):
    if value != only:
      raise ValueError(f"a GGUF file is written with {name} {only!r} only, got {value!r}")
  writer.add_block_count(c["num_hidden_layers"])
  writer.add_context_length(c["max_position_embeddings"])
  writer.add_embedding_length(c["hidden_size"])
  writer.add_feed_forward_length(c["intermediate_size"])
  writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
  writer.add_vocab_size(c["vocab_size"])
  writer.add_tokenizer_model("none")
  writer.add_file_type(gguf.LlamaFileType.ALL_F32)

  # In latent space all heads read one key of kv_lora_rank + qk_rope_head_dim numbers.
  writer.add_head_count(c["num_attention_heads"])
  writer.add_head_count_kv(1)
  writer.add_q_lora_rank(c["q_lora_rank"] or 0)
  writer.add_kv_lora_rank(c["kv_lora_rank"])
  writer.add_key_length(c["kv_lora_rank"] + c["qk_rope_head_dim"])
  writer.add_value_length(c["kv_lora_rank"])
  writer.add_key_length_mla(c["qk_nope_head_dim"] + c["qk_rope_head_dim"])
  writer.add_value_length_mla(c["v_head_dim"])
  writer.add_rope_dimension_count(c["qk_rope_head_dim"])
  writer.add_rope_freq_base(rope["rope_theta"])

  writer.add_leading_dense_block_count(c["first_k_dense_replace"])
  writer.add_expert_count(c["n_routed_experts"])
  writer.add_expert_used_count(c["num_experts_per_tok"])
  writer.add_expert_shared_count(c["n_shared_experts"])
  writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
  writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
  writer.add_expert_weights_norm(c["norm_topk_prob"])
  writer.add_expert_weights_scale(c["routed_scaling_factor"])
  if c["topk_group"] < c["n_group"]:  # llama.cpp refuses a limit that leaves nothing out
    writer.add_expert_group_count(c["n_group"])
    writer.add_expert_group_used_count(c["topk_group"])


def tensors(c: dict[str, Any], weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the GGUF's tensors; each is removed from `weights`, whose names are Hugging Face's."""
  result = {theirs: weights.pop(name) for name, theirs in OUTSIDE.items() if name in weights}
  for n in range(c["num_hidden_layers"]):
    ours, theirs = f"model.layers.{n}.", f"blk.{n}."
    dense = n < c["first_k_dense_replace"]
    query = LATENT_QUERY if c["q_lora_rank"] else QUERY
    for name, other in (LAYER | query | (DENSE if dense else MOE)).items():
      result[theirs + other] = weights.pop(ours + name)
    kv_b_HXC = weights.pop(ours + "self_attn.kv_b_proj.weight").reshape(
      c["num_attention_heads"], c["qk_nope_head_dim"] + c["v_head_dim"], c["kv_lora_rank"]
    )
    k_b_HNC, v_b_HUC = np.split(kv_b_HXC, [c["qk_nope_head_dim"]], axis=1)
    result[theirs + "attn_k_b.weight"] = np.ascontiguousarray(k_b_HNC.swapaxes(1, 2))
    result[theirs + "attn_v_b.weight"] = np.ascontiguousarray(v_b_HUC)
    if not dense:
      for name, other in EXPERTS.items():
        experts = (f"{ours}mlp.experts.{e}.{name}.weight" for e in range(c["n_routed_experts"]))
        result[theirs + other] = np.stack([weights.pop(expert) for expert in experts])
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--folder", required=True, type=Path, help="Hugging Face's files")
  parser.add_argument("--out", required=True, type=Path, help="file to write")
  args = parser.parse_args()
  config = json.loads((args.folder / "config.json").read_text())
  weights = load_file(args.folder / "model.safetensors")
  writer = gguf.GGUFWriter(args.out, "deepseek2")
  add_metadata(writer, config)
  for name, array in tensors(config, weights).items():
    writer.add_tensor(name, array.astype(np.float32, copy=False))
  if weights:
    raise ValueError(f"every tensor must have a place in the GGUF file, got {sorted(weights)}")
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()


if __name__ == "__main__":
  main()
