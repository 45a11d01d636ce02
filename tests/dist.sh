#!/usr/bin/env bash
# SPDX-License-Identifier: BSD-3-Clause
# Builds the sdist and the wheel into dist/, looks into both, and installs each into an empty environment to use it
# there: the wheel, the sdist with a compiler, the sdist without one. `make dist` calls it, in a git clone.
#
#     PYTHON    makes the environments; python3.11 if not told
#     TOOLS     the folder of commands of an environment with the extra `dist`
set -euo pipefail
PYTHON=${PYTHON:-python3.11}
TOOLS=${TOOLS:?the folder with the python of an environment that has the extra dist; make dist sets it}
cd "$(dirname "$0")/.."
ROOT=$PWD
TESTS=(tests/test_layer.py tests/convert/test_conversion.py) # in one process, then on two:
RANKS=(tests/multiprocess/test_exactness.py)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH # an installed package is found without it

fail() {
    echo "FAILED: $1" >&2
    exit 1
}
step() { # step SENTENCE COMMAND...: one line; what the command says is kept in log, and shown where it fails
    log=$work/log
    echo "$1"
    "${@:2}" >"$log" 2>&1 || { cat "$log" >&2; fail "$1"; }
}
says() { # says WORDS: the last step said so
    grep -qF -- "$1" "$log" || { cat "$log" >&2; fail "the step above does not say: $1"; }
}
has() { # has LIST PATTERN
    grep -qE -- "$2" "$1" || { cat "$1" >&2; fail "$(basename "$1"): nothing in it matches $2"; }
}
lacks() { # lacks LIST PATTERN
    ! grep -E -- "$2" "$1" >&2 || fail "$(basename "$1"): has files that match $2"
}

# From a copy of what git knows: leftovers in build/ and *.egg-info would get into the artefacts.
mkdir "$work/source" "$work/built"
git ls-files -z | tar --null --files-from=- --create | tar --extract --directory "$work/source"
cd "$work/source"
# Without isolation, which would install a setuptools of its own; the wheel is made from the sdist.
step "sdist and wheel" "$TOOLS/python" -m build --no-isolation --outdir "$work/built"
step "manylinux tag" env PATH="$TOOLS:$PATH" "$TOOLS/auditwheel" repair --wheel-dir "$work/wheel" "$work/built"/*.whl
sdist=$(echo "$work"/built/*.tar.gz)
wheel=$(echo "$work"/wheel/*.whl)
[[ $wheel == *-cp311-abi3-manylinux* ]] || fail "a package index takes a manylinux wheel; received $(basename "$wheel")"

echo "contents"
"$TOOLS/python" -m zipfile --list "$wheel" | awk 'NR > 1 { print $1 }' >"$work/contents of the wheel"
tar --list --file "$sdist" >"$work/contents of the sdist"
gpu=('\.cu$' '\.cuh$')
typed=('syncbn/py\.typed$' '\.pyi$')
for pattern in "${gpu[@]}" "${typed[@]}" '/_host\.abi3\.so$' '/_segment\.abi3\.so$' 'dist-info/.*LICENSE$' 'entry_points\.txt$'; do
    has "$work/contents of the wheel" "$pattern"
done
lacks "$work/contents of the wheel" '\.(cpp|hpp|c|h|o)$'
lacks "$work/contents of the wheel" '(^|/)(tests|benchmarks|examples|launch|docs|build)/'
for pattern in "${gpu[@]}" "${typed[@]}" '\.cpp$' '\.hpp$' /setup.py /LICENSE /tests/conftest.py /constraints.txt; do
    has "$work/contents of the sdist" "$pattern"
done
lacks "$work/contents of the sdist" '\.(so|o|pyc)$'

# What the checks run, without the package beside it: the tests, launch files and examples of the sdist.
mkdir "$work/outside"
tar --extract --file "$sdist" --directory "$work/outside" --strip-components 1
rm -r "$work/outside/syncbn"
cd "$work/outside"

try() { # try NAME KERNELS PACKAGE [VARIABLE=VALUE...]: the package in an empty environment, where doctor says KERNELS
    local name=$1 kernels=$2 package=$3 venv=$work/venv
    local in=(env "PATH=$venv/bin:$PATH")
    local pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt")
    step "$name: an empty environment" "$PYTHON" -m venv "$venv"
    step "$name: torch" "${pip[@]}" torch
    # pip's cache would hand the wheel that was compiled from the sdist to the check without a compiler.
    step "$name: install" env PIP_NO_CACHE_DIR=1 "${@:4}" "${pip[@]}" "syncbn[mpi] @ file://$package"
    step "$name: where it is" "${in[@]}" python -c "import syncbn; print(syncbn.__file__)"
    says "$venv/lib"
    step "$name: syncbn doctor" "${in[@]}" syncbn doctor
    says "$kernels"
    says "No problem found."
    step "$name: syncbn doctor on 2 ranks" "${in[@]}" NPROC=2 launch/mpirun.sh -m syncbn doctor
    says "$kernels"
    says "No problem found."
    step "$name: python -m syncbn" "${in[@]}" python -m syncbn --version
    step "$name: syncbn bench" "${in[@]}" syncbn bench --shapes 2,8,8,8 --repeats 2 --warmup 1
    step "$name: examples/one_layer.py on 2 ranks" "${in[@]}" NPROC=2 launch/mpirun.sh examples/one_layer.py
    says "rank 0 of 2: 1, 2, 3 -> -1.414, -0.707, 0.000"
    says "rank 1 of 2: 4, 5 -> 0.707, 1.414"
    step "$name: tools of the tests" "${pip[@]}" hypothesis psutil pytest pytest-mpi pytest-timeout
    step "$name: tests in one process" "${in[@]}" timeout 600 python -m pytest -q "${TESTS[@]}"
    step "$name: tests on 2 ranks" "${in[@]}" NPROC=2 timeout 600 launch/mpirun.sh -m pytest -q --with-mpi "${RANKS[@]}"
    rm -rf "$venv"
}
try wheel "host: compiled C++" "$wheel"
try sdist "host: compiled C++" "$sdist"
try "sdist without a compiler" "torch: the compiled host kernels were not built" "$sdist" CC=/bin/false CXX=/bin/false

rm -rf "$ROOT/dist"
mkdir "$ROOT/dist"
cp "$sdist" "$wheel" "$ROOT/dist"
echo "dist/$(basename "$sdist"), dist/$(basename "$wheel")"
