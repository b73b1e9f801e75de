#!/usr/bin/env bash
# Builds the native code with sanitizers and runs threads against each other on everything they share, see
# docs/fuzzing.md.
#   scripts/sanitize.sh thread|address [SECONDS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${1:-}" in
  thread) sanitizers=thread variants=OFF ;;
  address) sanitizers=address,undefined variants=ON ;;
  *) echo "usage: scripts/sanitize.sh thread|address [SECONDS]" >&2; exit 2 ;;
esac
build=${BUILD_DIR:-build/sanitize}/$1
export TSAN_OPTIONS="halt_on_error=1 ${TSAN_OPTIONS:-}" UBSAN_OPTIONS=print_stacktrace=1
cmake -S . -B "$build" -G Ninja -DLAMINA_FUZZ=ON -DLAMINA_SANITIZE=$sanitizers -DLAMINA_ISA_VARIANTS=$variants >/dev/null
ninja -C "$build" stress | tail -1
"$build/fuzz/stress" --seconds "${2:-12}"
