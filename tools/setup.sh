#!/usr/bin/env bash
# Creates .venv from the pinned requirements: with uv where it is present or can be
# installed, else with plain venv + pip (slower, same versions).
set -euo pipefail
cd "$(dirname "$0")/.."

requirements=requirements/dev.txt
python=${PYTHON:-python3}

install_with_uv() {
    VIRTUAL_ENV=.venv "$1" pip install --quiet -r "$requirements" &&
        VIRTUAL_ENV=.venv "$1" pip install --quiet --no-deps -e .
}

echo "setup: installing the pinned requirements into .venv (about 6 GB, minutes on a first run)"
rm -rf .venv
if command -v uv >/dev/null; then
    uv venv --quiet --python "$python" .venv
    install_with_uv uv
else
    "$python" -m venv .venv
    if .venv/bin/pip install --quiet uv && install_with_uv .venv/bin/uv; then
        :
    else
        echo "setup: uv is not available, installing with pip"
        .venv/bin/pip install --quiet -r "$requirements"
        .venv/bin/pip install --quiet --no-deps -e .
    fi
fi
touch .venv/.ready
