"""What the ranks of a tensor-parallel model agree on."""

from __future__ import annotations

import torch
from vllm.distributed import get_tp_group


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; all ranks ask, and get the same answer."""
    group = get_tp_group()
    if group.world_size == 1:
        return flag
    any_flag = torch.tensor([flag], dtype=torch.int32)
    torch.distributed.all_reduce(any_flag, torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return bool(any_flag.item())
