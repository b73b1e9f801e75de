#!/usr/bin/env bash
# Sets up the checkout and runs the tests. Arguments go to pytest: scripts/test.sh tests/equality -k llama
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
scripts/setup.sh
exec pytest "$@"
