"""What recovering from lost attention workers relies on in vLLM."""

import dataclasses
import inspect


def test_a_step_that_ran_can_go_without_sampling() -> None:
    """Relies on ``execute_model_state`` being all that a runner keeps between a step and its sampling."""
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "if self.execute_model_state is not None" in inspect.getsource(GPUModelRunner.execute_model)
    assert "self.execute_model_state = None" in inspect.getsource(GPUModelRunner.sample_tokens)
    required = [f.name for f in dataclasses.fields(ModelRunnerOutput) if f.default is dataclasses.MISSING]
    assert {"req_ids", "req_id_to_index"} <= set(required)


def test_draws_for_nothing_are_taken_back_by_an_offset() -> None:
    """Relies on vLLM moving the generators of requests in ``discard_request_mask`` back by one draw's offset."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner._bookkeeping_sync)
    assert "self.discard_request_mask.np" in source
    assert "gen.set_offset(gen.get_offset() - 4)" in source
