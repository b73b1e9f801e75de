"""The bytes that decoding puts on the wire, counted at the serving machine's interface, are those of the formula."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from engines import Engines
from jobs import Job, Phase
from model_specs import ModelSpec
from models import create_model
from network import Host, addresses, hosts, workers_on
from workloads import requests

LAYERS, HEADS, KV_HEADS, HEAD_SIZE, ELEMENT = 2, 16, 4, 128, 4
WIDTH, GROUP = HEADS * HEAD_SIZE, HEADS // KV_HEADS
BATCH = 32
STEPS = 40, 100
"""Two runs that differ in nothing but the number of decode steps: start, prefill and end cancel out."""


# Ethernet 14, IPv4 20, TCP with timestamps 32. At an MTU of 1500 that is 4.6% of the 1448 bytes behind it, at 9000
# 0.7%; acknowledgements are frames of nothing else.
FRAME_HEADERS = 66

FRAMING_OVERHEAD = 0.02
"""Of our headers, UCX's, the STEP and heartbeats, in what TCP carries."""

WIRE_OVERHEAD = {1500: 0.1, 9000: 0.03}
"""Of all of that and of the headers of all frames, acknowledgements included, by MTU."""


@dataclass(frozen=True)
class Traffic:
    """What one decode step put on the wire in both directions: frames, and their bytes with all headers."""

    frames: float
    num_bytes: float

    @property
    def carried(self) -> float:
        """Bytes that TCP carried."""
        return self.num_bytes - FRAME_HEADERS * self.frames


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = ModelSpec(
        "LlamaConfig",
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": HEAD_SIZE,
        },
    )
    return str(create_model(spec, tmp_path_factory.mktemp("model") / "wide"))


def count(host: Host) -> tuple[int, int]:
    """Frames and bytes in both directions."""
    frames, num_bytes = (
        sum(host.count(f"{direction}_{unit}") for direction in ("tx", "rx")) for unit in ("packets", "bytes")
    )
    return frames, num_bytes


def per_decode_step(engines: Engines, model: str, serving: Host, options: dict[str, object]) -> Traffic:
    totals = []
    for steps in STEPS:
        before = count(serving)
        phase = Phase("decode", requests((8,) * BATCH, max_tokens=steps))
        engines.run(Job(model, [phase], {"lamina_batches": 1} | options, executor="lamina"))
        totals.append([now - then for now, then in zip(count(serving), before, strict=True)])
    frames, num_bytes = ((long - short) / (STEPS[1] - STEPS[0]) for short, long in zip(*totals, strict=True))
    return Traffic(frames, num_bytes)


@pytest.mark.parametrize(("mtu", "num_workers"), [pytest.param(1500, 1, marks=pytest.mark.slow), (9000, 3)])
def test_decode_step(
    engines: Engines, model: str, secret: Path, tmp_path: Path, mtu: int, num_workers: int
) -> None:
    """One worker, and three that divide by head, which sends the same and has three times the headers."""
    formula = (2 + 2 / GROUP) * ELEMENT * WIDTH * BATCH * LAYERS
    with hosts(1 + num_workers, mtu=mtu) as (serving, *worker_hosts):
        for host in (serving, *worker_hosts):
            host.send_frames_one_by_one()
        with (
            workers_on(worker_hosts, secret, tmp_path) as workers,
            Engines(tmp_path, beside=engines, host=serving.namespace) as far_engines,
        ):
            options = {"lamina_workers": addresses(workers), "lamina_secret_file": str(secret)}
            traffic = per_decode_step(far_engines, model, serving, options)
    framing, wire = traffic.carried / formula - 1, traffic.num_bytes / formula - 1
    print(
        f"MTU {mtu}, {num_workers} workers: {framing:.2%} over the formula within TCP, {wire:.2%} on the wire"
    )
    assert 0 < framing < FRAMING_OVERHEAD
    assert framing < wire < WIRE_OVERHEAD[mtu]
