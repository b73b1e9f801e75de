"""A step whose attention worker was lost: nothing is sampled, and the scheduler gets an output that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed import get_tp_group
from vllm.v1.outputs import ModelRunnerOutput

if TYPE_CHECKING:
    from vllm_lamina.attention_backend.exchange import Exchange


def step_failed(exchange: Exchange, lane: int) -> bool:
    """Whether the lane's step, which has run, cannot be completed; the ranks of a tensor-parallel model agree.

    They must: sampling with log-probabilities of the prompt waits for all of them.
    """
    failed = exchange.take_failure(lane) is not None
    group = get_tp_group()
    if group.world_size == 1:
        return failed
    any_failed = torch.tensor([failed], dtype=torch.int32)
    torch.distributed.all_reduce(any_failed, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return bool(any_failed.item())


def forget_step(runner: Any) -> ModelRunnerOutput:
    """Let a model runner not sample from the step that it ran; returns the step's output, which is marked as failed.

    The runner holds nothing else of it: token counts come with the next step, tokens and random states change only when
    something is sampled.
    """
    runner.execute_model_state = None
    output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
    output.lamina_failed = True
    return output


def has_failed(output: ModelRunnerOutput) -> bool:
    """Whether the output is one of `forget_step`."""
    return getattr(output, "lamina_failed", False)
