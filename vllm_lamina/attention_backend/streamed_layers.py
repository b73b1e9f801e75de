"""A layer's exchange where a device works beside the host: all of it is enqueued on the lane's stream.

The host runs ahead and waits for nothing but, at the end of a step, for its last reply. Streams and attention workers
speak through words and frames in memory that both reach, see csrc/worker/model_worker/streamed_exchange.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from vllm_lamina._native import AttentionClient, Channel, StreamedExchange
from vllm_lamina.attention_backend.frame_tables import FRAMES, FrameTables
from vllm_lamina.compat.workspaces import add_workspace, use_workspace
from vllm_lamina.config import HEAD
from vllm_lamina.device.frame_descriptor import POISON
from vllm_lamina.errors import LaminaError

if TYPE_CHECKING:
    from vllm_lamina.attention_backend.step import Step
    from vllm_lamina.device.base import LocalAttention, Streams
    from vllm_lamina.kv_cache.geometry import Geometry
    from vllm_lamina.kv_cache.partition import Partition


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
        self._lanes[lane].attend(step, layer, query, key, value, output, attend_locally)

    def attend_latent(self, *args: object) -> None:
        raise LaminaError(
            "Latent caches are refused before streams exchange them."
        )  # by their layers, see `support`

    def capture(
        self,
        lane: int,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
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
            lane.tables.find_frames()

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
        self.tables = FrameTables(exchange, lane, streams, partition, max_tokens)
        self._streams = streams
        self._packed, self._taken, self._free, self._replied, _ = exchange.words(lane)
        self._num_workers = len(partition.shares)
        # Whether each of them answers every decode.
        self._decodes_answer_all = self._num_workers == 1 or partition.kind == HEAD
        most_heads = max(layer.num_heads for layer in partition.geometry.layers)
        self._local_lse, _ = streams.tensor((max_tokens, most_heads), torch.float32)

    def compile_kernels(self) -> None:
        """Launch each once, over nothing: compiling takes seconds, and a step has a time limit."""
        kinds = {
            (frames, self.tables.sinks[layer] is None): layer
            for layer, frames in enumerate(self.tables.frames)
        }
        for layer in kinds.values():
            frames, cache = self.tables.frames[layer], self.tables.frames[layer].cache
            (q, _), (k, _), (v, _), (out, _) = (
                self._streams.tensor((1, heads, size), frames.dtype)
                for heads, size in (
                    (frames.layout.num_heads, cache.head_size),
                    (cache.num_kv_heads, cache.head_size),
                    (cache.num_kv_heads, cache.head_size_v),
                    (frames.layout.num_heads, cache.head_size_v),
                )
            )
            self.stream.run(partial(self._launch_pack, layer, q, k, v, [(1, 1)] * self._num_workers))
            local = self.tables.is_in_chunk[:1], self._local_lse[:1, : frames.layout.num_heads]
            self.stream.run(partial(self._launch_take, layer, out))
            self.stream.run(partial(self._launch_take, layer, out, *local))
        self.stream.synchronize()

    def prepare(self, step: Step) -> None:
        """Bring the step's tables to the device."""
        self.tables.fill(step)
        self.stream.run(self.tables.copy)

    def prepare_nothing(self) -> None:
        """Let layers run without a step: nothing is packed, no word is waited for, and the output is zeros."""
        self.tables.fill_with_nothing()
        for word in (self._free, self._replied):
            ctypes.c_int32.from_address(word).value = POISON
        self.stream.run(self.tables.copy)

    def attend(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
        attend_locally: LocalAttention,
    ) -> None:
        frames = self.tables.frames[layer]
        # In the first places there may still be what an earlier step sent and nobody answered.
        waits = layer < FRAMES or not self.tables.frames[layer - FRAMES].is_answered_by_all
        self._pack(layer, query, key, value, frames.rows, waits)
        local: tuple[torch.Tensor, ...] = ()
        if step.has_chunks:
            chunks = slice(step.first_chunk_token, step.num_tokens)
            local_out, lse = attend_locally(query[chunks], *step.keep(layer, key, value), step.chunks)
            output[chunks] = local_out
            local_lse = self._local_lse[: step.num_tokens, : frames.layout.num_heads]
            local_lse[chunks] = lse
            local = (self.tables.is_in_chunk[: step.num_tokens], local_lse)
        if frames.is_answered:
            self._take(layer, output, *local)
        self.stream.fence()

    def capture(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        """What `attend` does in any step of decodes that has at most so many rows; how many, the tables say."""
        rows = [(len(query), len(query))] * self._num_workers
        self._pack(layer, query, key, value, rows, layer < FRAMES or not self._decodes_answer_all)
        self._take(layer, output)
        self.stream.fence()

    def _pack(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        rows: Sequence[tuple[int, int]],
        waits: bool,
    ) -> None:
        """Send each worker its rows of q, and of k and v: as many as there are, or more."""
        if waits:
            self.stream.wait(self._free, layer + 1)
        self.stream.run(lambda: self._launch_pack(layer, query, key, value, rows))
        self.stream.write(self._packed, layer + 1)

    def _launch_pack(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        rows: Sequence[tuple[int, int]],
    ) -> None:
        frames = self.tables.frames[layer]
        if not frames.layout.stores:
            key = value = None
        descriptors = frames.descriptors[layer % FRAMES]
        for worker, (heads, (num_q, num_kv)) in enumerate(zip(frames.heads, rows, strict=True)):
            if num_q or num_kv:
                q_tokens, kv_tokens = frames.q_tokens[worker, :num_q], frames.kv_tokens[worker, :num_kv]
                self._streams.pack(query, key, value, q_tokens, kv_tokens, descriptors[worker], heads)

    def _take(self, layer: int, output: torch.Tensor, *local: torch.Tensor) -> None:
        """Merge the replies with what is ``local``, if there is any."""
        self.stream.wait(self._replied, layer + 1)
        self.stream.run(lambda: self._launch_take(layer, output, *local))
        self.stream.write(self._taken, layer + 1)

    def _launch_take(
        self,
        layer: int,
        output: torch.Tensor,
        local: torch.Tensor | None = None,
        local_lse: torch.Tensor | None = None,
    ) -> None:
        frames = self.tables.frames[layer]
        replies = (frames.head_ranges, frames.descriptors[layer % FRAMES], self.tables.replies)
        index = frames.index[:, : len(output)]
        self._streams.take(output, index, *replies, local, local_lse, self.tables.sinks[layer])
