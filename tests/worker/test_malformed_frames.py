"""Frames that are wrong are dropped, counted and answered with an error; nothing brings the worker down."""

import random
import struct

import pytest
from engine import Engine, Request
from wire_frames import (
    ATTEND,
    COPY_BLOCKS,
    ERROR,
    HEADER,
    OUTPUT,
    STEP,
    ZERO_BLOCKS,
    attend_payload,
    frame,
    header,
    int32s,
    raw_channel,
    step_of,
    step_payload,
    step_section,
)
from worker_processes import wait_until

from vllm_lamina._native import ChannelTimeout, ShmChannel
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import CacheSpec, Geometry, LayerSpec
from vllm_lamina.transport.connection import AttentionWorkerConnection

GEOMETRY = Geometry.uniform(2, 32, 4, 2, 32, "float32", (0.125, 0.125))
NUM_BLOCKS = 8
DEADLINE = 10.0
VALID_STEP = step_payload(1, [1, 2], [41, 33], [1, 2, 3, 4], [40, 97, 98, 160, 161, 162])
VALID_ATTEND = attend_payload(GEOMETRY, 3, 6)


def check_alive(channel: ShmChannel) -> None:
    """A valid step still gets its output, past whatever answers came before."""
    channel.send(frame(STEP, VALID_STEP, step=10**6), DEADLINE)
    channel.send(frame(ATTEND, VALID_ATTEND, step=10**6, layer=1), DEADLINE)
    for _ in range(10_000):
        answer = header(channel.receive(DEADLINE))
        if answer["type"] == OUTPUT and answer["step"] == 10**6:
            return
    pytest.fail("no output")


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"", "shorter than its counts"),
        (VALID_STEP[:-1], "size does not fit"),
        (VALID_STEP + b"\0", "size does not fit"),
        (VALID_STEP[:20], "shorter than its counts"),
        (step_of(struct.pack("<6I", 2**32 - 1, 0, 2**32 - 1, 2**32 - 1, 0, 0)), "size does not fit"),
        (step_of(), "another number of groups"),
        (step_of(VALID_STEP[8:], VALID_STEP[8:]), "another number of groups"),
        (struct.pack("<Q", 2**64 - 1), "another number of groups"),
        (step_of(step_section(0, [1], [1], [0], [], ([0], [0]))), "positions for a group that needs none"),
        (step_payload(2, [1], [1], [0], [0]), "more rows without LSE than rows"),
        (step_payload(0, [0], [1], [0], []), "invalid length"),
        (step_payload(0, [-1], [1], [0], []), "invalid length"),
        (step_payload(0, [1], [0], [], [0]), "invalid length"),
        (step_payload(0, [1], [-1], [0], [0]), "invalid length"),
        (step_payload(0, [1], [2**31 - 1], [0], [0]), "too few block ids"),
        (step_payload(0, [1], [33], [0], [0]), "too few block ids"),
        (step_payload(0, [1], [32], [0, 1], [0]), "too many block ids"),
        (step_payload(0, [], [], [0], [0]), "too many block ids"),
        (step_payload(0, [2**31 - 1, 1], [1, 1], [0, 1], []), "too many rows"),
        (step_payload(0, [1], [1], [NUM_BLOCKS], [0]), "a block outside the pool"),
        (step_payload(0, [1], [1], [-1], [0]), "a block outside the pool"),
        (step_payload(0, [1], [1], [0], [32 * NUM_BLOCKS]), "a slot outside the pool"),
        (step_payload(0, [1], [1], [0], [-2]), "a slot outside the pool"),
    ],
)
def test_step(connection: AttentionWorkerConnection, payload: bytes, reason: str) -> None:
    with raw_channel(connection, GEOMETRY, NUM_BLOCKS) as channel:
        channel.send(frame(STEP, payload, generation=5, step=7, lane=3), DEADLINE)
        answer = channel.receive(DEADLINE)
        assert reason in answer[HEADER.size :].decode()
        assert header(answer) | {"payload_bytes": 0} == header(
            frame(ERROR, b"", generation=5, step=7, lane=3)
        )
        assert connection.stats().rejected_frames == 1
        assert connection.stats().steps == 0
        check_alive(channel)


# The first group is plain; the second has a window, so that its section has positions, and a layer that stores nothing.
GROUPS = Geometry(
    (CacheSpec(32, 2, 32, 32, "float32"), CacheSpec(16, 1, 32, 48, "float32")),
    (
        LayerSpec(0, 0, 0, 4, 0.125),
        LayerSpec(1, 1, 0, 2, 0.125, window=20),
        LayerSpec(1, 1, 0, 6, 0.125, stores=False),
    ),
)
PLAIN = step_section(1, [1], [33], [1, 2], [32])


