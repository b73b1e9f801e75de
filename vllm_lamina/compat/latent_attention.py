"""vLLM's layer of multi-head latent attention (MLA): its projections, and what vLLM takes from such models on CPUs."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig

from vllm_lamina.support import latent_sizes

BACKENDS = ("CPU_MLA", "AMX_MLA")
"""Members of vLLM's ``AttentionBackendEnum`` of which it takes one for such layers on a CPU."""


def hand_over(layer: Any) -> None:
    """Let ``layer.impl`` do all that an ``MLAAttention`` does between its projections of the hidden states.

    vLLM's own calls an implementation once for prefill chunks and then once for decodes, with a projection between the
    two; to the attention workers a layer of a step is one exchange.
    """

    def forward_impl(
        q: torch.Tensor,
        k_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        **other: Any,
    ) -> torch.Tensor:
        if said := sorted(name for name, value in other.items() if value is not None):
            raise ValueError(f"{', '.join(said)}: not served")
        result: torch.Tensor = layer.impl.forward(layer, q, k_c_normed, k_pe, attn_metadata, output)
        return result

    layer.forward_impl = forward_impl
    # The latent rows go to the attention workers with the queries.
    layer.update_kv_cache = lambda *args: None


def absorb(layer: Any, query: torch.Tensor, absorbed: torch.Tensor) -> None:
    """Turn queries into such as attend the latent cache itself: ``q_nope W_UK``, and the rotary part behind it.

    Parameters
    ----------
    query
        [rows, heads, qk_nope_head_dim + qk_rope_head_dim].
    absorbed
        [rows, heads, kv_lora_rank + qk_rope_head_dim]: written.
    """
    nope, rank = layer.qk_nope_head_dim, layer.kv_lora_rank
    product = torch.bmm(query[..., :nope].transpose(0, 1), layer.W_UK_T)
    absorbed[..., :rank] = product.transpose(0, 1)
    absorbed[..., rank:] = query[..., nope:]


def project(layer: Any, latent: torch.Tensor) -> torch.Tensor:
    """Turn attention's output over the latent cache into that over values: [rows, heads, kv_lora_rank] ``W_UV``.

    Returns
    -------
    torch.Tensor
        [rows, heads, v_head_dim].
    """
    return torch.bmm(latent.transpose(0, 1), layer.W_UV).transpose(0, 1)


def expand(layer: Any, latent: torch.Tensor, rotary: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of all heads that a token's latent and rotary part stand for.

    Without an adapter's part: vLLM's LoRA puts a projection of its own in the place of the layer's, for all tokens of
    a step; what is absorbed knows none of it. vLLM's own implementations keep the one that they were given too.

    Parameters
    ----------
    latent, rotary
        [rows, kv_lora_rank] and [rows, qk_rope_head_dim].

    Returns
    -------
    tuple
        [rows, heads, qk_nope_head_dim + qk_rope_head_dim] and [rows, heads, v_head_dim].
    """
    nope = layer.qk_nope_head_dim
    both = layer.impl.kv_b_proj(latent)[0].view(len(latent), layer.num_heads, nope + layer.v_head_dim)
    keys = both.new_empty(len(latent), layer.num_heads, nope + rotary.shape[-1])
    keys[..., :nope] = both[..., :nope]
    keys[..., nope:] = rotary.unsqueeze(1)
    return keys, both[..., nope:].contiguous()


def head_sizes(model: Any) -> tuple[int, int]:
    """The head size of a ``ModelConfig``, and how much of its front are the values in latent attention, else 0."""
    if not model.use_mla:
        return model.get_head_size(), 0
    return latent_sizes(model.hf_text_config)


def restore_settings(config: VllmConfig, arguments: Any) -> bool:
    """Give such a model on a CPU what ``EngineArgs`` say of blocks, chunked prefill and the prefix cache.

    vLLM's own kernel for it has neither of the latter, and blocks of 16 tokens, whatever the user says.

    Returns
    -------
    bool
        Whether vLLM had changed any of these.
    """
    if not config.model_config.use_mla or config.device_config.device_type != "cpu":
        return False
    cache, scheduler = config.cache_config, config.scheduler_config
    wanted = [
        (cache, "enable_prefix_caching"),
        (scheduler, "enable_chunked_prefill"),
        (scheduler, "max_num_batched_tokens"),
    ]
    if cache.user_specified_block_size:
        wanted.append((cache, "block_size"))
    changed = False
    for section, name in wanted:
        value = getattr(arguments, name)
        changed |= getattr(section, name) != value
        setattr(section, name, value)
    return changed
