#!/usr/bin/env bash
# Lint, format and the tests that need no GPU:  bash scripts/test.sh [pytest arguments]
# On a GPU:  bash scripts/test.sh -m gpu        All of them:  bash scripts/test.sh -m ""
set -euo pipefail
cd "$(dirname -- "${BASH_SOURCE[0]}")/.."
PYTHON="$(bash scripts/setup.sh requirements-test.txt)"
failed=0
"$PYTHON" -m ruff check . || failed=1
"$PYTHON" -m ruff format --check . || failed=1
# Two processes, a test file at a time each, in the order of tests/conftest.py; one thread each, so that they do not get in
# each other's way.
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not gpu and not slow" "$@" || failed=$?
exit "$failed"