def windowed(
    kv_len: int = 17,
    blocks: tuple[int, ...] = (3, 4),
    slots: tuple[int, ...] = (64,),
    positions: tuple[list[int], list[int]] | None = ([32], [16, 32]),
    query_len: int = 1,
) -> bytes:
    return step_section(1, [query_len], [kv_len], blocks, slots, positions)


VALID_GROUPS = step_of(PLAIN, windowed())
WRONG_GROUPS = [
    (step_of(PLAIN), "another number of groups"),
    (step_of(PLAIN, windowed())[:-8], "size does not fit"),
    (step_of(PLAIN, windowed()) + bytes(8), "size does not fit"),
    (step_of(PLAIN, b""), "shorter than its counts"),
    (step_of(windowed(), PLAIN), "positions for a group that needs none"),
    (step_of(PLAIN, windowed(positions=None)), "or none for one that does"),
    (step_of(PLAIN, windowed(positions=([-1], [16, 32]))), "a position out of range"),
    (step_of(PLAIN, windowed(positions=([2**31 - 1], [16, 32]))), "a position out of range"),
    (step_of(PLAIN, windowed(positions=([2**31 - 8], [16, 32]), query_len=9)), "a position out of range"),
    (step_of(PLAIN, windowed(positions=([32], [-16, 32]))), "positions overlap"),
    (step_of(PLAIN, windowed(positions=([32], [32, 16]))), "positions overlap"),
    (step_of(PLAIN, windowed(positions=([32], [16, 31]))), "positions overlap"),
    (step_of(PLAIN, windowed(positions=([31], [16, 32]))), "tokens behind their query"),
    (step_of(PLAIN, windowed(positions=([2**30], [16, 2**31 - 1]))), "tokens behind their query"),
    (step_of(PLAIN, windowed(kv_len=33)), "too few block ids"),
    (step_of(PLAIN, windowed(blocks=(3, NUM_BLOCKS))), "a block outside the pool"),
    (step_of(PLAIN, windowed(slots=(16 * NUM_BLOCKS,))), "a slot outside the pool"),
]


def test_steps_of_several_groups(connection: AttentionWorkerConnection) -> None:
    with raw_channel(connection, GROUPS, NUM_BLOCKS) as channel:

        def refused(data: bytes) -> str:
            channel.send(data, DEADLINE)
            answer = channel.receive(DEADLINE)
            assert header(answer)["type"] == ERROR
            return answer[HEADER.size :].decode()

        for payload, reason in WRONG_GROUPS:
            assert reason in refused(frame(STEP, payload))
            # Nothing is left of the groups that were good.
            assert "lane 0 is not in" in refused(frame(ATTEND, attend_payload(GROUPS, 1, 1)))
        channel.send(frame(STEP, VALID_GROUPS), DEADLINE)
        for layer, num_tokens in enumerate((1, 1, 0)):
            payload = attend_payload(GROUPS, 1, num_tokens, layer=layer)
            channel.send(frame(ATTEND, payload, layer=layer), DEADLINE)
            out_bytes = GROUPS.to_native().row_bytes(layer)[3]
            assert header(channel.receive(DEADLINE))["payload_bytes"] == -(-out_bytes // 64) * 64
        # The last layer shares its KV, and takes no k and v.
        payload = attend_payload(GROUPS, 1, 1, layer=1)
        assert "size does not fit its step" in refused(frame(ATTEND, payload, layer=2))


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (frame(ATTEND, VALID_ATTEND, step=2), "step 2, which lane 0 is not in"),
        (frame(ATTEND, VALID_ATTEND, generation=1), "which lane 0 is not in"),
        (frame(ATTEND, VALID_ATTEND, lane=1), "which lane 1 is not in"),
        (frame(ATTEND, VALID_ATTEND, lane=8), "lane 8 does not exist"),
        (frame(ATTEND, VALID_ATTEND, layer=2), "layer 2 does not exist"),
        (frame(ATTEND, VALID_ATTEND[:-4]), "size does not fit its step"),
        (frame(OUTPUT, b""), "type 3, which an attention worker does not take"),
        (frame(ZERO_BLOCKS, int32s([NUM_BLOCKS])), "block 8 is outside the pool"),
        (frame(ZERO_BLOCKS, b"\0\0\0"), "cut off"),
        (frame(COPY_BLOCKS, int32s([0, -1])), "block -1 is outside the pool"),
        (frame(COPY_BLOCKS, int32s([0, 1, 2])), "without a destination"),
    ],
)
def test_frames_after_a_valid_step(connection: AttentionWorkerConnection, attend: bytes, reason: str) -> None:
    with raw_channel(connection, GEOMETRY, NUM_BLOCKS) as channel:
        channel.send(frame(STEP, VALID_STEP), DEADLINE)
        channel.send(attend, DEADLINE)
        answer = channel.receive(DEADLINE)
        assert header(answer)["type"] == ERROR
        assert reason in answer[HEADER.size :].decode()
        check_alive(channel)


