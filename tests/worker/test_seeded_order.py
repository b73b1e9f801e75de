"""Each seed is an order in which lanes on streams may go on: all give the right outputs, and come to an end."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
from cpu_stream import load
from held_streams import HeldStream
from seeded_order import LAYERED, NUM_BLOCKS, Fault, SeededRun

from vllm_lamina._native import StreamedExchange
from vllm_lamina.attention_backend.streamed_layers import StreamedLayers
from vllm_lamina.errors import LaminaError

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"kind": "sequence", "shares": (NUM_BLOCKS - 80, 80)},
    {"kind": "head", "shares": (1, 1)},
    {"num_lanes": 3},
    {"geometry": LAYERED},
    {"geometry": LAYERED, "kind": "sequence", "shares": (NUM_BLOCKS - 80, 80)},
    {"geometry": LAYERED, "kind": "head", "shares": (1, 1)},
]


def run(seed: int, **more: Any) -> SeededRun:
    """Every other seed loses a worker."""
    seeded = SeededRun(seed, **{"lost": seed % 2 == 1} | LAYOUTS[seed // 2 % len(LAYOUTS)] | more)
    seeded.run()
    return seeded


@pytest.mark.parametrize("seed", range(40))
def test_seed(seed: int) -> None:
    run(seed)


@pytest.mark.slow
def test_many_seeds() -> None:
    for seed in range(40, 2000):
        run(seed)


def test_a_seed_gives_the_same_order_again() -> None:
    assert run(5).order == run(5).order != run(13).order


# What a fault must be found by: the least of it that can be done wrong outside of the native code.

ALWAYS = ctypes.c_int32(StreamedExchange.POISON)


def no_back_pressure(layers: StreamedLayers) -> None:
    """Streams write frames whether or not there is room."""
    for lane in layers._lanes:
        lane._free = ctypes.addressof(ALWAYS)


class WithoutPoison(HeldStream):
    """It waits on when the step has failed."""

    def wait(self, word: int, value: int) -> None:
        self._enqueue(lambda: None, lambda: value <= load(word) < StreamedExchange.POISON)


FAULTS = {
    "order": (Fault(announces_late=True), {}, "Tensor-likes are not close"),
    "back-pressure": (Fault(spoil=no_back_pressure), {}, "Tensor-likes are not close|dropped a frame"),
    "poison": (Fault(stream=WithoutPoison), {"lost": True}, "nobody can go on"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    fault, more, what = FAULTS[name]

    def run_seeds() -> None:
        for seed in range(0, 400, 2 * len(LAYOUTS)):  # of the first layout
            run(seed, fault=fault, **more)

    with pytest.raises((AssertionError, LaminaError), match=what):
        run_seeds()
