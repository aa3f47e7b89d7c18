"""What the peers' programs share; needs torch and transformers, nothing of dsmoe."""

import ctypes
import resource
import sys

import torch
import transformers


def keep_freed_memory() -> None:
  """Has glibc keep what is freed: a fifth to a third less time a step, a tenth when compiled.

  Activations are larger than malloc's threshold for mmap, so every step would otherwise fault
  in all of its memory again. Costs about a fifth more peak memory, less when compiled.
  """
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    print("warning: no mallopt here; steps may be slower", file=sys.stderr)
    return
  m_trim_threshold, m_mmap_threshold = -1, -3
  mallopt(m_mmap_threshold, 2**30)
  mallopt(m_trim_threshold, 2**31 - 1)


def make_model(config: transformers.DeepseekV3Config) -> torch.nn.Module:
  """Returns a float32 model with the fused attention and the grouped matmul of the experts."""
  kwargs = {"attn_implementation": "sdpa", "dtype": torch.float32}
  try:
    return transformers.AutoModelForCausalLM.from_config(
      config, experts_implementation="grouped_mm", **kwargs
    )
  except (ImportError, TypeError, ValueError) as error:
    print(f"WARNING: experts_implementation='grouped_mm' refused: {error}", file=sys.stderr)
    return transformers.AutoModelForCausalLM.from_config(config, **kwargs)


def peak_rss_mib() -> float:
  """Returns the most memory this process ever held."""
  scale = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
