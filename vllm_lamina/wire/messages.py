"""Control messages between a model worker and an attention worker: tagged structs, in msgpack."""

import ipaddress
from typing import Annotated, Literal

import msgspec

from vllm_lamina.kv_cache.geometry import Geometry, Positive

PROTOCOL_VERSION = 7
"""Raised whenever a message below changes its meaning; both sides must have the same."""

Bytes = Annotated[int, msgspec.Meta(ge=0, lt=2**63)]
SpinMicroseconds = Annotated[int, msgspec.Meta(ge=0, le=10_000_000)]
RingBytes = Annotated[int, msgspec.Meta(gt=0, lt=2**40)]
LogText = Annotated[str, msgspec.Meta(max_length=200, pattern=r"^[ -~]*$")]
Transport = Literal["shm", "ucx"]
Host = Annotated[str, msgspec.Meta(max_length=64)]
"""A numeric IP address."""
MAX_HOSTS = 32


class Network(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one end of a `UcxChannel` uses of its host.

    Attributes
    ----------
    devices
        As in ``UCX_NET_DEVICES``; for messages that people read.
    hosts
        From which it may connect: addresses of the devices, those that UCX takes before the others.
    """

    devices: Annotated[str, msgspec.Meta(max_length=4096)]
    hosts: Annotated[tuple[Host, ...], msgspec.Meta(max_length=MAX_HOSTS)]

    def __post_init__(self) -> None:
        for host in self.hosts:
            ipaddress.ip_address(host)


class Hello(msgspec.Struct, frozen=True, tag="hello"):
    """First message of a model worker. It never changes, so that any version can read it."""

    software_version: str
    protocol_version: int


class Welcome(msgspec.Struct, frozen=True, tag="welcome"):
    """Answer to `Hello`; takes unknown fields, so that versions that differ can still say so.

    Attributes
    ----------
    pool_bytes
        Memory for KV blocks.
    cpus
        The CPUs the threads are pinned to; empty if they are not.
    data_socket
        Abstract-namespace name of the unix socket that takes data channels.
    host
        See `host_identity`.
    uid
        User of the worker's process.
    lease_seconds
        How long the pool of an engine outlives its last `Heartbeat`; 0 for ever.
    engine
        The engine that it serves; empty if it serves none.
    draining
        It waits for its engine to leave, and takes no other.
    """

    software_version: str
    protocol_version: int
    pool_bytes: int
    num_threads: int
    cpus: list[int]
    pid: int
    data_socket: str
    host: str = ""
    uid: int = -1
    lease_seconds: float = 0.0
    engine: str = ""
    draining: bool = False


class BlockBytesRequest(msgspec.Struct, frozen=True, tag="block_bytes", forbid_unknown_fields=True):
    """Asks how many bytes of the pool one KV block takes over all positions."""

    geometry: Geometry


class BlockBytesReply(msgspec.Struct, frozen=True, tag="block_bytes_are", forbid_unknown_fields=True):
    """Answer to `BlockBytesRequest`."""

    num_bytes: int


class Configure(msgspec.Struct, frozen=True, tag="configure", forbid_unknown_fields=True):
    """Asks for a pool of KV blocks.

    Attributes
    ----------
    spin_us
        How long the worker polls for a frame before it sleeps.
    transport
        Of the data channel.
    host
        At which the engine reaches the worker: a channel over UCX uses that network.
    engine
        Who asks, for the worker's log.
    replaces
        Token of the engine's pool from before it lost the worker, which is dropped for this one; empty for none.
    """

    geometry: Geometry
    num_blocks: Positive
    spin_us: SpinMicroseconds
    transport: Transport = "shm"
    host: Host = ""
    engine: LogText = "an unnamed engine"
    replaces: bytes = b""


class Configured(msgspec.Struct, frozen=True, tag="configured", forbid_unknown_fields=True):
    """The pool is there.

    Attributes
    ----------
    token
        Names the engine: opens the data channel, once, within a few seconds, and goes with every `Heartbeat`.
    isa
        Kernel variant in use.
    network
        Of the worker's end of a channel over UCX.
    """

    used_bytes: int
    token: bytes
    isa: str
    network: Network | None = None


class OpenUcx(msgspec.Struct, frozen=True, tag="open_ucx", forbid_unknown_fields=True):
    """Asks for the other end of a `UcxChannel`.

    Attributes
    ----------
    token
        Of `Configured`.
    channel_token, ring_bytes, address, network
        Of the engine's end, which admits the worker's.
    """

    token: bytes
    channel_token: bytes
    ring_bytes: RingBytes
    address: bytes
    network: Network


class UcxOpened(msgspec.Struct, frozen=True, tag="ucx_opened", forbid_unknown_fields=True):
    """The worker serves its end of the channel, which has this address."""

    address: bytes


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", forbid_unknown_fields=True):
    """The engine lives. Nothing else renews its lease, and no other engine's message does."""

    token: bytes


class HeartbeatReply(msgspec.Struct, frozen=True, tag="alive", forbid_unknown_fields=True):
    """The worker lives, and still holds the engine's pool.

    Attributes
    ----------
    progress
        Goes up while the loop that serves the data channel runs, idle or not; None as long as there is no channel.
    """

    draining: bool
    progress: int | None = None


class Leave(msgspec.Struct, frozen=True, tag="leave", forbid_unknown_fields=True):
    """The engine leaves; its pool is dropped before the answer, `Goodbye`."""

    token: bytes


class StatsRequest(msgspec.Struct, frozen=True, tag="stats", forbid_unknown_fields=True):
    """Asks for `WorkerStats`."""


class WorkerStats(msgspec.Struct, frozen=True, tag="stats_are", forbid_unknown_fields=True):
    """Counters of an attention worker since its current engine connected; times are nanoseconds.

    Attributes
    ----------
    connected
        Whether an engine is connected; without one all counters are zero.
    isa
        Kernel variant in use, empty without an engine.
    ns_waiting
        Between the frames of a step in flight.
    ns_idle
        With no step in flight.
    refused_clients
        Peers that the control port has turned away since the worker started: no or another secret, or no peer of
        vllm-lamina.
    """

    connected: bool
    pool_bytes: int
    used_bytes: int = 0
    num_blocks: int = 0
    isa: str = ""
    steps: int = 0
    messages: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    tokens_appended: int = 0
    ns_attending: int = 0
    ns_appending: int = 0
    ns_waiting: int = 0
    ns_idle: int = 0
    rejected_frames: int = 0
    refused_clients: int = 0


class TraceRequest(msgspec.Struct, frozen=True, tag="trace", forbid_unknown_fields=True):
    """Begins to record the frames of the engine that is connected, or ends it and asks for them."""

    action: Literal["start", "take"]


class Trace(msgspec.Struct, frozen=True, tag="trace_is", forbid_unknown_fields=True):
    """Answer to `TraceRequest`: what `AttentionWorker.take_trace` returns, empty after a start."""

    events: bytes


class Goodbye(msgspec.Struct, frozen=True, tag="goodbye", forbid_unknown_fields=True):
    """Answer to `Leave`."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request was understood or not, and is not served; takes unknown fields, like `Welcome`."""

    reason: str


Request = Hello | BlockBytesRequest | Configure | OpenUcx | Heartbeat | Leave | StatsRequest | TraceRequest
Reply = (
    Welcome
    | BlockBytesReply
    | Configured
    | UcxOpened
    | HeartbeatReply
    | WorkerStats
    | Trace
    | Goodbye
    | Refused
)

encode = msgspec.msgpack.Encoder().encode
_request_decoder: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_reply_decoder: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def decode_request(payload: bytes) -> Request:
    """Read a request.

    Raises
    ------
    msgspec.DecodeError
        It is none.
    """
    try:
        return _request_decoder.decode(payload)
    except _UNDECLARED_ERRORS as error:
        raise msgspec.DecodeError(str(error)) from error


def decode_reply(payload: bytes) -> Reply:
    """Read a reply; raises like `decode_request`."""
    try:
        return _reply_decoder.decode(payload)
    except _UNDECLARED_ERRORS as error:
        raise msgspec.DecodeError(str(error)) from error


_UNDECLARED_ERRORS = (UnicodeDecodeError, RecursionError)
"""What msgspec raises beside its own errors: for text that is not UTF-8, and for arrays in arrays in arrays."""
