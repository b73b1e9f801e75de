"""One end of a UCX channel as a process: `python ucx_end.py HOST PEER`, numeric addresses.

Writes its address, in hexadecimal, and then the channel's transports; reads the token, before, and the peer's address.
Echoes until the peer leaves, or with `ping-pong` as the third argument sends frames to a peer that echoes.
"""

import sys

from channel_pairs import echo_until_closed, ping_pong

from vllm_lamina._native import UcxChannel
from vllm_lamina.transport.ucx import load_ucx, network_of

RING_BYTES = 64 << 20
SIZES = [64, 4096, 1 << 20, 32 << 20]


def main() -> None:
    load_ucx()
    token = bytes.fromhex(sys.stdin.readline())
    channel = UcxChannel(token, RING_BYTES, 50, network_of(sys.argv[1]).devices)
    channel.admit([sys.argv[2]])
    print(channel.address.hex(), flush=True)
    channel.connect(bytes.fromhex(sys.stdin.readline()))
    channel.wait_connected(20.0)
    print(" ".join(channel.transports), flush=True)
    if sys.argv[3:] == ["ping-pong"]:
        for size in SIZES:
            ping_pong(channel, size, 3)
        channel.close()
    else:
        echo_until_closed(channel)


if __name__ == "__main__":
    main()
