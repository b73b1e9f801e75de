"""What Lamina refuses, in one table: checked at startup, shown in docs/support.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from vllm_lamina.config import LaminaConfig
from vllm_lamina.errors import UnsupportedError
from vllm_lamina.kv_cache.geometry import DTYPES

WITHOUT_LAMINA = "run it without --executor lamina"

HEAD_SIZES = range(32, 513, 16)
LATENT_SIZES = range(32, 1025, 16)
"""Elements of a token's latent row, and of its front that are its values."""
BLOCK_SIZE_MULTIPLE = 32


@dataclass(frozen=True)
class LayerOptions:
    """What a model asks of one attention layer."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    attn_type: str
    kv_cache_dtype: str
    other: tuple[str, ...]
    device_type: str = "cpu"
    latent_size: int = 0
    indexer: object = None


@dataclass(frozen=True)
class Refusal:
    """One unsupported feature, how it shows, and what a user can do about it.

    ``in_engine`` looks at the ``VllmConfig`` before anything starts, ``in_arguments`` at the ``EngineArgs`` before,
    where vLLM would refuse them first with advice that does not help; ``in_layer`` is the authority for what only the
    model's code knows. Each may be absent. ``fields`` are those of vLLM's objects that say it, see `refuse_fields`.
    """

    feature: str
    advice: str
    in_engine: Callable[[Any], bool] | None = None
    in_layer: Callable[[LayerOptions], bool] | None = None
    in_arguments: Callable[[Any], bool] | None = None
    fields: frozenset[str] = frozenset()


def _text_config(config: Any) -> Any:
    return config.model_config.hf_text_config


def _attends_as_no_other_model(config: Any) -> bool:
    """Whether layers attend by a rule of the model's own, of which vLLM says something else first, or nothing."""
    text, architectures = _text_config(config), set(config.model_config.architectures)
    return bool(
        not architectures.isdisjoint({"Step1ForCausalLM", "IQuestLoopCoderForCausalLM"})
        or (
            "Rnj1ForCausalLM" in architectures
            and "chunked_attention" in (getattr(text, "layer_types", None) or ())
        )
        or getattr(text, "param_sink_number", 0)
        or config.model_config.rswa_window is not None
    )


def _has_sparse_attention(config: Any) -> bool:
    text = _text_config(config)
    return bool(
        config.model_config.use_mla and any(hasattr(text, name) for name in ("index_topk", "compress_ratios"))
    )


def latent_sizes(text: Any) -> tuple[int, int]:
    """Elements of a token's latent row, and of its front that is its values, by a model's own configuration.

    vLLM's ``ModelConfig.get_head_size`` knows it of the model types that it lists alone.
    """
    return text.kv_lora_rank + text.qk_rope_head_dim, text.kv_lora_rank


def _checkpoint_quantises_kv_cache(config: Any) -> bool:
    """Whether the KV cache would be quantised without a flag; a flag with the model's dtype prevents it."""
    cache_dtype = config.cache_config.cache_dtype
    if getattr(config.quant_config, "kv_cache_scheme", None) is not None:  # what vLLM's layers look at
        return bool(cache_dtype != _dtype(config))
    declared = getattr(config.model_config.hf_config, "quantization_config", None) or getattr(
        _text_config(config), "quantization_config", None
    )
    outer = declared if isinstance(declared, Mapping) else {}
    names = ("kv_cache_scheme", "kv_cache_quant_algo")
    by_checkpoint = any(level.get(name) for level in (outer, outer.get("quantization", {})) for name in names)
    return by_checkpoint and cache_dtype not in ("auto", *DTYPES)


def _dtype(config: Any) -> str:
    return str(config.model_config.dtype).removeprefix("torch.")


