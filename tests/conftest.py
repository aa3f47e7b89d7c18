"""Eight fake CPU devices for every test, tolerances in one table, small configs."""

import gc
import importlib.metadata
import os
import pathlib
import signal

# A shell starts what runs in the background with Ctrl-C ignored, and so would be the processes that
# tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
  signal.signal(signal.SIGINT, signal.default_int_handler)

# By its full path, which holds in tests and processes that work in another folder too.
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).parents[1] / ".jax_cache")
)

# For processes that tests start; what chips an extra could drive does not matter.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# The tests compile far more than they compute: spend less on machine code, and make it in one piece
# (in 32, for so many threads, it takes a fifth more of a core). A flag the compiler does not know
# stops the process; later ones do not know the last.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
  + (
    " --xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else ""
  ),
)

import hypothesis
import jax

# How long an example takes says how busy the machine is; the same examples every time, so that a
# change is refused for what it changed. A search for more is `--hypothesis-profile=default`.
hypothesis.settings.register_profile(
  "tests",
  deadline=None,
  derandomize=True,
  suppress_health_check=[
    hypothesis.HealthCheck.too_slow,
    hypothesis.HealthCheck.function_scoped_fixture,
  ],
)
hypothesis.settings.load_profile("tests")

# Traced programs are millions of objects that live on, which Python's collector went through again and
# again: 6% of the time of tests.
gc.set_threshold(20_000, 20, 50)

jax.config.update("jax_platforms", os.environ.get("DSMOE_TEST_PLATFORM", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
