"""CUDA graphs, played on streams of the CPU: what was captured is done again, with the same tensors and numbers."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

THREAD = threading.local()
"""Of a thread: its current ``stream``, and the ``graph`` that it captures."""

_ONE_OPERATOR = threading.Lock()
"""vLLM's linear layers on a CPU have buffers, a layer one set: two threads in one spoil each other's rows."""

_OWNERS: dict[Any, set[Any]] = {}
"""By memory pool: the streams whose graphs it is for."""


class CpuGraph:
    """See ``torch.cuda.CUDAGraph``: operations that a stream repeats. No Python of the model's is run again."""

    def __init__(self) -> None:
        self.operations: list[Callable[[], None]] = []
        self.streams: set[Any] = set()
        """Whose words it writes and waits for."""

    def replay(self) -> None:
        """On the current stream."""
        assert self.streams <= {THREAD.stream}, "a lane replays another lane's graph"
        THREAD.stream.replay(self.operations)


def captured() -> CpuGraph | None:
    """The graph that the calling thread captures."""
    return getattr(THREAD, "graph", None)


@contextlib.contextmanager
def capture(graph: CpuGraph, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """See ``torch.cuda.graph``: what the calling thread enqueues goes to the graph, and PyTorch's operators too."""
    THREAD.graph = graph
    try:
        with _Recorder(graph):
            yield
    finally:
        THREAD.graph = None
    if pool is not None:
        owner = _OWNERS.setdefault(pool, graph.streams)
        assert owner == graph.streams, "graphs of two lanes have memory in common, and run at the same time"


class _Recorder(TorchDispatchMode):
    """Records operators with their tensors. They run as well, for the shapes that come out."""

    def __init__(self, graph: CpuGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "vllm":  # written in Python, which is not run again; what it calls is recorded
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        assert torch.Tag.data_dependent_output not in func.tags, f"no graph can capture {func}"
        result = func(*args, **kwargs)
        inputs = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        fresh = [t.untyped_storage().data_ptr() not in inputs for t in _tensors(result)]
        if any(fresh) or func._schema.is_mutable:

            def run() -> None:
                with _ONE_OPERATOR:
                    again = func(*args, **kwargs)
                for is_fresh, target, value in zip(fresh, _tensors(result), _tensors(again), strict=True):
                    if is_fresh:
                        target.copy_(value)

            self._graph.operations.append(run)
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


CAPTURED_SIZES = [2, 4]


def use_graphs() -> None:
    """For engines on streams, on vLLM's V2 runner: steps of decodes are captured, as it captures them on a GPU."""
    from vllm import _custom_ops
    from vllm.config import CUDAGraphMode
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker import workspace
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.gpu import cudagraph_utils

    cuda: Any = torch.cuda
    cuda.CUDAGraph, cuda.graph = CpuGraph, capture
    accelerator: Any = torch.accelerator
    accelerator.empty_cache, accelerator.get_memory_info = lambda: None, lambda: (0, 0)
    cudagraph_utils.graph_capture = lambda device: contextlib.nullcontext()
    CpuPlatform.graph_pool_handle = itertools.count().__next__
    linear = _custom_ops.onednn_mm

    def linear_alone(*args: Any) -> torch.Tensor:
        with _ONE_OPERATOR:
            return linear(*args)

    _custom_ops.onednn_mm = linear_alone
    initialize, warm_up = CPUWorker.initialize_from_config, CPUWorker.compile_or_warm_up_model

    def initialize_with_graphs(worker: CPUWorker, kv_cache_config: Any) -> None:
        workspace.init_workspace_manager(worker.device)
        compilation = worker.vllm_config.compilation_config
        compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
        compilation.cudagraph_capture_sizes = CAPTURED_SIZES
        compilation.max_cudagraph_capture_size = max(CAPTURED_SIZES)
        initialize(worker, kv_cache_config)

    def warm_up_and_capture(worker: CPUWorker) -> Any:
        times = warm_up(worker)
        worker.model_runner.capture_model()
        return times

    CPUWorker.initialize_from_config = initialize_with_graphs
    CPUWorker.compile_or_warm_up_model = warm_up_and_capture