@pytest.mark.parametrize(
    "data",
    [b"", b"short", bytes(64), frame(STEP, VALID_STEP)[:-8], b"LMNA\1\0" + frame(STEP, VALID_STEP)[6:]],
)
def test_without_a_valid_header_there_is_no_answer(
    connection: AttentionWorkerConnection, data: bytes
) -> None:
    with raw_channel(connection, GEOMETRY, NUM_BLOCKS) as channel:
        channel.send(data or b"\0", DEADLINE)
        with pytest.raises(ChannelTimeout):
            channel.receive(0.2)
        wait_until(lambda: connection.stats().rejected_frames == 1)
        check_alive(channel)


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Change bits, bytes or words, or the length; rarely the magic number, or nothing else would be tried."""
    if rng.random() < 0.1:
        return data[: rng.randrange(1, len(data))] if rng.random() < 0.5 else data + rng.randbytes(64)
    mutated = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        position = rng.randrange(6 if rng.random() < 0.95 else 0, len(mutated) - 4)
        match rng.randrange(3):
            case 0:
                mutated[position] ^= 1 << rng.randrange(8)
            case 1:
                mutated[position] = rng.randrange(256)
            case _:
                value = rng.choice([0, 1, 2, 7, 8, 31, 255, 2**31 - 1, 2**31, 2**32 - 1])
                struct.pack_into("<I", mutated, max(8, position & ~3), value)
    return bytes(mutated)


@pytest.mark.parametrize("seed", range(4))
def test_random_mutations(
    worker: EmbeddedAttentionWorker, connection: AttentionWorkerConnection, seed: int
) -> None:
    rng = random.Random(seed)
    valid = [
        frame(STEP, VALID_STEP),
        frame(ATTEND, VALID_ATTEND),
        frame(ATTEND, VALID_ATTEND, layer=1),
        frame(ZERO_BLOCKS, int32s([3, 4])),
        frame(COPY_BLOCKS, int32s([1, 2, 2, 3])),
    ]
    with raw_channel(connection, GEOMETRY, NUM_BLOCKS) as channel:
        for i in range(3000):
            if rng.random() < 0.2:
                channel.send(valid[0], DEADLINE)
            channel.send(mutate(rng, rng.choice(valid)), DEADLINE)
            if i % 20 == 19:
                drain(channel)
        check_alive(channel)
        assert connection.stats().rejected_frames > 1000
    assert worker.poll() is None


def drain(channel: ShmChannel) -> None:
    try:
        while True:
            channel.receive(0.0)
    except ChannelTimeout:
        pass


def test_flood_without_collecting(
    worker: EmbeddedAttentionWorker, connection: AttentionWorkerConnection
) -> None:
    """Errors that nobody collects do not stop the worker from taking frames."""
    with raw_channel(connection, GEOMETRY, NUM_BLOCKS) as channel:
        for _ in range(2000):
            channel.send(frame(STEP, b""), DEADLINE)
        check_alive(channel)
        assert connection.stats().rejected_frames == 2000


def test_frames_may_claim_any_generation_and_step(connection: AttentionWorkerConnection) -> None:
    with raw_channel(connection, GEOMETRY, NUM_BLOCKS) as channel:
        for number in (0, 1, 2**63, 2**64 - 1):
            channel.send(frame(STEP, VALID_STEP, generation=number, step=number, lane=7), DEADLINE)
            channel.send(frame(ATTEND, VALID_ATTEND, generation=number, step=number, lane=7), DEADLINE)
            answer = header(channel.receive(DEADLINE))
            assert (answer["type"], answer["generation"], answer["step"]) == (OUTPUT, number, number)


def test_the_next_engine_is_not_affected(connection: AttentionWorkerConnection) -> None:
    with raw_channel(connection, GEOMETRY, NUM_BLOCKS) as channel:
        channel.send(b"rubbish", DEADLINE)
    connection.configure(GEOMETRY, NUM_BLOCKS)
    assert connection.stats().rejected_frames == 0
    Engine.on(connection, GEOMETRY, NUM_BLOCKS).step(0, [Request(0, 40, [1, 2])])
