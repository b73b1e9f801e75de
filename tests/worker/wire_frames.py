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
MAGIC, VERSION = 0x414E4D4C, 3


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
    """STEP's payload for a model of one group without positions."""
    return step_of(step_section(num_rows_without_lse, query_lens, kv_lens, blocks, slots))


def step_of(*sections: bytes) -> bytes:
    """STEP's payload. The 64-byte header ends at a multiple of 8, so padding the payload pads the frame."""
    return struct.pack("<Q", len(sections)) + b"".join(sections)


def step_section(
    num_rows_without_lse: int,
    query_lens: Sequence[int],
    kv_lens: Sequence[int],
    blocks: Sequence[int],
    slots: Sequence[int],
    positions: tuple[Sequence[int], Sequence[int]] | None = None,
) -> bytes:
    """What a STEP says of one group; ``positions`` are those of the requests and those of the blocks."""
    numbers = (len(query_lens), num_rows_without_lse, len(slots), len(blocks), int(positions is not None), 0)
    lists = (query_lens, kv_lens, blocks, *(positions or ()))
    section = struct.pack("<6I", *numbers) + b"".join(int32s(values) for values in lists)
    return pad(section, 8) + struct.pack(f"<{len(slots)}q", *slots)


def requests_of(payload: bytes) -> list[int]:
    """Of a STEP's payload: how many requests attend in each group."""
    counts, at = [], 8
    for _ in range(struct.unpack_from("<Q", payload)[0]):
        requests, _, tokens, blocks, has_positions, _ = struct.unpack_from("<6I", payload, at)
        numbers = 2 * requests + blocks + has_positions * (requests + blocks)
        at += 24 + 8 * (-(-numbers // 2) + tokens)
        counts.append(requests)
    return counts


def attend_payload(
    geometry: Geometry, num_q_rows: int, num_tokens: int, fill: bytes = b"\0", layer: int = 0
) -> bytes:
    """ATTEND's payload of one repeated byte."""
    q, k, v, _, _ = geometry.to_native().row_bytes(layer)
    return pad(fill * (num_q_rows * q), 64) + pad(fill * (num_tokens * k), 64) + fill * (num_tokens * v)


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
