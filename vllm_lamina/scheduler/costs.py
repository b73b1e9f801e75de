"""What steps cost on either side, learnt from the steps themselves, and whether two batches beat one."""

from __future__ import annotations

from vllm_lamina.compat.outputs import StepTimes

FORGETTING = 0.97
"""Weight of everything learnt before, at each new step: about the last thirty steps count."""

ENOUGH_STEPS = 4
MARGIN = 0.05
"""Relative gain below which the number of batches stays as it is."""


class StepCosts:
    """Estimates of decode steps.

    The model worker's time is fitted as ``fixed + per_request * requests`` (its weights are read once a step, the rest
    grows with the batch), the attention worker's as ``per_token * context tokens`` (memory-bound: Lamina paper, MTIME
    and ATIME).
    """

    def __init__(self) -> None:
        self._steps = 0
        self._weight = self._n = self._t = self._nn = self._nt = 0.0
        self._tokens = self._attention = 0.0

    def observe(self, requests: int, context_tokens: int, times: StepTimes) -> None:
        """Learn from a step in which every request decoded one token."""
        self._steps += 1
        for name, value in (
            ("_weight", 1.0),
            ("_n", requests),
            ("_t", times.model),
            ("_nn", requests * requests),
            ("_nt", requests * times.model),
            ("_tokens", context_tokens),
            ("_attention", times.attention),
        ):
            setattr(self, name, FORGETTING * getattr(self, name) + value)

    @property
    def known(self) -> bool:
        """Enough steps were observed to decide by them."""
        return self._steps >= ENOUGH_STEPS

    @property
    def well_known(self) -> bool:
        """Enough for a decision that cannot be taken back."""
        return self._steps >= 2 * ENOUGH_STEPS

    def model_seconds(self, requests: float) -> float:
        """The model worker's part of a step of so many requests."""
        mean_n, mean_t = self._n / self._weight, self._t / self._weight
        variance = self._nn / self._weight - mean_n * mean_n
        covariance = self._nt / self._weight - mean_n * mean_t
        # Steps of one size say nothing about others: then the whole time counts as fixed. And no fit of noise may say
        # that a larger batch is cheaper, or that the fixed part is negative.
        slope = covariance / variance if variance > 1e-3 * mean_n * mean_n else 0.0
        slope = min(max(slope, 0.0), mean_t / mean_n)
        return mean_t + slope * (requests - mean_n)

    def attention_seconds(self, context_tokens: float) -> float:
        """The attention worker's part of a step over so many tokens of context."""
        return self._attention / self._tokens * context_tokens if self._tokens else 0.0

    def gain_of_two(self, requests: int, context_tokens: int) -> float:
        """Time of one batch over the time of two halves, for the same tokens.

        One batch takes ``model + attention``. Of two halves, each takes ``model' + attention'``, the model worker is
        busy for ``2 model'`` and the attention worker for ``2 attention'``; the longest of the three is the period.
        """
        one = self.model_seconds(requests) + self.attention_seconds(context_tokens)
        model, attention = self.model_seconds(requests / 2), self.attention_seconds(context_tokens / 2)
        two = max(2 * model, 2 * attention, model + attention)
        return one / two if two > 0 else 1.0
