"""All that depends on the type of the compute device; nothing else in Lamina knows it."""

from vllm_lamina.device.base import Device
from vllm_lamina.errors import UnsupportedError


def device_for(device_type: str) -> Device:
    """The adapter of a compute device.

    Parameters
    ----------
    device_type
        vLLM's name of it: ``"cpu"`` or ``"cuda"``.

    Raises
    ------
    UnsupportedError
        Lamina has no adapter for it.
    """
    if device_type == "cpu":
        from vllm_lamina.device.cpu import CpuDevice

        return CpuDevice()
    if device_type == "cuda":
        from vllm_lamina.device.cuda import CudaDevice

        return CudaDevice()
    raise UnsupportedError(f"Lamina runs models on CPU and CUDA devices, not on {device_type!r}.")


__all__ = ["Device", "device_for"]
