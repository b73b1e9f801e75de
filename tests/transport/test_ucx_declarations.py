"""The declarations that Lamina makes of libucp agree with UCX's own headers, where these are installed."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
STRUCTURES = {
    "ucp_params_t": ["field_mask", "features"],
    "ucp_worker_params_t": ["field_mask", "thread_mode"],
    "ucp_ep_params_t": ["field_mask", "address", "err_mode", "err_handler"],
    "ucp_err_handler_t": ["cb", "arg"],
    "ucp_mem_map_params_t": ["field_mask", "address", "length"],
    "ucp_am_handler_param_t": ["field_mask", "id", "flags", "cb", "arg"],
    "ucp_am_recv_param_t": ["recv_attr", "reply_ep"],
    "ucp_request_param_t": ["op_attr_mask", "flags", "cb", "datatype", "user_data", "memory_type"],
}


def header_folders() -> list[Path]:
    spec = importlib.util.find_spec("libucx")
    wheel = [Path(folder, "include") for folder in spec.submodule_search_locations or []] if spec else []
    return [folder for folder in [*wheel, Path("/usr/include")] if (folder / "ucp/api/ucp.h").exists()]


def test_declarations_agree_with_the_headers(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    folders = header_folders()
    if compiler is None or not folders:
        pytest.skip("needs g++ and UCX's headers (the libucx-cu12 wheel, or libucx-dev)")
    declarations = (SOURCES / "transport/ucp_api.h").read_text()
    constants = re.findall(r"^inline constexpr \w+ (UC[SP]_\w+)", declarations, re.MULTILINE)
    assert len(constants) > 20
    for folder in folders:
        header = "".join(file.read_text() for file in (folder / "ucp/api").glob("*.h"))
        checks = ["#include <ucp/api/ucp.h>", '#include "transport/ucp_api.h"', "using namespace lamina;"]
        # UCX 1.13 has not all of what later versions added and Lamina may ask for.
        checks += [
            f"static_assert(static_cast<long long>(::{name}) == static_cast<long long>(ucp::{name}));"
            for name in constants
            if name.startswith("UCS") or re.search(rf"\b{name}\b", header)
        ]
        for name, fields in STRUCTURES.items():
            checks += [
                f"static_assert(offsetof(::{name}, {field}) == offsetof(ucp::{name}, {field}));\n"
                f"static_assert(sizeof(::{name}::{field}) == sizeof(ucp::{name}::{field}));"
                for field in fields
            ]
        source = tmp_path / "declarations.cpp"
        source.write_text("\n".join(checks) + "\n")
        command = [compiler, "-std=c++20", "-fsyntax-only", "-Wno-deprecated-declarations"]
        done = subprocess.run(
            [*command, "-I", str(folder), "-I", str(SOURCES), str(source)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
