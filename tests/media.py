"""Random images, videos and sounds, as vLLM takes them."""

from __future__ import annotations

from typing import Any

import numpy as np

SAMPLING_RATE = 16_000


def media_of(kinds: dict[str, list[tuple[list[int], int]]]) -> dict[str, list[Any]]:
    """The inputs of a request, by their shapes and the numbers that they are random by, see `Request.media`."""
    return {kind: [one(kind, shape, seed) for shape, seed in inputs] for kind, inputs in kinds.items()}


def one(kind: str, shape: list[int], seed: int) -> Any:
    """An image of [width, height], which may be a chunk of vision, a video of [frames, width, height], or a sound of
    [samples].
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    if kind == "audio":
        return rng.standard_normal(shape[0], np.float32), SAMPLING_RATE
    *frames, width, height = shape
    pixels = rng.integers(0, 256, (*frames, height, width, 3), np.uint8)
    if not frames:
        image = Image.fromarray(pixels)
        return {"type": "image", "image": image, "uuid": None} if kind == "vision_chunk" else image
    count = frames[0]
    metadata = {
        "fps": 2.0,
        "total_num_frames": count,
        "duration": count / 2,
        "frames_indices": [*range(count)],
    }
    return pixels, metadata | {"do_sample_frames": False}
