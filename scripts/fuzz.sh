#!/usr/bin/env bash
# Fuzzes what a peer can send to an attention worker, under AddressSanitizer and UndefinedBehaviorSanitizer; see
# docs/fuzzing.md. Prints executions, frames, rejects and coverage; fails at the first crash or broken invariant.
#   scripts/fuzz.sh [--frames N] [--pieces N] [--requests N] [--seed S] [--isa]
#     --frames N     frames to the data channel (default 100000): libFuzzer where clang++ is installed, else g++ and a
#                    mutator of our own
#     --pieces N     pieces of frames, as they come over UCX (default 1000000); g++ and a mutator of our own
#     --requests N   messages to the control port (default 2000)
#     --isa          with the kernel variants for this CPU, not portable C++ only
#   BUILD_DIR        where to build (default build/fuzz); the corpus is kept there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

frames=100000 pieces=1000000 requests=2000 seed=1 variants=OFF
while [ $# -gt 0 ]; do
  case "$1" in
    --frames) frames=$2; shift 2 ;;
    --pieces) pieces=$2; shift 2 ;;
    --requests) requests=$2; shift 2 ;;
    --seed) seed=$2; shift 2 ;;
    --isa) variants=ON; shift ;;
    *) echo "fuzz: unknown option $1" >&2; exit 2 ;;
  esac
done

build=${BUILD_DIR:-build/fuzz}
export UBSAN_OPTIONS=print_stacktrace=1
configure=(cmake -S . -G Ninja -DLAMINA_FUZZ=ON -DLAMINA_SANITIZE=address,undefined -DLAMINA_ISA_VARIANTS=$variants)

standalone() {  # TARGET COUNT
  CXX=g++ "${configure[@]}" -B "$build/gcc" >/dev/null
  ninja -C "$build/gcc" "$1_standalone" | tail -1
  LAMINA_FUZZ_LAST_INPUT="$build/last-input" "$build/gcc/fuzz/$1_standalone" --count "$2" --seed "$seed" \
    2> >(grep -v "frame dropped" >&2)
  echo "fuzz: crashes=0"
}

if [ "$frames" -gt 0 ] && command -v clang++ >/dev/null; then
  CXX=clang++ "${configure[@]}" -B "$build/clang" >/dev/null
  ninja -C "$build/clang" fuzz_frames fuzz_frames_standalone | tail -1
  mkdir -p "$build/corpus"
  "$build/clang/fuzz/fuzz_frames_standalone" --write-seeds "$build/corpus" >/dev/null
  done_frames=0
  # libFuzzer counts programs; one has 20 frames or more. Leaks are looked for once, at the end of the process.
  while [ "$done_frames" -lt "$frames" ]; do
    log=$build/frames.log
    if ! "$build/clang/fuzz/fuzz_frames" -seed="$seed" -runs=$(((frames - done_frames) / 16 + 1000)) -max_len=1024 \
      -len_control=0 -timeout=120 -detect_leaks=0 -print_final_stats=1 -artifact_prefix="$build/" "$build/corpus" >"$log" 2>&1; then
      tail -60 "$log"
      echo "fuzz: crashes=1; run it again: $build/clang/fuzz/fuzz_frames $build/crash-..." >&2
      exit 1
    fi
    grep -E '^fuzz:|^stat::(number_of_executed|peak_rss)|INITED|DONE' "$log"
    done_frames=$((done_frames + $(sed -n 's/^fuzz: \([0-9]*\) frames in.*/\1/p' "$log")))
    seed=$((seed + 1))
  done
  echo "fuzz: $done_frames frames, crashes=0"
elif [ "$frames" -gt 0 ]; then
  standalone fuzz_frames "$frames"
fi
if [ "$pieces" -gt 0 ]; then
  standalone fuzz_pieces "$pieces"
fi
if [ "$requests" -gt 0 ]; then
  . scripts/env.sh
  python fuzz/fuzz_control.py --requests "$requests" --seed "$seed"
fi
