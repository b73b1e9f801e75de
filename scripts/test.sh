#!/usr/bin/env bash
# Sets up the checkout and runs the tests, two files at a time. Arguments go to pytest:
# scripts/test.sh tests/equality -k llama
#   TEST_PROCESSES   files at a time (default: 2); each starts engines, which take a core and up to 2 GiB
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
scripts/setup.sh
exec pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