_OTHER = Refusal(
    "other attention options of the model",
    WITHOUT_LAMINA,
    None,
    lambda o: bool(o.other),
)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "encoder models and encoder-decoder models (encoder attention, cross attention)",
        WITHOUT_LAMINA,
        lambda c: c.model_config.is_encoder_decoder,
        lambda o: o.attn_type != "decoder",
        fields=frozenset({"attn_type", "encoder_seq_lens", "encoder_seq_lens_cpu"}),
    ),
    Refusal(
        "pooling models (embedding, classification, scoring)",
        WITHOUT_LAMINA,
        lambda c: c.model_config.runner_type != "generate",
    ),
    Refusal(
        "multimodal inputs on GPUs",
        f"serve the model for text alone with --language-model-only, or {WITHOUT_LAMINA}",
        lambda c: c.device_config.device_type == "cuda" and c.model_config.supports_multimodal_inputs,
    ),
    Refusal(
        "encoders apart from the decoder",
        "remove --ec-transfer-config, --ec-manager-config and --mm-encoder-only",
        lambda c: (
            c.ec_transfer_config is not None
            or c.ec_manager_config.encoder_cache_manager_cls is not None
            or c.is_mm_encoder_only
        ),
    ),
    Refusal(
        "a limit of prefill chunks for models whose images see their own tokens whole",
        "remove --long-prefill-token-threshold",
        lambda c: c.model_config.is_mm_prefix_lm and c.scheduler_config.long_prefill_token_threshold > 0,
    ),
    Refusal(
        "sparse attention by an indexer (DeepSeek V3.2 and V4, GLM-5)",
        WITHOUT_LAMINA,
        _has_sparse_attention,
        lambda o: o.indexer is not None,
        fields=frozenset(
            {"indexer", "use_sparse", "is_index_group_leader", "cache_role", "topk_buffer_width"}
        ),
    ),
    Refusal(
        "multi-head latent attention (MLA) on GPUs",
        "run the model worker on CPUs, or " + WITHOUT_LAMINA,
        lambda c: c.device_config.device_type == "cuda" and c.model_config.use_mla,
        lambda o: o.device_type == "cuda" and bool(o.latent_size),
    ),
    Refusal(
        f"latent rows (MLA) of other sizes than the multiples of 16 from {LATENT_SIZES[0]} to {LATENT_SIZES[-1]}",
        WITHOUT_LAMINA,
        lambda c: (
            c.model_config.use_mla and any(size not in LATENT_SIZES for size in latent_sizes(_text_config(c)))
        ),
        lambda o: bool(o.latent_size) and any(s not in LATENT_SIZES for s in (o.head_size, o.latent_size)),
    ),
    Refusal(
        "attention-free models (Mamba and other states alone)",
        "run it without --executor lamina: there is no attention to move",
        lambda c: c.model_config.is_attention_free,
        fields=frozenset({"attention_layers"}),
    ),
    Refusal(
        "hybrid models (Mamba, linear or convolution state beside attention) on GPUs",
        WITHOUT_LAMINA,
        lambda c: c.device_config.device_type == "cuda" and c.model_config.is_hybrid,
    ),
    Refusal(
        "prefix caching for hybrid models",
        "use --no-enable-prefix-caching, and remove --mamba-cache-mode and --mamba-block-size",
        lambda c: c.model_config.is_hybrid and c.cache_config.enable_prefix_caching,
    ),
    Refusal(
        "ReplaySSM, whose buffers two batches would share",
        "remove --use-replayssm",
        lambda c: c.cache_config.use_replayssm,
    ),
    Refusal(
        "attention that is not causal (prefix language models)",
        WITHOUT_LAMINA,
        lambda c: c.attention_config.use_non_causal or _text_config(c).model_type == "hrm_text",
        fields=frozenset({"causal", "non_causal"}),
    ),
    Refusal(
        "rules of attention that one model alone has (Rnj-1's chunks that look back, Step-1's ALiBi of square roots, "
        "openPangu's sink tokens, IQuest Loop Coder's layers that attend twice, a reference window)",
        WITHOUT_LAMINA,
        _attends_as_no_other_model,
    ),
    Refusal(
        "quantised KV cache that the checkpoint declares (kv_cache_scheme and others)",
        "give the KV cache the model's dtype: --dtype bfloat16 --kv-cache-dtype bfloat16, or both float16",
        _checkpoint_quantises_kv_cache,
        lambda o: o.kv_cache_dtype not in ("auto", *DTYPES),
        fields=frozenset({"kv_quant_mode"}),
    ),
    Refusal(
        "quantised KV cache (FP8 and others)",
        "remove --kv-cache-dtype",
        lambda c: c.cache_config.cache_dtype not in ("auto", *DTYPES),
    ),
    Refusal(
        "a KV cache dtype other than the model's",
        "remove --kv-cache-dtype",
        lambda c: c.cache_config.cache_dtype not in ("auto", _dtype(c)),
    ),
    Refusal(
        f"head sizes other than the multiples of 16 from {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}",
        WITHOUT_LAMINA,
        lambda c: not c.model_config.use_mla and c.model_config.get_head_size() not in HEAD_SIZES,
        lambda o: not o.latent_size and o.head_size not in HEAD_SIZES,
    ),
    _OTHER,
    Refusal(
        f"KV block sizes that are not a multiple of {BLOCK_SIZE_MULTIPLE}",
        "remove --block-size or choose 32, 64 or 128",
        lambda c: (
            c.cache_config.block_size is not None and c.cache_config.block_size % BLOCK_SIZE_MULTIPLE != 0
        ),
    ),
    Refusal(
        "speculative decoding",
        "remove --speculative-config, --spec-method, --spec-model and --spec-tokens; in place of a speculator's "
        "checkpoint, serve the model that it is for",
        lambda c: c.speculative_config is not None,
    ),
    Refusal(
        "prefill without the layers that share KV",
        "remove --kv-sharing-fast-prefill",
        lambda c: c.cache_config.kv_sharing_fast_prefill,
        fields=frozenset({"logits_indices_padded", "num_logits_indices", "max_logits_per_req"}),
    ),
    # Before KV connectors: it brings one that the user did not give.
    Refusal(
        "KV offloading",
        "remove --kv-offloading-size",
        lambda c: c.cache_config.kv_offloading_size is not None,
    ),
    Refusal("KV connectors", "remove --kv-transfer-config", lambda c: c.kv_transfer_config is not None),
    Refusal(
        "pipeline parallelism",
        "use --pipeline-parallel-size 1",
        lambda c: c.parallel_config.pipeline_parallel_size > 1,
        in_arguments=lambda a: a.pipeline_parallel_size > 1,
    ),
    Refusal(
        "data parallelism", "use --data-parallel-size 1", lambda c: c.parallel_config.data_parallel_size > 1
    ),
    Refusal(
        "context parallelism",
        "remove --decode-context-parallel-size and --prefill-context-parallel-size",
        lambda c: (
            c.parallel_config.decode_context_parallel_size > 1
            or c.parallel_config.prefill_context_parallel_size > 1
        ),
        in_arguments=lambda a: a.decode_context_parallel_size > 1 or a.prefill_context_parallel_size > 1,
        fields=frozenset({"dcp_local_seq_lens", "dcp_local_seq_lens_cpu_upper_bound"}),
    ),
    Refusal(
        "two batches in flight with tensor parallelism on GPUs",
        "use --lamina-batches 1",
        lambda c: (
            c.device_config.device_type == "cuda"
            and c.parallel_config.tensor_parallel_size > 1
            and LaminaConfig.from_additional_config(c.additional_config).batches > 1
        ),
    ),
    Refusal(
        "vLLM's V1 model runner on GPUs",
        "unset VLLM_USE_V2_MODEL_RUNNER; if it is not set, vLLM's log says what its V2 runner lacks",
        lambda c: c.device_config.device_type == "cuda" and not c.use_v2_model_runner,
    ),
)


