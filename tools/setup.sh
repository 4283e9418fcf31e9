#!/usr/bin/env bash
# Creates .venv from the pinned requirements, where they changed, and installs this package into it: with uv
# where it is present or can be installed, else with plain venv + pip (slower, same versions).
set -euo pipefail
cd "$(dirname "$0")/.."

requirements=requirements/dev.txt
installed=.venv/.requirements # a copy of what was installed
python=${PYTHON:-python3}

find_uv() {
    command -v uv || { [ -x .venv/bin/uv ] && echo .venv/bin/uv; }
}

create_environment() {
    echo "setup: installing the pinned requirements into .venv (about 6 GB, minutes on a first run)"
    rm -rf .venv
    if command -v uv >/dev/null; then
        uv venv --quiet --python "$python" .venv
    else
        "$python" -m venv .venv
        .venv/bin/pip install --quiet uv || true
    fi
    local uv
    if ! { uv=$(find_uv) && VIRTUAL_ENV=.venv "$uv" pip install --quiet -r "$requirements"; }; then
        echo "setup: uv is not available, installing with pip"
        .venv/bin/pip install --quiet -r "$requirements"
    fi
    cp "$requirements" "$installed"
}

install_package() {
    if [ "$(uname -sm)" = "Linux x86_64" ]; then
        if echo 'typedef float V __attribute__((vector_size(8))); V f(V x) { return __builtin_shufflevector(x, x, 0, 2); }' |
            ${CXX:-c++} -x c++ -fopenmp -fsyntax-only - 2>/dev/null; then
            # a mistake in a kernel must not pass for a missing compiler
            export SPARSIFINER_REQUIRE_NATIVE=${SPARSIFINER_REQUIRE_NATIVE:-1}
        else
            echo "setup: no g++ 12 or newer with OpenMP was found: installing without the native CPU kernels"
        fi
    fi
    local uv
    if uv=$(find_uv); then
        VIRTUAL_ENV=.venv "$uv" pip install --quiet --no-deps --reinstall -e .
    else
        .venv/bin/pip install --quiet --no-deps -e .
    fi
}

cmp -s "$requirements" "$installed" || create_environment
install_package
touch .venv/.ready
