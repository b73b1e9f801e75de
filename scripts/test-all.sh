#!/usr/bin/env bash
# Runs the tests on every vLLM and model runner that is supported, one after the other; prints what became of each.
# V1 runs all; V2, in Triton's interpreter, what depends on the model runner. Arguments go to pytest: with some, both run
# these. The logs are in results/tests/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

logs=results/tests status=0 table=()
mkdir -p "$logs"
for vllm in 0.32 0.33; do
  for runner in v1 v2; do
    log="$logs/vllm-$vllm-$runner.log"
    echo "test-all: vLLM $vllm, $runner; see $log"
    begin=$SECONDS
    selected=("$@")
    if [ "$runner" = v2 ] && [ $# = 0 ]; then
      selected=(tests/compat tests/equality tests/partition tests/recovery tests/request_fuzz)
    fi
    scripts/test.sh --vllm "$vllm" --runner "$runner" "${selected[@]}" >"$log" 2>&1 || status=$?
    outcome=$(tail -n 1 "$log" | sed 's/^=* *//; s/ *=*$//')
    table+=("| $vllm | ${runner^^} | $(date +%F) | $outcome | $(((SECONDS - begin + 59) / 60)) min |")
  done
done
printf '%s\n' '| vLLM | Runner | Date | Result | Took |' '| --- | --- | --- | --- | --- |' "${table[@]}"
exit "$status"
