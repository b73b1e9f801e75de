"""Links between the hosts of tests are cut, one way or both, and heal."""

from __future__ import annotations

import socket
import subprocess
import sys

from network import PORT, Host, hosts

ECHO = """
import socket, sys
here = socket.socket(type=socket.SOCK_DGRAM)
here.bind((sys.argv[1], int(sys.argv[2])))
print("ready", flush=True)
heard = 0
while True:
    question, sender = here.recvfrom(64)
    heard += question == b"speak"
    here.sendto(str(heard).encode(), sender)
"""


def times_heard(host: Host, attempts: int = 3) -> int | None:
    """How often the host has heard us by now, as it says; None if no answer comes."""
    with socket.socket(type=socket.SOCK_DGRAM) as here:
        here.settimeout(0.5)
        for _ in range(attempts):
            here.sendto(b"speak", (host.address, PORT))
            try:
                return int(here.recv(64))
            except TimeoutError:
                continue
    return None


def test_cut_and_heal() -> None:
    with hosts(1) as [host]:
        echo = (sys.executable, "-c", ECHO, host.address, str(PORT))
        with subprocess.Popen([*host.prefix, *echo], stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                before = times_heard(host)
                assert before is not None
                for cut, heard in ((host.lose_incoming, 0), (host.lose_outgoing, 3), (host.cut_link, 0)):
                    cut()
                    assert times_heard(host) is None, cut
                    host.heal_link()
                    after = times_heard(host, attempts=10)
                    assert after is not None, cut
                    assert heard < after - before <= heard + 10, cut
                    before = after
            finally:
                process.kill()
