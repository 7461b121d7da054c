#!/usr/bin/env bash
# On a machine with a GPU: the tests that need one, and the GPU figures of BENCHMARKS.md. `make` has made .venv before.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' ||
    { echo 'error: torch finds no CUDA device here; see INSTALL.md' >&2; exit 2; }
"$python" -m pytest -m gpu
"$python" tools/benchmark.py report --device cuda
"$python" tools/docs.py
