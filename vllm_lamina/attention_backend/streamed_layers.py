"""A layer's exchange where a device works beside the host: all of it is enqueued on the lane's stream.

The host runs ahead and waits for nothing but, at the end of a step, for its last reply. Streams and attention workers
speak through words and frames in memory that both reach, see csrc/worker/model_worker/streamed_exchange.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from vllm_lamina._native import AttentionClient, Channel, StreamedExchange
from vllm_lamina.compat.workspaces import add_workspace, use_workspace
from vllm_lamina.config import HEAD
from vllm_lamina.device.frame_descriptor import POISON, FrameDescriptor, Heads
from vllm_lamina.errors import LaminaError, UnsupportedError
from vllm_lamina.kv_cache.geometry import LayerSpec
from vllm_lamina.support import WITHOUT_LAMINA

if TYPE_CHECKING:
    from vllm_lamina.attention_backend.step import Step
    from vllm_lamina.device.base import LocalAttention, Streams
    from vllm_lamina.kv_cache.geometry import Geometry
    from vllm_lamina.kv_cache.partition import Partition

FRAMES = 2
"""Places for the frames of a lane: layers take them in turn (``kFrames``)."""


def check_geometry(geometry: Geometry) -> None:
    """Refuse what the kernels of the exchange do not serve.

    Raises
    ------
    UnsupportedError
        The layers are not all alike, or attend otherwise than over the whole context.
    """
    first = geometry.layers[0]
    plain = LayerSpec(0, 0, 0, first.num_heads, 1.0)
    alike = all(
        msgspec.structs.replace(layer, position=0, scale=1.0, soft_cap=0.0, alibi_slopes=()) == plain
        for layer in geometry.layers
    )
    if (
        not alike
        or geometry.has_latent_cache
        or geometry.caches[0].head_size != geometry.caches[0].head_size_v
    ):
        raise UnsupportedError(
            "Lamina on a GPU does not support models whose attention layers differ in shape, share their KV cache, or "
            f"have a sliding window, a chunk size or sinks: run the model worker on CPUs, or {WITHOUT_LAMINA}."
        )


def memory_bytes(geometry: Geometry, num_lanes: int, max_tokens: int) -> int:
    """What the lanes' frames add to the ring of a worker with this geometry."""
    num_bytes: int = StreamedExchange.memory_bytes(geometry.to_native(), num_lanes, max_tokens)
    return num_bytes


