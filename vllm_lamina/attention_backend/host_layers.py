"""A layer's exchange where the host does all work, in its own memory: it sends q, k, v and waits for the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from vllm_lamina._native import AttentionClient, Channel, ChannelError
from vllm_lamina.compat import forward_context
from vllm_lamina.errors import LaminaError

if TYPE_CHECKING:
    from vllm_lamina.attention_backend.step import Step
    from vllm_lamina.device.base import LocalAttention


class StepFailed(Exception):
    """Ends a step that cannot be completed because an attention worker was lost."""


class HostLayers:
    """See `Layers`.

    ``ranks_wait`` says whether other ranks of the model wait in every layer for this one: then a step that cannot be
    completed runs to its end, without the workers, for nothing. Else `StepFailed` ends it.
    """

    def __init__(self, client: AttentionClient, timeout: float, ranks_wait: bool) -> None:
        self._client = client
        self._timeout = timeout
        self._ranks_wait = ranks_wait
        self._failures: dict[int, str] = {}

    def enter(self, lane: int) -> None:
        pass

    def announce(self, lane: int) -> None:
        self._client.join_turn(lane)

    def begin(self, lane: int) -> None:
        pass

    def prepare(self, lane: int, step: Step | None) -> None:
        pass

    def capture(
        self,
        lane: int,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
    ) -> None:
        raise LaminaError("The host is in the middle of a step, which no graph can capture.")

    def wait(self, lane: int) -> None:
        pass

    def end(self, lane: int) -> None:
        pass

    def synchronize(self, lane: int) -> None:
        pass

    def replace_channel(self, worker: int, channel: Channel) -> None:
        self._client.replace_channel(worker, channel)

    def take_failure(self, lane: int) -> str | None:
        return self._failures.pop(lane, None)

    def attend(
        self,
        lane: int,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        output: torch.Tensor,
        attend_locally: LocalAttention,
    ) -> None:
        def attend_chunks() -> tuple[torch.Tensor, torch.Tensor]:
            k, v = step.keep(layer, key, value)
            return attend_locally(query[step.first_chunk_token :], k, v, step.chunks)

        self._attend(lane, step, layer, query, key, value, output, output, attend_chunks, None)

    def attend_latent(
        self,
        lane: int,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        output: torch.Tensor,
        attend_chunks: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        project: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        size = step.geometry.caches[step.geometry.layers[layer].cache].head_size_v
        decoded = query.new_empty(step.num_decodes, query.shape[1], size)
        self._attend(lane, step, layer, query, key, None, decoded, output, attend_chunks, project)

    def _attend(
        self,
        lane: int,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        decoded: torch.Tensor,
        output: torch.Tensor,
        attend_chunks: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        project: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        """The attention workers write to the rows of the decodes in ``decoded``."""
        step.send_once(self._client, lane, self._timeout)
        q = _with_contiguous_rows(query)
        # What a layer does not store is not read.
        k, v = (q if rows is None else _with_contiguous_rows(rows) for rows in (key, value))
        call = _LayerCall(self._client, self._timeout, lane, layer, q, k, v, decoded)
        try:
            if step.has_chunks:
                self._attend_with_chunks(call, step, layer, decoded, output, attend_chunks, project)
            else:
                call.attend()
        except ChannelError as error:
            self._fail_step(lane, error)
            output.zero_()
            return
        if project is not None:
            output[: step.num_decodes] = project(decoded)

    @staticmethod
    def _attend_with_chunks(
        call: _LayerCall,
        step: Step,
        layer: int,
        decoded: torch.Tensor,
        output: torch.Tensor,
        attend_chunks: Callable[[], tuple[torch.Tensor, torch.Tensor]],
        project: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        """While the attention worker stores k, v and attends over the context, chunks attend among themselves here."""
        call.post()
        local_out, local_lse = attend_chunks()
        group = step.group_of(layer)
        context_out = decoded.new_empty(group.num_context_rows, *decoded.shape[1:])
        context_lse = torch.empty(context_out.shape[:2], dtype=torch.float32)
        call.collect(context_out, context_lse)
        if project is not None:
            context_out = project(context_out)
        for start, context_start, count in group.context_rows:
            rows, context = slice(start, start + count), slice(context_start, context_start + count)
            local_out[rows] = merge_by_lse(
                local_out[rows], local_lse[rows], context_out[context], context_lse[context]
            )
        output[step.first_chunk_token :] = local_out

    def _fail_step(self, lane: int, error: ChannelError) -> None:
        """An attention worker was lost; raises ``error`` where none is."""
        if lane not in self._failures:
            if not self._client.failed_workers:
                raise error
            self._failures[lane] = str(error)
            self._client.fail_step(lane, str(error))
        if not self._ranks_wait:
            raise StepFailed(str(error)) from error


class _LayerCall:
    """The tensors of one layer as the native client takes them: addresses, and bytes from token to token.

    While it waits for the attention worker, another lane may use the compute device.
    """

    def __init__(
        self,
        client: AttentionClient,
        timeout: float,
        lane: int,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        self.client = client
        self.timeout = timeout
        self.where = (lane, layer)
        size = q.element_size()
        self.qkv = (
            q.data_ptr(),
            q.stride(0) * size,
            k.data_ptr(),
            k.stride(0) * size,
            v.data_ptr(),
            v.stride(0) * size,
        )
        self.out = (out.data_ptr(), out.stride(0) * size)

    def attend(self) -> None:
        context = forward_context.take_aside()
        try:
            self.client.attend(*self.where, *self.qkv, *self.out, timeout=self.timeout)
        finally:
            forward_context.put_back(context)

    def post(self) -> None:
        self.client.post(*self.where, *self.qkv, timeout=self.timeout)

    def collect(self, context_out: torch.Tensor, context_lse: torch.Tensor) -> None:
        context = forward_context.take_aside()
        try:
            self.client.collect(
                *self.where, *self.out, context_out.data_ptr(), context_lse.data_ptr(), timeout=self.timeout
            )
        finally:
            forward_context.put_back(context)


def _with_contiguous_rows(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor[0].is_contiguous() else tensor.contiguous()


def merge_by_lse(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> torch.Tensor:
    """Attention over the union of two disjoint sets of tokens, from the attention over each.

    ``A = (A_a S_a + A_b S_b) / (S_a + S_b)`` with ``S = exp(LSE)`` (the merge of the Lamina paper), written as
    ``A_a + (A_b - A_a) sigmoid(LSE_b - LSE_a)`` so that nothing overflows.

    Parameters
    ----------
    out_a, out_b
        [tokens, num_heads, head_size], the same dtype.
    lse_a, lse_b
        [tokens, num_heads], float32; ``lse_b`` may be -inf (an empty set), ``lse_a`` may not.

    Returns
    -------
    torch.Tensor
        [tokens, num_heads, head_size] in the dtype of ``out_a``.
    """
    weight = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    return torch.lerp(out_a.float(), out_b.float(), weight).to(out_a.dtype)