def check_engine_arguments(arguments: Any) -> None:
    """Refuse ``EngineArgs`` of which vLLM would say something else first.

    Raises
    ------
    UnsupportedError
        Names the feature and what to change.
    """
    for refusal in REFUSALS:
        if refusal.in_arguments is not None and refusal.in_arguments(arguments):
            raise UnsupportedError(_message(refusal, arguments.model))


def check_engine_config(config: Any) -> None:
    """Refuse an engine whose ``VllmConfig`` asks for what Lamina does not support.

    Raises
    ------
    UnsupportedError
        Names the feature and what to change.
    """
    for refusal in REFUSALS:
        if refusal.in_engine is not None and refusal.in_engine(config):
            raise UnsupportedError(_message(refusal, config.model_config.model))


def check_layer(options: LayerOptions) -> None:
    """Refuse an attention layer that asks for what Lamina does not support.

    Raises
    ------
    UnsupportedError
        Names the feature and what to change.
    """
    for refusal in REFUSALS:
        if refusal.in_layer is not None and refusal.in_layer(options):
            raise UnsupportedError(_message(refusal, f"an attention layer with {options}"))


def refuse_fields(said: Mapping[str, object], subject: str) -> NoReturn:
    """Refuse what fields of vLLM's objects say: of a layer, its KV cache spec or a step's metadata.

    Raises
    ------
    UnsupportedError
        Names the feature, the fields with their values, and what to change.
    """
    refusal = next((refusal for refusal in REFUSALS if not refusal.fields.isdisjoint(said)), _OTHER)
    values = ", ".join(f"{name}={value!r}" for name, value in said.items())
    raise UnsupportedError(_message(refusal, f"{subject} with {values}"))


def _message(refusal: Refusal, subject: str) -> str:
    return f"Lamina does not support {refusal.feature}, which {subject} asks for: {refusal.advice}."


def support_table() -> str:
    """The refused features as a Markdown table, as docs/support.md shows it."""
    rows = [f"| {refusal.feature} | {refusal.advice} |" for refusal in REFUSALS]
    return "\n".join(["| Not supported | What to do |", "| --- | --- |", *rows])
