"""The planner's closed form of staggered batches against an event per layer."""

import pytest
from layer_pipeline import time_between_tokens
from planner_examples import MODEL, device, example_lamina

from vllm_lamina.planner.results import steady_state


@pytest.mark.parametrize("lanes", [1, 2, 3, 4])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0, 3.0])
def test_closed_form_equals_the_layered_pipeline(lanes: int, ratio: float) -> None:
    deployment = example_lamina(lanes=lanes, workers=5, attention_device=device(bandwidth=0.2e9))
    per_lane = 10
    context = ratio * 0.10004 / (per_lane * 20e-6)
    state = steady_state(deployment, batch=lanes * per_lane, context=context)
    reference = time_between_tokens(
        layers=MODEL.layers,
        lanes=lanes,
        replicas=deployment.replicas,
        model=0.10004,
        attention=ratio * 0.10004,
    )
    assert reference == pytest.approx(state.tbt, rel=0.01)
