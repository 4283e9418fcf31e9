#!/usr/bin/env bash
# Builds the native kernels with the address and undefined behaviour sanitizers and runs Python with them.
set -euo pipefail
cd "$(dirname "$0")/.."

command -v cmake >/dev/null || { echo "sanitize: needs cmake; install it" >&2; exit 1; }
unset MAKEFLAGS MAKELEVEL # of the make that started this
cmake -S . -B build/sanitize -DSPARSIFINER_SANITIZE=address,undefined >/dev/null
cmake --build build/sanitize --parallel

# Python itself is not sanitized: the runtimes come first, and what it never frees is no leak of ours
compiler=${CXX:-c++}
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export SPARSIFINER_LIBRARY="$PWD/build/sanitize/_native.so"
.venv/bin/python "$@"
