#!/usr/bin/env bash
# Sets up the checkout and runs the tests, two files at a time:
#   scripts/test.sh [--vllm 0.32|0.33] [--runner v1|v2] [arguments of pytest, such as tests/equality -k llama]
#   --vllm           the vLLM to test with (default: 0.32, which is installed; see scripts/overlay.sh for others)
#   --runner         the model runner of every engine and server (default: v1, as vLLM on CPUs)
#   TEST_PROCESSES   files at a time (default: 2); each starts engines, which take a core and up to 2 GiB
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh

vllm=0.32 runner=v1
while [ "${1-}" = --vllm ] || [ "${1-}" = --runner ]; do
  declare "${1#--}=${2-}"
  shift 2
done

scripts/setup.sh
if [ "$vllm" != 0.32 ]; then
  scripts/overlay.sh "$vllm"
  export PYTHONPATH="$PWD/.vllm/$vllm${PYTHONPATH:+:$PYTHONPATH}"
fi
case "$runner" in
  v1) ;;
  v2)
    export VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1
    export PYTHONPATH="$PWD/tests/triton_on_cpu${PYTHONPATH:+:$PYTHONPATH}"
    ;;
  *)
    echo "test.sh: --runner is v1 or v2, not '$runner'" >&2
    exit 2
    ;;
esac
exec pytest --numprocesses "${TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder "$@"
