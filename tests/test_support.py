"""The table of refused features in the docs is the one that the code checks."""

from pathlib import Path

import pytest

from vllm_lamina.errors import UnsupportedError
from vllm_lamina.support import LayerOptions, check_layer, support_table

DOCS = Path(__file__).parents[1] / "docs" / "support.md"

PLAIN = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_size": 64,
    "attn_type": "decoder",
    "kv_cache_dtype": "auto",
    "other": (),
}


def test_the_docs_show_the_table() -> None:
    begin, end = "<!-- support table: begin -->\n", "<!-- support table: end -->"
    shown = DOCS.read_text().split(begin)[1].split(end)[0]
    assert shown.strip() == support_table(), f"paste the output of support_table() into {DOCS.name}"


def test_plain_causal_attention_is_accepted() -> None:
    check_layer(LayerOptions(**PLAIN))


@pytest.mark.parametrize(
    ("option", "value", "feature"),
    [
        ("attn_type", "encoder_only", "encoder models"),
        ("kv_cache_dtype", "fp8", "quantised KV cache"),
        ("head_size", 40, "head sizes other than"),
        ("head_size", 528, "head sizes other than"),
        ("other", ("chunk_lookback",), "other attention options"),
    ],
)
def test_a_layer_that_needs_more_is_refused(option: str, value: object, feature: str) -> None:
    with pytest.raises(UnsupportedError, match=f"Lamina does not support {feature}"):
        check_layer(LayerOptions(**{**PLAIN, option: value}))


def test_latent_attention() -> None:
    latent = PLAIN | {"num_kv_heads": 1, "head_size": 576, "latent_size": 512}
    check_layer(LayerOptions(**latent))
    for change, feature in (
        ({"head_size": 1040}, "latent rows"),
        ({"latent_size": 40}, "latent rows"),
        ({"indexer": object()}, "sparse attention by an indexer"),
        ({"device_type": "cuda"}, "multi-head latent attention .* on GPUs"),
    ):
        with pytest.raises(UnsupportedError, match=f"Lamina does not support {feature}"):
            check_layer(LayerOptions(**latent | change))
