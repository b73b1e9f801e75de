"""An attention worker whose channel the test has in its hands: what it gets, and what arrives of it."""

from __future__ import annotations

import os
import socket
from collections import deque

from wire_frames import ATTEND, HEADER, STEP, header, requests_of
from worker_processes import DEADLINE

from vllm_lamina._native import AttentionWorker, ChannelTimeout, ShmChannel, ShmEnd, create_shm_memory
from vllm_lamina.kv_cache.partition import Share


class HeldWorker:
    """An attention worker that gets a frame, and whose reply arrives, when the test says so."""

    def __init__(self, share: Share, ring_bytes: int) -> None:
        self.channel, self._model_end = _channel(ring_bytes)
        self._worker_end, served = _channel(ring_bytes)
        self._replies: deque[bytes] = deque()
        self._has_left = False
        self._groups = [layer.group for layer in share.geometry.layers]
        self._requests: dict[int, list[int]] = {}
        """By lane, in the step: how many requests it attends in each group of layers."""
        self._native = AttentionWorker(share.geometry.to_native(), share.num_blocks, 1, [], 0)
        self._native.serve(served)

    def take_frame(self) -> bool:
        """Have the oldest frame read where it lies, given back, and served. False without one."""
        if self._has_left:
            return False
        try:
            frame = self._model_end.receive(0.0)
        except ChannelTimeout:
            return False
        self._worker_end.send(frame, DEADLINE)
        fields = header(frame)
        if fields["type"] == STEP:
            self._requests[fields["lane"]] = requests_of(frame[HEADER.size :])
        elif fields["type"] == ATTEND and self._requests[fields["lane"]][self._groups[fields["layer"]]]:
            self._replies.append(self._worker_end.receive(DEADLINE))
        return True

    def send_reply(self) -> bool:
        """Have the oldest reply arrive. False without one."""
        if not self._replies:
            return False
        self._model_end.send(self._replies.popleft(), DEADLINE)
        return True

    def leave(self) -> None:
        self._has_left = True
        self._replies.clear()
        self._model_end.close()
        self._native.stop()


def _channel(ring_bytes: int) -> tuple[ShmChannel, ShmChannel]:
    """Both ends, the client's first."""
    memory = create_shm_memory(ring_bytes)
    ends = socket.socketpair()
    try:
        client, worker = (
            ShmChannel(memory, end.fileno(), kind, 0)
            for end, kind in zip(ends, (ShmEnd.CLIENT, ShmEnd.WORKER), strict=True)
        )
    finally:
        os.close(memory)
        for end in ends:
            end.close()
    return client, worker
