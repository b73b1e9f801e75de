"""The compiler that a backend has to name; the interpreter never asks for it."""

from triton.backends.compiler import BaseBackend


class InterpreterOnly(BaseBackend):
    @staticmethod
    def supports_target(target):
        return target.backend == "cpu"

    def _no(self, *args, **kwargs):
        raise NotImplementedError("set TRITON_INTERPRET=1: kernels are interpreted here, not compiled")

    hash = parse_options = add_stages = load_dialects = get_module_map = get_codegen_implementation = (
        pack_metadata
    ) = _no
