# make demo       train moganet_xtiny on handwritten digits, and evaluate it in a fresh process
# make demo-detection  train a small detector on digits pasted onto photographs, and evaluate it in a fresh process
# make demo-segmentation  train a small segmentor on the same digits, and evaluate it in a fresh process
# make test       the tests that need neither GPU nor Slurm, but for the slow ones; make test-all adds those, make
#                 test-slow runs those of kills, nodes, submitted jobs, models and plans alone
# make test-standin STANDIN=FOLDER  the tests that need a GPU, without one: FOLDER/run puts a stand-in for CUDA's
#                 libraries in front of torch (CONTRIBUTING.md)
# make test-slurm the tests on a Slurm of this machine alone; needs root, and apt where Slurm is not installed
# make web        a page on which checkpoints say what is in photographs: make web CHECKPOINT="A [B]" PORT=7860
# make test-web   the page in Debian's chromium, which it installs as root where apt is; elsewhere it says why not
# make lint       ruff, and mypy over the folders that pyproject.toml names
# make golden     whether this checkout computes the same bits as an older commit: make golden BASE=<commit>
# make benchmark  measures this machine, minutes, and writes BENCHMARKS.md; tools/gpu_check.sh does it for a GPU

VENV ?= .venv
PYTHON := $(VENV)/bin/python
# Tests run on two cores, a file on one of them; tests/conftest.py says which files share a core
BESIDE := --numprocesses 2 --dist loadgroup

# Of the page
CHECKPOINT :=
PORT := 7860

# Without one, on another torch than it is made for, and where it cannot be built, its tests are left out
STANDIN :=
STANDIN_TORCH := 2.14.1, CUDA 13.0

.PHONY: demo demo-detection demo-segmentation test test-all test-slow test-standin test-slurm test-web web lint \
	golden benchmark

# Made anew when the dependencies change; a broken installation leaves no stamp
$(VENV)/installed: pyproject.toml
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(PYTHON) main.py --recipe moganet_xtiny_digits --output_dir runs/demo
	$(PYTHON) main.py --eval --checkpoint runs/demo/checkpoint-best-ema.pth --output_dir runs/demo

demo-detection: $(VENV)/installed
	$(PYTHON) main.py --recipe retinanet_moganet_digits --output_dir runs/demo-detection
	$(PYTHON) main.py --eval --checkpoint runs/demo-detection/checkpoint-best-ema.pth --output_dir runs/demo-detection

demo-segmentation: $(VENV)/installed
	$(PYTHON) main.py --recipe semantic_fpn_moganet_digits --val_interval 4 --output_dir runs/demo-segmentation
	$(PYTHON) main.py --eval --checkpoint runs/demo-segmentation/checkpoint-best-ema.pth \
	--output_dir runs/demo-segmentation

test: $(VENV)/installed
	$(PYTHON) -m pytest $(BESIDE)

test-all: $(VENV)/installed
	$(PYTHON) -m pytest $(BESIDE) -m 'not gpu and not slurm and not web'

test-slow: $(VENV)/installed
	$(PYTHON) -m pytest $(BESIDE) -m slow tests/test_resume.py tests/test_submitit.py tests/test_command_line.py \
	tests/test_models.py tests/test_export.py tests/test_nodes.py tests/test_plan.py

test-standin: $(VENV)/installed
	@found=$$($(PYTHON) -c 'import torch; print(torch.__version__.split("+")[0] + ", CUDA", torch.version.cuda)'); \
	if [ -z '$(STANDIN)' ]; then echo 'skipped: no STANDIN=FOLDER is given'; \
	elif [ "$$found" != '$(STANDIN_TORCH)' ]; then \
	    echo "skipped: the stand-in is for torch $(STANDIN_TORCH), and this is torch $$found"; \
	elif ! echo '#include <crt/host_defines.h>' | g++ -E -x c++ -I"$${CUDA_HOME:-/usr/local/cuda}/include" - >/dev/null 2>&1; then \
	    echo "skipped: the stand-in is built by g++ and CUDA's headers, in $${CUDA_HOME:-/usr/local/cuda} or in CUDA_HOME"; \
	else set -ex; export PY=$(abspath $(PYTHON)); \
	    $(STANDIN)/run -0 $(PYTHON) -m pytest -m gpu tests/test_streams.py; \
	    $(STANDIN)/run $(PYTHON) -m pytest -m gpu --ignore tests/test_streams.py; fi

test-slurm: $(VENV)/installed
	$(PYTHON) -m pytest -m slurm tests/slurm

$(VENV)/web: $(VENV)/installed
	$(PYTHON) -m pip install -e '.[test-web]'
	touch $@

web: $(VENV)/web
	$(PYTHON) -m web --port $(PORT) $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT))

test-web: $(VENV)/web
	$(PYTHON) -m pytest -m web tests/test_export.py
	@if command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	    && { apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } >/dev/null; }; then \
	    $(PYTHON) -m pytest -m web tests/test_web.py; \
	else echo 'skipped: chromium is not installed, and only root can install it, by apt-get install chromium'; fi

lint: $(VENV)/installed
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

benchmark: $(VENV)/installed
	$(PYTHON) tools/benchmark.py report --device cpu
	$(PYTHON) tools/docs.py

golden: $(VENV)/installed
	$(PYTHON) tests/golden.py $(BASE)
