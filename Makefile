# Two commands are all a newcomer needs: `make demo` and `make test`.
.PHONY: demo test matrix test-gpu lint types unit sanitize fuzz stress stress-gpu lock package clean

ready := .venv/.ready
bin := .venv/bin
# without bytecode every process of the tests compiles torch's sources again, which takes it six seconds
unexport PYTHONDONTWRITEBYTECODE

demo: $(ready)
	$(bin)/sparsifiner demo

test: lint types unit

lint: $(ready)
	$(bin)/ruff check .
	$(bin)/ruff format --check .

types: $(ready)
	$(bin)/mypy

unit: $(ready)
	$(bin)/pytest -n 2

# All cases of the laws of which `make test` holds a sample; what held is kept. Without = pytest would look for tests
# beside the file of results.
matrix: $(ready)
	$(bin)/pytest -n 2 --matrix=only --matrix-result=docs/results/matrix.json

# Only other requirements make the environment anew; for anything else the package is installed again.
$(ready): requirements/dev.txt pyproject.toml tools/setup.sh CMakeLists.txt csrc $(wildcard csrc/*)
	tools/setup.sh

# The same operations on a GPU, against the same reference.
test-gpu: $(ready)
	$(bin)/pytest --matrix=all tests/test_gpu.py tests/test_triton_models.py tests/ops

# The native CPU kernels again, with checks of every address and of undefined behaviour.
sanitize: $(ready)
	tools/sanitize.sh -m pytest -p no:xdist --matrix all tests/test_native.py tests/ops/test_native_*.py

# 10,000 random calls of the public operations, on the same checked kernels: minutes.
fuzz: $(ready)
	tools/sanitize.sh -m tests.stress.ops --calls 10000

# Training that is killed at random moments, while its folder is meddled with; models that run out of memory.
stress: $(ready)
	$(bin)/python -m tests.stress.kills --kills 40
	$(bin)/python -m tests.stress.memory --trials 20

# 1,000 random calls of the GPU operations, each of another kind than the one before: needs a GPU, minutes.
stress-gpu: $(ready)
	$(bin)/python -m tests.stress.programs --calls 1000

# Pins every requirement anew; the file carries no registry addresses.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --extra dev \
	    --no-annotate --no-header --no-emit-index-url --no-emit-find-links pyproject.toml -o requirements/dev.txt

# Builds wheel and sdist, installs the wheel into an empty environment and starts it.
package: $(ready)
	tools/check_package.sh

clean:
	rm -rf .venv dist build runs
