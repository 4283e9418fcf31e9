#!/usr/bin/env bash
# Builds wheel and sdist, installs the wheel into an empty environment and starts it there.
set -euo pipefail
cd "$(dirname "$0")/.."

rm -rf dist
.venv/bin/python -m build --outdir dist .
empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
if command -v uv >/dev/null; then
    uv venv --quiet "$empty/env"
    VIRTUAL_ENV="$empty/env" uv pip install --quiet -c requirements/dev.txt "$(echo dist/*.whl)[all]"
else
    "${PYTHON:-python3}" -m venv "$empty/env"
    "$empty/env/bin/pip" install --quiet -c requirements/dev.txt "$(echo dist/*.whl)[all]"
fi
cd "$empty"
"$empty/env/bin/sparsifiner" --help
"$empty/env/bin/sparsifiner" info
"$empty/env/bin/sparsifiner" macs --keep 0.1
