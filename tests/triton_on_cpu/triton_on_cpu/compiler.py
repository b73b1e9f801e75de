"""The compiler that a backend of Triton has to name; the interpreter never asks for it."""

from typing import Any

from triton.backends.compiler import BaseBackend


def _compile(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("set TRITON_INTERPRET=1: kernels are interpreted here, not compiled")


class InterpreterOnly(BaseBackend):
    """Compiles nothing."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        return target.backend == "cpu"

    hash = parse_options = add_stages = load_dialects = _compile
    get_module_map = get_codegen_implementation = pack_metadata = _compile
