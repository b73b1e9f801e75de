"""What requests can ask for, alone and together, on one Llama engine: each phase of one job is one scenario."""

from __future__ import annotations

import pytest
import runners
from comparison import assert_same_phase, assert_same_until_aborted
from engines import Engines
from jobs import RESET, Call, Job, JobResult, Phase, Request
from models import EOS, ModelZoo
from workloads import greedy, prompt, requests, sampled

PREFIX = prompt(400, seed=7)
PRINTABLE = [chr(code) for code in range(33, 127)]

PHASES = [
    # Several thousand tokens of context, beside short requests.
    Phase("long", requests((4100, 5, 2500, 700, 64), max_tokens=24)),
    # Requests that arrive together share a prefix that none of them finds in the cache: within the same step one
    # request attends over blocks that another one fills.
    Phase("shared prefix", [Request(PREFIX + prompt(i, seed=i), greedy(12)) for i in range(1, 12)]),
    # The same with the prefix cached, one request being nothing but the prefix.
    Phase("cached prefix", [Request(PREFIX + prompt(i, seed=50 + i), greedy(12)) for i in range(6)]),
    # Prompts join while others decode.
    Phase(
        "arrivals",
        [Request(prompt(40 * i + 1, seed=80 + i), greedy(20), after_step=3 * i) for i in range(10)],
    ),
    Phase("sequences", [Request(prompt(130, seed=90 + i), sampled(12, seed=i, n=3)) for i in range(3)]),
    Phase(
        "sampling",
        [Request(prompt(33, seed=100 + i), sampled(20, seed=i)) for i in range(4)]
        + [
            Request(prompt(90, seed=110), sampled(20, seed=4, top_k=20, top_p=0.9, min_p=0.01)),
            Request(prompt(20, seed=111), greedy(30, presence_penalty=1.0, frequency_penalty=0.5)),
            Request(
                prompt(20, seed=112),
                greedy(20, repetition_penalty=1.3, allowed_token_ids=list(range(4, 200))),
            ),
        ],
    ),
    Phase(
        "logits",
        [
            Request(
                prompt(21, seed=113), greedy(30, logit_bias={str(token): 3.0 for token in range(40, 60)})
            ),
            Request(prompt(22, seed=114), greedy(30, bad_words=PRINTABLE)),
            Request(prompt(23, seed=115), greedy(30, extra_args={"no_repeats": 8})),
            Request(prompt(24, seed=116), sampled(30, seed=5, bad_words=PRINTABLE, min_p=0.02)),
            Request(prompt(25, seed=117), sampled(30, seed=6, extra_args={"no_repeats": 2}, top_k=50)),
            # Sampled ends are likely, and early ones are forbidden.
            Request(
                prompt(26, seed=118),
                sampled(40, seed=7, ignore_eos=False, min_tokens=9, logit_bias={str(EOS): 6.0}),
            ),
            Request(prompt(27, seed=119), greedy(30, logprobs=20)),
            Request(prompt(28, seed=120), greedy(30, logprobs=None)),
        ],
    ),
    Phase(
        "prompt log-probabilities",
        [Request(prompt(n, seed=120), greedy(8, prompt_logprobs=3)) for n in (1, 2, 140, 520)],
    ),
    Phase(
        "ends",
        [
            Request(prompt(50, seed=130), greedy(200, stop=["za", "ke"])),
            Request(prompt(51, seed=131), greedy(200, stop=["di", "lo"], include_stop_str_in_output=True)),
            Request(prompt(52, seed=132), greedy(100, stop_token_ids=list(range(4, 130)), min_tokens=17)),
            Request(prompt(53, seed=133), greedy(100, stop_token_ids=list(range(4, 300)))),
            Request(prompt(54, seed=134), greedy(1)),
        ],
    ),
]

ABORTED = {1: 3, 4: 10, 6: 1, 7: 25}  # request -> number of output tokens at which it is aborted
ABORTS = Phase(
    "aborts",
    [
        Request(prompt(60 * i + 3, seed=140 + i), greedy(40), after_step=i, abort_after=ABORTED.get(i))
        for i in range(10)
    ],
)
# Blocks that the aborted requests gave back are in use again.
AFTER_ABORTS = Phase("after aborts", requests((500, 20, 310, 129), seed=160))

# Requests are computed anew from where they are, in the middle of a prompt or with a step in flight.
RESETS = Phase(
    "resets",
    [
        Request(prompt(2500, seed=170), greedy(20)),
        Request(prompt(5, seed=171), greedy(40, presence_penalty=1.0)),
        Request(prompt(60, seed=172), sampled(40, seed=8, n=2)),
        Request(prompt(70, seed=173), sampled(30, seed=9, extra_args={"no_repeats": 2}, top_k=50)),
        Request(prompt(140, seed=174), greedy(1, prompt_logprobs=3), after_step=9),
        Request(prompt(33, seed=175), sampled(25, seed=10), after_step=12),
    ],
    [Call(RESET, {"reset_running_requests": True}, tokens) for tokens in (0, 0, 3, 4, 9, 14)],
)


@pytest.fixture(scope="module")
def results(engines: Engines, model_zoo: ModelZoo) -> tuple[JobResult, JobResult]:
    phases = [*PHASES, ABORTS, AFTER_ABORTS, RESETS]
    engine = {"max_model_len": 8192, "logits_processors": [runners.logits_processor("NoRepeats")]}
    return engines.pair(Job(model_zoo("llama"), phases, engine))


@pytest.mark.parametrize("name", [phase.name for phase in (*PHASES, AFTER_ABORTS, RESETS)])
def test_phase(results: tuple[JobResult, JobResult], name: str) -> None:
    stock, lamina = results
    assert_same_phase(stock.phase(name), lamina.phase(name))


def test_prefix_is_shared(results: tuple[JobResult, JobResult]) -> None:
    """The prefix cache hits as often as in stock, within a step and across phases."""
    stock, lamina = results
    for name in ("shared prefix", "cached prefix"):
        assert lamina.phase(name).prefix_cache_hits == stock.phase(name).prefix_cache_hits > 0


def test_aborts(results: tuple[JobResult, JobResult]) -> None:
    """Requests that run on beside aborted ones give the same tokens."""
    stock, lamina = (result.phase(ABORTS.name) for result in results)
    for i, (theirs, ours) in enumerate(zip(stock.requests, lamina.requests, strict=True)):
        expected, actual = theirs.completions[0], ours.completions[0]
        assert_same_until_aborted(expected, actual)
        assert len(actual.token_ids) >= ABORTED.get(i, 40)
