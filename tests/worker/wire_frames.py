"""Frames as csrc/wire/frames.h describes them, and a channel that sends them as they are."""

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from vllm_lamina._native import ShmChannel, ShmEnd, create_shm_memory
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.wire.messages import Configure, Configured

STEP, ATTEND, OUTPUT, ZERO_BLOCKS, COPY_BLOCKS, ERROR = range(1, 7)
HEADER = struct.Struct("<IHHQQQII24x")
MAGIC, VERSION = 0x414E4D4C, 2


def frame(
    frame_type: int, payload: bytes, *, generation: int = 0, step: int = 1, lane: int = 0, layer: int = 0
) -> bytes:
    return HEADER.pack(MAGIC, VERSION, frame_type, generation, step, len(payload), lane, layer) + payload


def header(data: bytes) -> dict[str, int]:
    names = ("magic", "version", "type", "generation", "step", "payload_bytes", "lane", "layer")
    return dict(zip(names, HEADER.unpack_from(data), strict=True))


def pad(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)


def int32s(values: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def step_payload(
    num_rows_without_lse: int,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    blocks: Sequence[int],
    slots: Sequence[int],
) -> bytes:
    """STEP's payload. The 64-byte header ends at a multiple of 8, so padding the payload pads the frame."""
    counts = struct.pack("<4I", len(query_lens), num_rows_without_lse, len(slots), len(blocks))
    return pad(counts + int32s(query_lens) + int32s(kv_lens) + int32s(blocks), 8) + struct.pack(
        f"<{len(slots)}q", *slots
    )


def attend_payload(geometry: Geometry, num_q_rows: int, num_tokens: int, fill: bytes = b"\0") -> bytes:
    """ATTEND's payload in float32, of one repeated byte."""
    row = 4 * geometry.caches[0].head_size
    q = fill * (num_q_rows * geometry.layers[0].num_heads * row)
    kv = fill * (num_tokens * geometry.caches[0].num_kv_heads * row)
    return pad(q, 64) + pad(kv, 64) + kv


@contextmanager
def raw_channel(
    connection: AttentionWorkerConnection, geometry: Geometry, num_blocks: int, ring_bytes: int = 1 << 20
) -> Iterator[ShmChannel]:
    """Configure the worker and open its data channel by hand."""
    configured = connection._control.request(Configure(geometry, num_blocks, 0), Configured)
    memory_fd = create_shm_memory(ring_bytes)
    with connection._open_data_socket(configured.token, memory_fd) as data_socket:
        channel = ShmChannel(memory_fd, data_socket.fileno(), ShmEnd.CLIENT, 0)
        try:
            yield channel
        finally:
            channel.close()
            os.close(memory_fd)
