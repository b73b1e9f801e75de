"""What the kernels of the exchange become on a GPU, by the ptxas in Triton's wheel and without a GPU.

python tests/device/compiled_kernels.py           # the table of docs/gpu.md, compiled now
python tests/device/compiled_kernels.py --write   # and into compiled_kernels.json, which a test compares with
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton
from kernel_modules import exchange_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_lamina.device.frame_descriptor import FrameDescriptor, Heads

TABLE = Path(__file__).with_suffix(".json")
TARGETS = (80, 90, 100)
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Compiled(NamedTuple):
    """Of one kernel on one target; ``wide_accesses`` are instructions that load or store 16 bytes a thread."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_accesses: int
    instructions: int


class Launch(NamedTuple):
    """A kernel as its launcher calls it."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Recorder:
    """In the place of a kernel: keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: self.launches.append(Launch(self.kernel, args, options))


def launched(call: Callable[[ModuleType], None]) -> Launch:
    """What ``call`` launches with tensors that have no memory."""
    module, launches = exchange_kernels(interpreted=False), []
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, _Recorder(kernel, launches))
        call(module)
    finally:
        vars(module).update(kernels)
    [launch] = launches
    return launch


def tensor(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def pack(
    heads: Heads, k_size: int, v_size: int, dtype: torch.dtype, stores: bool = True
) -> Callable[[ModuleType], None]:
    """Of a fused projection with the heads of this worker alone; or q alone, where the layer does not store."""
    row = heads.num_q * k_size + heads.num_kv * (k_size + v_size)

    def rows(num_heads: int, size: int) -> torch.Tensor:
        return torch.empty_strided((8, num_heads, size), (row, size, 1), dtype=dtype, device="meta")

    q, k, v = rows(heads.num_q, k_size), rows(heads.num_kv, k_size), rows(heads.num_kv, v_size)
    descriptor = tensor(len(FrameDescriptor._fields), dtype=torch.int64)
    kv = (k, v) if stores else (None, None)
    return lambda module: module.pack(q, *kv, tensor(8), tensor(8), descriptor, heads)


def take(
    num_heads: int, size: int, dtype: torch.dtype, workers: int, local: bool, sinks: bool = False
) -> Callable[[ModuleType], None]:
    out, lse = tensor(8, num_heads, size, dtype=dtype), tensor(num_heads, 8, dtype=torch.float32).T
    descriptors = tensor(workers, len(FrameDescriptor._fields), dtype=torch.int64)
    tables = tensor(workers, 8), tensor(workers, 2), descriptors, tensor(workers, 8, dtype=torch.int64)[:, 0]
    chunks = (tensor(8), lse) if local else (None, None)
    logits = tensor(num_heads, dtype=torch.float32) if sinks else None
    return lambda module: module.take(out, *tables, *chunks, logits)


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
REPRESENTATIVE: dict[str, Callable[[ModuleType], None]] = {
    "pack 32+8 x 128 bfloat16": pack(Heads(0, 32, 0, 8), 128, 128, BF16),
    "take 32 x 128 bfloat16, 1 worker": take(32, 128, BF16, 1, local=False),
    "take 32 x 128 bfloat16, 2 workers, local": take(32, 128, BF16, 2, local=True),
    "write_word": lambda module: module.write_word(tensor(1), 1),
    "wait_word": lambda module: module.wait_word(tensor(1), 1, tensor(1), 10**6),
}
"""By name, what the test compiles in the default run."""
VARIANTS = REPRESENTATIVE | {
    "pack 32+8 x 128 float16": pack(Heads(0, 32, 0, 8), 128, 128, F16),
    "pack 32+8 x 128 float32": pack(Heads(0, 32, 0, 8), 128, 128, F32),
    "pack 16+4 of 32+8 x 128 bfloat16": pack(Heads(16, 16, 4, 4), 128, 128, BF16),
    "pack 14+2 x 64 bfloat16": pack(Heads(0, 14, 0, 2), 64, 64, BF16),
    "pack 32+32 x 80 bfloat16": pack(Heads(0, 32, 0, 32), 80, 80, BF16),
    "pack 64+64 x 192, 128 bfloat16": pack(Heads(0, 64, 0, 64), 192, 128, BF16),
    "take 32 x 128 bfloat16, 1 worker, local": take(32, 128, BF16, 1, local=True),
    "take 32 x 128 bfloat16, 3 workers, local": take(32, 128, BF16, 3, local=True),
    "take 32 x 128 float16, 1 worker, local": take(32, 128, F16, 1, local=True),
    "take 32 x 128 float32, 1 worker": take(32, 128, F32, 1, local=False),
    "take 32 x 128 float32, 3 workers, local": take(32, 128, F32, 3, local=True),
    "take 14 x 64 bfloat16, 1 worker, local": take(14, 64, BF16, 1, local=True),
    "take 32 x 80 bfloat16, 1 worker, local": take(32, 80, BF16, 1, local=True),
    "take 8 x 256 bfloat16, 1 worker, local": take(8, 256, BF16, 1, local=True),
    "take 8 x 512 bfloat16, 1 worker, local": take(8, 512, BF16, 1, local=True),
    "take 64 x 64 bfloat16, 2 workers, local, sinks": take(64, 64, BF16, 2, local=True, sinks=True),
    "take 64 x 64 bfloat16, 2 workers, sinks": take(64, 64, BF16, 2, local=False, sinks=True),
    "pack 8 x 512 bfloat16, q alone": pack(Heads(0, 8, 0, 1), 512, 512, BF16, stores=False),
}


def compile_launch(launch: Launch, target: int) -> Any:
    """As Triton would at run time, where tensors begin at multiples of 16 and multiples of 16 are known to be such."""
    types, constants, aligned = {}, {}, {}
    for parameter, value in zip(launch.kernel.params, launch.args, strict=True):
        name, is_tensor = parameter.name, isinstance(value, torch.Tensor)
        is_one = value is None or (not is_tensor and value == 1 and not parameter.do_not_specialize)
        if parameter.is_constexpr or is_one:
            types[name], constants[name] = "constexpr", value
            continue
        types[name] = TYPES[value.dtype] if is_tensor else "i32"
        fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if not fixed and (is_tensor or value % 16 == 0):
            aligned[(parameter.num,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, types, constants, aligned)
    options = {"enable_fp_fusion": True, **launch.options}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def measure(kernel: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(what: str) -> str:
            tool = triton.knobs.nvidia.cuobjdump.path
            return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout

        usage, code = dump("-res-usage"), dump("-sass")
    registers, stack, local = (int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([\w.]+)", code, re.MULTILINE)
    wide_accesses = sum(name.startswith(("LDG.E.128", "STG.E.128")) for name in instructions)
    count = sum(name != "NOP" for name in instructions)
    return Compiled(registers, stack + local, kernel.metadata.shared, wide_accesses, count)


def compile_all(names: Iterator[str], targets: tuple[int, ...] = TARGETS) -> Iterator[tuple[str, int, Any]]:
    """Name, target and compiled kernel of each variant."""
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        for name in names:
            launch = launched(VARIANTS[name])
            for target in targets:
                yield name, target, compile_launch(launch, target)


def table() -> dict[str, Any]:
    """What `TABLE` holds: Triton's version, and by name and target what is compiled."""
    return json.loads(TABLE.read_text())  # type: ignore[no-any-return]


def markdown(kernels: dict[str, dict[str, list[int]]]) -> str:
    """The table of docs/gpu.md, of what `TABLE` holds."""
    lines = ["| Kernel | " + " | ".join(f"sm_{target}" for target in TARGETS) + " |"]
    lines.append("| --- |" + " ---: |" * len(TARGETS))
    for name, rows in kernels.items():
        compiled = [Compiled(*row) for row in rows.values()]
        cells = [
            f"{row.registers}, {row.spilled_bytes}, {row.shared_bytes}, {row.instructions}"
            for row in compiled
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    kernels: dict[str, dict[str, list[int]]] = {}
    for name, target, kernel in compile_all(iter(VARIANTS)):
        kernels.setdefault(name, {})[f"sm_{target}"] = list(measure(kernel))
    print(markdown(kernels))
    if "--write" in sys.argv[1:]:
        body = ",\n".join(f'    "{name}": {json.dumps(rows)}' for name, rows in kernels.items())
        TABLE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "kernels": {{\n{body}\n  }}\n}}\n')


if __name__ == "__main__":
    main()
