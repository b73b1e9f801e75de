"""The vLLM interfaces that Lamina relies on; after an upgrade of vLLM these tests fail first and say what moved."""

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import ModelZoo
from vllm.config import get_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention import selector
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from vllm_lamina.compat.backends import override_attention_backend, restore_attention_backend
from vllm_lamina.compat.versions import SERIES, check_vllm_version
from vllm_lamina.device.base import Chunks, LayerShape
from vllm_lamina.device.cpu import CpuDevice
from vllm_lamina.errors import LaminaError
from vllm_lamina.executor.executors import STEP_METHODS
from vllm_lamina.worker.model_worker.worker import LaminaCUDAWorker


def test_the_installed_version_is_tested() -> None:
    check_vllm_version()


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0", "unknown"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(LaminaError, match=f" and {SERIES[-1]}.x; this is vLLM {version}"):
        check_vllm_version(version)


def test_a_backend_can_be_overridden_and_restored() -> None:
    """Relies on ``AttentionBackendEnum``, ``register_backend``, ``clear_override``, ``_cached_get_attn_backend``."""
    name = CpuDevice.backend_name
    stock = AttentionBackendEnum[name].get_path()
    override_attention_backend(name, "a.Backend")
    try:
        assert AttentionBackendEnum[name].get_path() == "a.Backend"
    finally:
        restore_attention_backend(name)
    assert AttentionBackendEnum[name].get_path() == stock
    assert callable(selector._cached_get_attn_backend.cache_clear)


def test_worker_methods_that_are_overridden_exist() -> None:
    """Relies on these methods of vLLM's workers, with these parameters."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert issubclass(CPUWorker, Worker)
    assert [*inspect.signature(Worker.initialize_from_config).parameters] == ["self", "kv_cache_config"]
    assert [*inspect.signature(CPUWorker.determine_available_memory).parameters] == ["self"]
    assert [*inspect.signature(CPUWorker._should_warm_up_model).parameters] == ["self"]
    assert [*inspect.signature(Worker.get_kv_cache_spec).parameters] == ["self"]
    assert [*inspect.signature(Worker.compile_or_warm_up_model).parameters] == ["self"]
    assert "self.execute_model, self.sample_tokens" in inspect.getsource(gpu_worker)


def test_executor_hooks_exist() -> None:
    """Relies on ``_init_executor`` being where executors start their workers, and on ``worker_cls`` read after it."""
    from vllm.v1.executor.multiproc_executor import MultiprocExecutor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    for cls in (MultiprocExecutor, UniProcExecutor):
        assert [*inspect.signature(cls._init_executor).parameters] == ["self"]
        assert [*inspect.signature(cls.shutdown).parameters] == ["self"]


def test_model_workers_are_called_through_collective_rpc() -> None:
    """Relies on it being all by which executors call their workers, once these run and until they end; on its first two
    parameters; and on a step being these two methods.
    """
    from vllm.v1.executor import multiproc_executor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    methods = {
        name: inspect.getsource(f) for name, f in vars(UniProcExecutor).items() if inspect.isfunction(f)
    }
    calling = {name for name, source in methods.items() if "self.driver_worker" in source}
    assert calling == {"_init_executor", "collective_rpc", "shutdown"}
    assert inspect.getsource(multiproc_executor).count("self.rpc_broadcast_mq.enqueue(") == 1
    for cls in (multiproc_executor.MultiprocExecutor, UniProcExecutor):
        assert [*inspect.signature(cls.collective_rpc).parameters][:3] == ["self", "method", "timeout"]
        assert all(f'"{name}",' in inspect.getsource(getattr(cls, name)) for name in STEP_METHODS)


def test_a_gpu_worker_profiles_under_its_configuration(model_zoo: ModelZoo) -> None:
    """Relies on ``profile_run`` of both model runners and ``get_flash_attn_version``, which read the current
    configuration.
    """
    arguments = EngineArgs(model_zoo("llama"), dtype="float32", max_model_len=256, max_num_batched_tokens=96)
    config = arguments.create_engine_config()
    seen: list[Any] = []

    def see(what: object) -> None:
        assert get_current_vllm_config() is config
        assert torch.is_inference_mode_enabled()
        seen.append(what)

    class Layer(AttentionLayerBase):
        def __init__(self, shape: LayerShape) -> None:
            attend = CpuDevice().local_attention(shape)

            def seen_attending(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunks: Chunks) -> Any:
                see(([tuple(x.shape) for x in (q, k, v)], chunks.lengths))
                return attend(q, k, v, chunks)

            self.impl = SimpleNamespace(shape=shape, attend_locally=seen_attending)

        def get_attn_backend(self) -> Any: ...
        def get_kv_cache_spec(self, vllm_config: object) -> Any: ...

    worker = object.__new__(LaminaCUDAWorker)
    worker.device = torch.device("cpu")
    layer = Layer(LayerShape(8, 2, 32, 64, 0.2, torch.float32))
    config.compilation_config.static_forward_context["a"] = layer
    worker.vllm_config, worker.parallel_config = config, config.parallel_config
    worker.model_config, worker.scheduler_config = config.model_config, config.scheduler_config
    worker.model_runner = SimpleNamespace(profile_run=lambda randomize_inputs: see(randomize_inputs))
    worker._warm_up()
    chunks = [1], [1, 1], [96], [1, 95]
    assert seen == [
        False,
        *(([(sum(lengths), *heads) for heads in ((8, 32), (2, 32), (2, 64))], lengths) for lengths in chunks),
    ]

    source = inspect.getsource(Worker.determine_available_memory)
    assert "torch.inference_mode()" in source
    assert "set_current_vllm_config(self.vllm_config)" in source
    assert "self.model_runner.profile_run(randomize_inputs=self.randomize_dummy_inputs)" in source
    for runner in (GPUModelRunner, GPUModelRunnerV2):
        assert "randomize_inputs" in inspect.signature(runner.profile_run).parameters
    assert "get_current_vllm_config_or_none()" in inspect.getsource(fa_utils.get_flash_attn_version)
