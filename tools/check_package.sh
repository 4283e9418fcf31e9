#!/usr/bin/env bash
# Builds wheel and sdist, installs the wheel into empty environments: with all extras, and with none.
set -euo pipefail
cd "$(dirname "$0")/.."

rm -rf dist
.venv/bin/python -m build --outdir dist .
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
if command -v uv >/dev/null; then
    uv venv --quiet "$empty/core"
    VIRTUAL_ENV="$empty/core" uv pip install --quiet -c requirements/dev.txt dist/*.whl
    uv venv --quiet "$empty/env"
    VIRTUAL_ENV="$empty/env" uv pip install --quiet -c requirements/dev.txt "$(echo dist/*.whl)[all]"
else
    "${PYTHON:-python3}" -m venv "$empty/core"
    "$empty/core/bin/pip" install --quiet -c requirements/dev.txt dist/*.whl
    "${PYTHON:-python3}" -m venv "$empty/env"
    "$empty/env/bin/pip" install --quiet -c requirements/dev.txt "$(echo dist/*.whl)[all]"
fi
program="$PWD/tools/core_only.py"
cd "$empty"
"$empty/core/bin/python" "$program"
"$empty/env/bin/sparsifiner" --help
"$empty/env/bin/sparsifiner" info
"$empty/env/bin/sparsifiner" macs --keep 0.1
