"""A model whose attention Lamina does not implement is refused at startup, by the name of the feature."""

from __future__ import annotations

import pytest
from engines import Engines, JobFailed
from jobs import Job
from models import UNSUPPORTED, ModelZoo

FEATURES = {
    "soft_cap": "attention logit soft-capping",
    "sliding_window": "sliding window attention",
    "mla": "multi-head latent attention",
    "sinks": "attention sinks",
    "alibi": "ALiBi",
    "encoder_only": "pooling models",
    "encoder_decoder": "encoder-decoder models",
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_refused(engines: Engines, model_zoo: ModelZoo, name: str) -> None:
    job = Job(model_zoo(name), [], {"max_model_len": 256}, executor="lamina")
    with pytest.raises(JobFailed, match=f"Lamina does not support .*{FEATURES[name]}"):
        engines.run(job)
