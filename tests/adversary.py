"""Makes an engine of this process choose its number of lanes at random, and checks what its attention workers are told.

Each step, as they are told of it by the scheduler's output alone, must be the one that vLLM's own tensors describe.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

COUNTS: Counter[str] = Counter()
"""``lane changes``: changes of the number of lanes; ``checked steps``."""


def provoke(seed: int) -> None:
    """For the engines that this process makes from now on."""
    _choose_lanes_at_random(random.Random(seed))
    _check_steps()


def _choose_lanes_at_random(rng: random.Random) -> None:
    from vllm_lamina.scheduler.lanes import Lanes

    def choose(lanes: Any, expected: Sequence[int]) -> int:
        if len(expected) < 2 or len(lanes.lanes) == 1:
            return 1
        chosen = rng.choice([1, 2]) if rng.random() < 0.2 else lanes._in_use
        COUNTS["lane changes"] += chosen != lanes._in_use
        return chosen

    Lanes._choose_number = choose  # type: ignore[method-assign]


def _check_steps() -> None:
    from vllm_lamina.attention_backend.metadata import LaminaMetadataBuilder

    build = LaminaMetadataBuilder.build

    def build_and_check(self: Any, common_prefix_len: int, theirs: Any, fast_build: bool = False) -> Any:
        metadata = build(self, common_prefix_len, theirs, fast_build)
        if metadata.step is not None:
            group = metadata.step.group_of(self.exchange._layer_indices[self.layer_names[0]])
            _check(metadata.step, group, theirs, self.kv_cache_spec)
            COUNTS["checked steps"] += 1
        return metadata

    LaminaMetadataBuilder.build = build_and_check  # type: ignore[method-assign]


def _check(step: Any, group: Any, theirs: Any, spec: Any) -> None:
    n = theirs.num_reqs
    assert step.num_tokens == theirs.num_actual_tokens
    assert step.query_lens.tolist() == theirs.query_start_loc_cpu[: n + 1].diff().tolist()
    assert (step.context_lens + step.query_lens).tolist() == theirs.seq_lens[:n].tolist()
    assert group.slot_mapping.tolist() == theirs.slot_mapping[: step.num_tokens].tolist()
    has_window = type(spec).__name__ == "SlidingWindowSpec"
    rows = zip(group.block_table, theirs.block_table_tensor, step.context_lens, theirs.seq_lens, strict=False)
    for ours, row, context_len, length in rows:
        # Blocks wholly before the window of the first token belong to nobody, and vLLM 0.33 says so.
        hidden = max(0, int(context_len) - spec.sliding_window + 1) if has_window else 0
        seen = slice(hidden // spec.block_size, -(-int(length) // spec.block_size))
        assert ours[seen].tolist() == row[seen].tolist()
