"""The attention workers of one engine, as the model worker uses them: one KV cache, divided over them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import msgspec

from vllm_lamina._native import AttentionClient, Channel, ChannelError
from vllm_lamina.attention_backend.streamed_layers import memory_bytes
from vllm_lamina.config import TransportOption
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.kv_cache.partition import Partition, Pool, divide
from vllm_lamina.transport.connection import AttentionWorkerConnection
from vllm_lamina.transport.errors import ConnectionFailed

logger = logging.getLogger("vllm.lamina")

RECONNECT_SECONDS = 2.0
"""How long a worker that is asked to take a lost one's place may take for each answer."""


@dataclass(frozen=True)
class ChannelOptions:
    """How the data channels are opened; see `AttentionWorkerConnection.configure`.

    Attributes
    ----------
    max_tokens, max_requests, max_model_len
        Of a step, for which a channel has room; see `Geometry.ring_bytes`.
    spin_us
        How long either side polls before it sleeps. Workers that share CPUs with one another sleep at once.
    num_streams
        Lanes whose frames a device writes, into the channels' memory; see `streamed_layers`.
    """

    max_tokens: int
    max_requests: int
    max_model_len: int
    spin_us: int
    transport: TransportOption = "auto"
    heartbeat_timeout: float = 0.0
    num_streams: int = 0


class AttentionWorkers:
    """Connections to all attention workers. Not thread-safe, but for the client that `configure` returns."""

    def __init__(self, connections: Sequence[AttentionWorkerConnection], secret_file: str = "") -> None:
        self._connections = list(connections)
        self._secret_file = secret_file
        self._partition: Partition | None = None
        self._client: AttentionClient | None = None
        self._options: ChannelOptions | None = None
        self.replace_channel: Callable[[int, Channel], None]
        """How a worker that takes a lost one's place gets its part; of the client, or of what exchanges for it."""

    @classmethod
    def connect(cls, addresses: Sequence[str], secret_file: str = "") -> Self:
        """Greet every worker. Raises as `AttentionWorkerConnection.connect`, and leaves none connected then."""
        with contextlib.ExitStack() as opened:
            connections = [
                opened.enter_context(AttentionWorkerConnection.connect(address, secret_file=secret_file))
                for address in addresses
            ]
            opened.pop_all()
        return cls(connections, secret_file)

    @property
    def pools(self) -> list[Pool]:
        """What each worker offers."""
        return [Pool(connection.address, connection.pool_bytes) for connection in self._connections]

    def check_available(self, transport: TransportOption) -> None:
        """Raises as `AttentionWorkerConnection.check_available`, for the first that cannot be used."""
        for connection in self._connections:
            connection.check_available(transport)

    def divide(self, wanted: str, geometry: Geometry, max_model_len: int) -> Partition:
        """Divide the KV cache, by block sizes that the workers say themselves; see `partition.divide`."""
        return divide(
            wanted,
            self.pools,
            geometry,
            lambda worker, part: self._connections[worker].block_bytes(part),
            max_model_len,
        )

    def configure(self, partition: Partition, options: ChannelOptions) -> tuple[AttentionClient, int]:
        """Let every worker allocate its share.

        Returns
        -------
        tuple
            The client of all workers, and the bytes of their pools in use.

        Raises
        ------
        WorkerRefused
            A worker serves another engine, or its pool is too small.
        """
        self._partition, self._options = partition, options
        used = sum(self._configure(connection, index) for index, connection in enumerate(self._connections))
        channels = [connection.channel for connection in self._connections]
        self._client = AttentionClient(channels, partition.to_native())
        self.replace_channel = self._client.replace_channel
        return self._client, used

    @property
    def client(self) -> AttentionClient:
        """The client that `configure` returned."""
        assert self._client is not None
        return self._client

    def _configure(self, connection: AttentionWorkerConnection, index: int, replaces: bytes = b"") -> int:
        assert self._partition is not None
        assert self._options is not None
        share, options = self._partition.shares[index], self._options
        ring_bytes = share.geometry.ring_bytes(
            options.max_tokens, options.max_requests, options.max_model_len
        )
        if options.num_streams:
            ring_bytes += memory_bytes(share.geometry, options.num_streams, options.max_tokens)
        return connection.configure(
            share.geometry,
            share.num_blocks,
            ring_bytes=ring_bytes,
            spin_us=options.spin_us,
            worker_spin_us=options.spin_us if self._has_its_own_cpus(connection, index) else 0,
            transport=options.transport,
            heartbeat_timeout=options.heartbeat_timeout,
            replaces=replaces,
        )

    @property
    def lost(self) -> list[int]:
        """Workers that are lost, by their place in the partition."""
        failed = self._client.failed_workers if self._client is not None else []
        return [i for i, connection in enumerate(self._connections) if i in failed or not connection.alive]

    def replace(self, candidates: Mapping[int, Sequence[str]]) -> dict[int, str]:
        """Let others take the places of lost workers, with empty pools. No step may be in flight.

        Parameters
        ----------
        candidates
            For places in the partition, addresses to try in order; a worker's own address is one of them, where it may
            have been started again.

        Returns
        -------
        dict
            The address of each that took a place. Why the others did not is logged.
        """
        assert self._client is not None
        taken: dict[int, str] = {}
        for index, addresses in candidates.items():
            self._connections[index].abandon()
            for address in addresses:
                if address not in taken.values() and self._try_to_replace(index, address):
                    taken[index] = address
                    break
        if taken:
            # What was sent before belongs to steps that failed.
            self._client.generation += 1
        return taken

    def _try_to_replace(self, index: int, address: str) -> bool:
        assert self._client is not None
        replaces = self._connections[index].token
        try:
            connection = AttentionWorkerConnection.connect(
                address, RECONNECT_SECONDS, secret_file=self._secret_file, waits_for_listener=False
            )
        except ConnectionFailed as error:
            logger.info("Lamina: no attention worker in place of the lost one yet: %s.", error)
            return False
        try:
            self._configure(connection, index, replaces)
        except (ConnectionFailed, ChannelError) as error:
            logger.warning(
                "Lamina: the attention worker at %s cannot take the lost one's place: %s.", address, error
            )
            connection.abandon()
            return False
        self._connections[index] = connection
        self.replace_channel(index, connection.channel)
        return True

    def _has_its_own_cpus(self, worker: AttentionWorkerConnection, index: int) -> bool:
        def share(other: AttentionWorkerConnection) -> bool:
            if _host(other.address) != _host(worker.address):
                return False
            cpus, others = set(worker.welcome.cpus), set(other.welcome.cpus)
            return not cpus or not others or bool(cpus & others)  # without a list it runs on all

        return not any(share(other) for i, other in enumerate(self._connections) if i != index)

    def stats(self) -> list[dict[str, Any]]:
        """Counters of each worker that is not lost, by the names of `WorkerStats`, and its address; plain data."""
        return [
            {"address": connection.address} | msgspec.structs.asdict(connection.stats())
            for index, connection in enumerate(self._connections)
            if index not in self.lost
        ]

    def close(self) -> None:
        """Leave all workers. May be called twice."""
        lost = self.lost
        for index, connection in enumerate(self._connections):
            if index in lost:
                connection.abandon()
            else:
                connection.close()


def _host(address: str) -> str:
    return address.rpartition(":")[0]
