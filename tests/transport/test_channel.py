"""What every channel does: sizes, wrap and rewind, flow control, deadlines, closing."""

import random
import threading
import time
from collections.abc import Iterator

import pytest
from channel_pairs import DEADLINE, RING_BYTES, Pair, echo_until_closed, shm_pair, ucx_pair

from vllm_lamina._native import ChannelClosed, ChannelTimeout, FrameTooLarge


@pytest.fixture(params=["shm", "ucx"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    with shm_pair() if request.param == "shm" else ucx_pair() as pair:
        yield pair


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4096, RING_BYTES - 64, RING_BYTES - 1, RING_BYTES])
def test_round_trip(pair: Pair, size: int) -> None:
    payload = random.Random(size).randbytes(size)
    for _ in range(3):
        pair.client.send(payload, DEADLINE)
        assert pair.worker.receive(DEADLINE) == payload
        pair.worker.send(payload[::-1], DEADLINE)
        assert pair.client.receive(DEADLINE) == payload[::-1]


def test_frame_too_large_names_the_limit(pair: Pair) -> None:
    with pytest.raises(
        FrameTooLarge, match=f"{RING_BYTES + 1} bytes .* {RING_BYTES} bytes; raise ring_bytes"
    ):
        pair.client.send(bytes(RING_BYTES + 1), DEADLINE)
    pair.client.send(b"fits", DEADLINE)
    assert pair.worker.receive(DEADLINE) == b"fits"


def test_order_is_kept_wherever_frames_lie(pair: Pair) -> None:
    """Frames of all sizes, up to several in flight, so that room opens at odd places of the ring."""
    rng = random.Random(1)
    waiting: list[bytes] = []
    for _ in range(5000):
        if waiting and (rng.random() < 0.5 or sum(len(frame) + 64 for frame in waiting) > RING_BYTES // 3):
            assert pair.worker.receive(DEADLINE) == waiting.pop(0)
        else:
            waiting.append(rng.randbytes(rng.choice([1, 64, 100, 5000, 20000])))
            pair.client.send(waiting[-1], DEADLINE)
    for frame in waiting:
        assert pair.worker.receive(DEADLINE) == frame


def test_sender_waits_for_room(pair: Pair) -> None:
    """More than the ring holds, to a receiver that starts late."""
    frames = [random.Random(i).randbytes(30000) for i in range(20)]

    def send_all() -> None:
        for frame in frames:
            pair.client.send(frame, DEADLINE)

    sender = threading.Thread(target=send_all)
    sender.start()
    time.sleep(0.1)
    assert [pair.worker.receive(DEADLINE) for _ in frames] == frames
    sender.join(DEADLINE)
    assert not sender.is_alive()


def test_deadlines(pair: Pair) -> None:
    begin = time.monotonic()
    with pytest.raises(ChannelTimeout):
        pair.client.receive(0.1)
    pair.client.send(bytes(40000), DEADLINE)
    with pytest.raises(ChannelTimeout):
        pair.client.send(bytes(40000), 0.1)
    assert 0.19 < time.monotonic() - begin < 60.0
    assert pair.worker.receive(DEADLINE) == bytes(40000)


def test_frames_sent_before_closing_are_delivered(pair: Pair) -> None:
    pair.client.send(b"last words", DEADLINE)
    pair.client.close()
    assert pair.worker.receive(DEADLINE) == b"last words"
    with pytest.raises(ChannelClosed):
        pair.worker.receive(DEADLINE)
    assert pair.worker.peer_closed


def test_closing_ends_a_wait_of_the_same_end(pair: Pair) -> None:
    closer = threading.Timer(0.1, pair.client.close)
    closer.start()
    with pytest.raises(ChannelClosed):
        pair.client.receive(60.0)
    closer.join()


def test_one_thread_sends_while_another_receives(pair: Pair) -> None:
    frames = [random.Random(i).randbytes(1 + i * 37 % 20000) for i in range(400)]
    echo = threading.Thread(target=echo_until_closed, args=(pair.worker,))
    echo.start()

    def send_all() -> None:
        for frame in frames:
            pair.client.send(frame, DEADLINE)

    sender = threading.Thread(target=send_all)
    sender.start()
    assert [pair.client.receive(DEADLINE) for _ in frames] == frames
    sender.join(DEADLINE)
    pair.client.close()
    echo.join(DEADLINE)
    assert not sender.is_alive()
    assert not echo.is_alive()
