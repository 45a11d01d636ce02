#!/usr/bin/env bash
# Builds the host kernels with gcc's address and undefined-behaviour sanitizers and runs the kernel tests on them.
#
#     tests/sanitize.sh                        every kernel test
#     tests/sanitize.sh -k "steps and host"    some of them, by pytest's options
set -euo pipefail
PYTHON=${PYTHON:-python}
cd "$(dirname "$0")/.."
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

# In a copy: the build in this tree stays as it is, and the copy's own package is the one that pytest imports.
cp -r syncbn tests pyproject.toml setup.py README.md LICENSE "$copy"
cd "$copy"
find . -name "_host*.so" -delete
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1"
CC=gcc CXX=g++ SYNCBN_CXXFLAGS="$flags" "$PYTHON" setup.py --quiet build_ext --inplace

# The sanitizer's library comes first. Python and torch never free what they keep to the end: no leak report.
preload=$(gcc -print-file-name=libasan.so):$(gcc -print-file-name=libubsan.so):$(gcc -print-file-name=libstdc++.so)
LD_PRELOAD=$preload ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 SYNCBN_KERNELS=host \
    "$PYTHON" -m pytest -q --capture=sys -p no:cacheprovider -m "not builds" tests/kernels/test_{contract,contract_calls,host,host_errors}.py "$@"
