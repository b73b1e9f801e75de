#!/usr/bin/env bash
# On a GPU machine, from a bare checkout: builds the native code, and measures the model on the GPU (benchmarks/gpu.py),
# each part under a time limit of its own, eight minutes in all. Arguments go to benchmarks/gpu.py.
#   BUNDLE   a directory with Python packages for this machine, vLLM among them, where its Python has no vLLM;
#            needed are PyTorch for CUDA, transformers, nanobind, cmake and ninja
#   OUT      where results go (default: results)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${BUNDLE:+:$BUNDLE}${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# FlashInfer's sampler compiles itself where it is installed, for minutes.
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_ENABLE_V1_MULTIPROCESSING=0
OUT="${OUT:-results}"
mkdir -p "$OUT"

nvidia-smi -L
python3 -c 'import torch, vllm; print("gpu: torch", torch.__version__, "vllm", vllm.__version__)'

cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v python3)" >"$OUT/build.log" 2>&1
cmake --build build/gpu >>"$OUT/build.log" 2>&1 || {
  tail -n 20 "$OUT/build.log" >&2
  exit 1
}
cp build/gpu/_native*.so vllm_lamina/

# What pip would write: the entry points by which vLLM finds the plugin.
python3 - <<'PY'
import pathlib
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
info = pathlib.Path(f"vllm_lamina-{project['version']}.dist-info")
info.mkdir(exist_ok=True)
(info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm-lamina\nVersion: {project['version']}\n")
groups = project["entry-points"].items()
(info / "entry_points.txt").write_text(
    "".join(f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in entries.items()) for group, entries in groups)
)
PY

exec python3 -m benchmarks.gpu --output "$OUT" "$@"
