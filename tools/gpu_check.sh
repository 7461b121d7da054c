#!/usr/bin/env bash
# On a machine with a GPU: which depthwise kernel wins there (two minutes), the tests that need a GPU, and the GPU figures
# of BENCHMARKS.md, which are written after each model. `make` has made .venv before.
#
#   tools/gpu_check.sh [--models NAME ...] [--precisions fp32 bf16 fp16] [--rounds N]
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    { echo 'error: torch finds no CUDA device here; see INSTALL.md' >&2; exit 2; }
"$python" tools/benchmark.py report --device cuda --subjects depthwise
"$python" -m pytest -m gpu
"$python" tools/benchmark.py report --device cuda --subjects model data engine checkpoint traffic "$@"
"$python" tools/docs.py
