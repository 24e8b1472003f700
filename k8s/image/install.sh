#!/bin/sh
# Installs Divisi into a folder that is then never written to again: what the Dockerfile's targets do.
#
# usage: install.sh FOLDER SOURCE
#   FOLDER  a virtual environment is made there; SOURCE  the repository, or a wheel
# PIP_ARGUMENTS in the environment are passed to pip (an index for torch's CPU or CUDA wheels, constraints).
# CHIPS=80,90,...: compute capabilities for which Triton kernels are compiled ahead. No GPU has run what is made so.
#
# It needs Python 3.11 or later with venv, and g++ to build the CPU kernels ahead; neither compiler nor network is needed
# afterwards.
set -eu

folder=$1
source=$2

python3 -m venv "$folder"
python="$folder/bin/python"
# shellcheck disable=SC2086  # several arguments
"$python" -m pip install --no-cache-dir --quiet ${PIP_ARGUMENTS:-} "$source"

# The CPU kernels for x86-64-v3, v4 and v4 with bf16, chosen by the processor when a process starts: those of the wheel,
# compiled here where SOURCE is one that was built without a compiler.
"$python" -P -m divisi.kernels.native

if [ "${CHIPS:-}" ]; then
    "$python" -P -m divisi.benchmarks.gpu.ahead --chips "$CHIPS"
fi

# The demo model, at a path that doesn't depend on Python's version.
demo=$("$python" -P -c 'from divisi.model.demo import checkpoint_dir; print(checkpoint_dir())')
ln -sfn "$demo" "$folder/divisi-demo"

"$python" -m compileall -q "$folder/lib" || true
rm -rf "$folder"/lib/python*/site-packages/pip "$folder"/lib/python*/site-packages/pip-*
