#!/usr/bin/env bash
# Measures kernels, training, decoding and serving on an attached GPU; arguments go to scripts/on_device.py.
#
#   scripts/on_device.sh                              installs into .venv, from the network
#   OUT=runs/gpu WHEELS=wheels scripts/on_device.sh   needs no network
#
# OUT is the folder of the results, runs/on_device by default. WHEELS is a folder with the wheels of
# what the interpreter PYTHON, python3 by default, lacks; they are unpacked into a temporary folder.
# Both are absolute, or seen from the repository. Outside a checkout DSMOE_COMMIT says of what the copy is.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${WHEELS:-}" ]; then
  python=${PYTHON:-python3}
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$site" "$WHEELS"/*.whl
  # What this package is called and needs, for code that asks for its version.
  "$python" -c 'import setuptools; setuptools.setup()' --quiet egg_info --egg-base "$site"
  export PYTHONPATH="$PWD:$site${PYTHONPATH:+:$PYTHONPATH}"
else
  make "${VENV:-.venv}/.cuda13"
  python=${VENV:-.venv}/bin/python
fi
# A package that is missing is seen now, and not by each part in its own time.
"$python" -c 'import array_record.python.array_record_module, flax, grain, ml_collections, optax, orbax.checkpoint
import portpicker, prometheus_client, pytest, starlette, tokenizers, uvicorn, xdist'
"$python" scripts/on_device.py --out="${OUT:-runs/on_device}" "$@"
