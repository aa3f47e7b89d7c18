"""Reads the resources of H100 kernels that the compiler prints: registers, spills, shared memory.

Mosaic GPU prints them when it compiles with MOSAIC_GPU_DUMP_PTXAS=1 (registers, spills) and
MOSAIC_GPU_DUMP_HOST_LLVM=1 (the launch: its blocks, threads and dynamic shared memory).
"""

import math
import re

SM_REGISTERS = 65536
SM_SHARED_BYTES = 233472
SM_THREADS = 2048
SM_BLOCKS = 32
RESERVED_SHARED_BYTES = 1024  # reserved by CUDA in each block

_PTXAS = re.compile(
  r"Compiling entry function '(?P<kernel>\w+?)(?:_mosaic_gpu_kernel)?' for '(?P<arch>\w+)'.*?"
  r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
  r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<more>[^\n]*)",
  re.DOTALL,
)
_LAUNCH = re.compile(r"call void @mosaic_gpu_launch_kernel\(([^)]*)\)")
_DEFINE = re.compile(r"^define void @(\w+)_mosaic_gpu\(", re.MULTILINE)


def h100_resources(text: str) -> dict[str, dict[str, int]]:
  """Reads the two dumps.

  Args:
    text: the compiler's output, which may hold other lines.

  Returns:
    For each kernel by name ("NAME 2" for the second of that name): registers, stack_bytes,
    spill_store_bytes and spill_load_bytes per thread; serialized_wgmma, 1 if ptxas could not
    overlap matrix products; and if the launch was printed, blocks, threads and shared_bytes of a
    block, and blocks_per_sm, how many blocks run on a multiprocessor at the same time.
  """
  launches: dict[str, list] = {}
  for define in _DEFINE.finditer(text):
    launch = _LAUNCH.search(text, define.end())
    launches.setdefault(define[1], []).append(launch)
  found: dict[str, dict[str, int]] = {}
  seen: dict[str, int] = {}
  for match in _PTXAS.finditer(text):
    kernel = match["kernel"]
    nth = seen[kernel] = seen.get(kernel, 0) + 1
    static = re.search(r"(\d+) bytes smem", match["more"])
    shared = int(static[1]) if static else 0
    serialized = re.search(rf"wgmma.*serialized.*'{kernel}(?:_mosaic_gpu_kernel)?'", text)
    resources = {
      "registers": int(match["registers"]),
      "stack_bytes": int(match["stack"]),
      "spill_store_bytes": int(match["stores"]),
      "spill_load_bytes": int(match["loads"]),
      "serialized_wgmma": int(serialized is not None),
    }
    if len(launches.get(kernel, [])) >= nth and launches[kernel][nth - 1] is not None:
      numbers = [int(n) for n in re.findall(r"i32 (\d+)", launches[kernel][nth - 1][1])]
      blocks, threads = math.prod(numbers[:3]), math.prod(numbers[6:9])
      shared += numbers[9]
      resources |= {
        "blocks": blocks,
        "threads": threads,
        "shared_bytes": shared,
        "blocks_per_sm": _blocks_per_sm(resources["registers"], threads, shared),
      }
    found[kernel if nth == 1 else f"{kernel} {nth}"] = resources
  return found


def _blocks_per_sm(registers: int, threads: int, shared: int) -> int:
  a_warp = -(-registers * 32 // 256) * 256  # registers are allocated in units of 256
  return min(
    SM_BLOCKS,
    SM_THREADS // threads,
    SM_REGISTERS // (a_warp * (threads // 32)),
    SM_SHARED_BYTES // (shared + RESERVED_SHARED_BYTES),
  )