class StreamedLayers:
    """See `Layers`."""

    def __init__(
        self,
        client: AttentionClient,
        streams: Streams,
        partition: Partition,
        num_lanes: int,
        max_tokens: int,
        spin_us: int | None,
        timeout: float,
    ) -> None:
        self._client = client
        self._streams = streams
        self._exchange = StreamedExchange(client, num_lanes, max_tokens, spin_us)
        self._exchange.set_timeout(timeout)
        self._timeout = timeout
        self._register()
        self._lanes = [
            _Lane(self._exchange, lane, streams, partition, max_tokens) for lane in range(num_lanes)
        ]
        self._lanes[0].compile_kernels()
        for _ in range(1, num_lanes):
            add_workspace()

    def enter(self, lane: int) -> None:
        self._lanes[lane].stream.enter()
        use_workspace(lane)

    def announce(self, lane: int) -> None:
        self._client.join_turn(lane)
        self._exchange.announce(lane)

    def begin(self, lane: int) -> None:
        # A request may come from another lane, whose stream wrote what is known of it.
        for other in self._lanes:
            if other.mark is not None and other is not self._lanes[lane]:
                self._lanes[lane].stream.wait_for(other.mark)

    def end(self, lane: int) -> None:
        self._lanes[lane].mark = self._lanes[lane].stream.mark()

    def synchronize(self, lane: int) -> None:
        self._lanes[lane].stream.synchronize()

    def prepare(self, lane: int, step: Step | None) -> None:
        if step is None:
            self._lanes[lane].prepare_nothing()
        elif step.send_once(self._exchange, lane, self._timeout):
            self._lanes[lane].prepare(step)

    def attend(
        self,
        lane: int,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
        attend_locally: LocalAttention,
    ) -> None:
        assert key is not None
        assert value is not None
        self._lanes[lane].attend(step, layer, query, key, value, output, attend_locally)

    def attend_latent(self, *args: object) -> None:
        raise LaminaError("Latent caches are refused before streams exchange them.")  # by check_geometry

    def capture(
        self,
        lane: int,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        self._lanes[lane].capture(layer, query, key, value, output)

    def wait(self, lane: int) -> None:
        self._lanes[lane].failure = self._exchange.finish_step(lane, self._timeout)

    def take_failure(self, lane: int) -> str | None:
        failure = self._lanes[lane].failure
        if failure is None:
            return None
        # Frames and replies may lie in memory that is given back next.
        self._lanes[lane].stream.synchronize()
        if not self._client.failed_workers:
            raise LaminaError(failure)
        return failure

    def replace_channel(self, worker: int, channel: Channel) -> None:
        """Give a worker's part to whoever serves ``channel``. No lane may be in a step."""
        self._streams.register([])  # before the old channel's memory is gone
        self._exchange.replace_channel(worker, channel)
        self._register()
        for lane in self._lanes:
            lane.find_frames()

    def _register(self) -> None:
        self._streams.register(self._exchange.memories)


class _Lane:
    """One lane's stream, and its tables on the device: see `exchange_kernels`."""

    def __init__(
        self,
        exchange: StreamedExchange,
        lane: int,
        streams: Streams,
        partition: Partition,
        max_tokens: int,
    ) -> None:
        self.stream = streams.stream(lane)
        self.failure: str | None = None
        """Why the last step failed, if it did."""
        self.mark: Any = None
        """Where on the stream the last step ended."""
        self._exchange, self._lane, self._streams = exchange, lane, streams
        self._layer, self._cache = partition.geometry.layers[0], partition.geometry.caches[0]
        self._packed, self._taken, self._free, self._replied, replies = exchange.words(lane)
        workers = len(partition.shares)
        self._heads = _heads(partition)
        # Whether each of them answers every decode.
        self._decodes_answer_all = workers == 1 or partition.kind == HEAD
        self._replies = torch.frombuffer((ctypes.c_int64 * workers).from_address(replies), dtype=torch.int64)
        heads = torch.tensor([(heads.first_q, heads.num_q) for heads in self._heads], dtype=torch.int32)
        self._head_ranges, host = streams.tensor((workers, 2), torch.int32)
        host.copy_(heads)
        self._head_ranges.copy_(host)
        # What differs from step to step: by worker, q tokens, kv tokens and the tokens' rows in the reply; then which
        # tokens are in prefill chunks.
        self._tables, self._tables_on_host = streams.tensor((3 * workers + 1, max_tokens), torch.int32)
        shape = (FRAMES, workers, len(FrameDescriptor._fields))
        self._descriptors, self._descriptors_on_host = streams.tensor(shape, torch.int64)
        self._local_lse, _ = streams.tensor((max_tokens, self._layer.num_heads), torch.float32)
        self._rows: list[tuple[int, int]] = []
        self.find_frames()

    def find_frames(self) -> None:
        """Ask where the frames' payloads are."""
        self._payloads = [
            [self._exchange.payload(self._lane, worker, place) for worker in range(len(self._heads))]
            for place in range(FRAMES)
        ]

    def compile_kernels(self) -> None:
        """Launch each once, over nothing: compiling takes seconds, and a step has a time limit."""
        num_heads, size = self._layer.num_heads, self._cache.head_size
        dtype = getattr(torch, self._cache.dtype)
        q, _ = self._streams.tensor((1, num_heads, size), dtype)
        kv, _ = self._streams.tensor((1, self._cache.num_kv_heads, size), dtype)
        one, index = self._tables[0, :1], self._tables[: len(self._heads), :1]

        def launch() -> None:
            for heads, descriptor in zip(self._heads, self._descriptors[0], strict=True):
                self._streams.pack(q, kv, kv, one, one, descriptor, heads)
            taken = (q, index, self._head_ranges, self._descriptors[0], self._replies)
            self._streams.take(*taken)
            self._streams.take(*taken, one, self._local_lse[:1])

        self.stream.run(launch)
        self.stream.synchronize()

    def prepare(self, step: Step) -> None:
        """Bring the step's tables to the device. The lane's step before is over, so nobody reads the old ones."""
        num_tokens, workers = step.num_tokens, len(self._heads)
        tables = self._tables_on_host.numpy()
        index = tables[2 * workers : 3 * workers]
        index[:] = -1  # also of the rows with which a captured step is padded
        self._rows = []
        for worker, heads in enumerate(self._heads):
            q_tokens, kv_tokens, rows_without_lse = self._exchange.part(self._lane, worker)
            num_q, num_kv = len(q_tokens), len(kv_tokens)
            tables[worker, :num_q] = q_tokens
            tables[workers + worker, :num_kv] = kv_tokens
            index[worker, q_tokens] = np.arange(num_q)
            self._rows.append((num_q, num_kv))
            size, dtype = self._cache.head_size, getattr(torch, self._cache.dtype)
            for place in range(FRAMES):
                payload = self._payloads[place][worker]
                FrameDescriptor.of(
                    payload, num_q, num_kv, rows_without_lse, heads, (size, size), dtype
                ).write(self._descriptors_on_host[place, worker])
        tables[3 * workers, :num_tokens] = np.arange(num_tokens) >= step.first_chunk_token
        # Where every frame is answered, the reply says that its place is free again.
        self._answers_all = all(num_q > 0 for num_q, _ in self._rows)
        self._answers = any(num_q > 0 for num_q, _ in self._rows)
        self.stream.run(self._copy_tables)

    def prepare_nothing(self) -> None:
        """Let layers run without a step: nothing is packed, no word is waited for, and the output is zeros."""
        workers = len(self._heads)
        self._tables_on_host[2 * workers : 3 * workers] = -1
        self._descriptors_on_host.zero_()
        self._replies.zero_()
        for word in (self._free, self._replied):
            ctypes.c_int32.from_address(word).value = POISON
        self.stream.run(self._copy_tables)

    def _copy_tables(self) -> None:
        self._tables.copy_(self._tables_on_host, non_blocking=True)
        self._descriptors.copy_(self._descriptors_on_host, non_blocking=True)

    def attend(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        attend_locally: LocalAttention,
    ) -> None:
        self._pack(layer, query, key, value, self._rows, self._answers_all)
        local: tuple[torch.Tensor, ...] = ()
        if step.has_chunks:
            chunks = slice(step.first_chunk_token, step.num_tokens)
            local_out, local_lse = attend_locally(query[chunks], key[chunks], value[chunks], step.chunks)
            output[chunks] = local_out
            self._local_lse[chunks] = local_lse
            is_local = self._tables[3 * len(self._heads), : step.num_tokens]
            local = (is_local, self._local_lse[: step.num_tokens])
        if self._answers:
            self._take(layer, output, *local)
        self.stream.fence()

    def capture(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """What `attend` does in any step of decodes that has at most so many rows; how many, the tables say."""
        rows = [(len(query), len(query))] * len(self._heads)
        self._pack(layer, query, key, value, rows, self._decodes_answer_all)
        self._take(layer, output)
        self.stream.fence()

    def _pack(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: Sequence[tuple[int, int]],
        answers_all: bool,
    ) -> None:
        """Send each worker its rows of q, and of k and v: as many as there are, or more."""
        descriptors, workers = self._descriptors[layer % FRAMES], len(self._heads)
        if layer < FRAMES or not answers_all:
            # In the first places there may still be what an earlier step sent and nobody answered.
            self.stream.wait(self._free, layer + 1)

        def pack() -> None:
            for worker, (heads, (num_q, num_kv)) in enumerate(zip(self._heads, rows, strict=True)):
                if num_q or num_kv:
                    q_tokens = self._tables[worker, :num_q]
                    kv_tokens = self._tables[workers + worker, :num_kv]
                    self._streams.pack(query, key, value, q_tokens, kv_tokens, descriptors[worker], heads)

        self.stream.run(pack)
        self.stream.write(self._packed, layer + 1)

    def _take(self, layer: int, output: torch.Tensor, *local: torch.Tensor) -> None:
        """Merge the replies with what is ``local``, if there is any."""
        workers = len(self._heads)
        index = self._tables[2 * workers : 3 * workers, : len(output)]
        replies = (self._head_ranges, self._descriptors[layer % FRAMES], self._replies)
        self.stream.wait(self._replied, layer + 1)
        self.stream.run(lambda: self._streams.take(output, index, *replies, *local))
        self.stream.write(self._taken, layer + 1)


def _heads(partition: Partition) -> Sequence[Heads]:
    heads, first_q, first_kv = [], 0, 0
    for share in partition.shares:
        num_q, num_kv = share.geometry.layers[0].num_heads, share.geometry.caches[0].num_kv_heads
        heads.append(Heads(first_q, num_q, first_kv, num_kv))
        if num_kv < partition.geometry.caches[0].num_kv_heads:
            first_q += num_q
            first_kv += num_kv
    return heads
