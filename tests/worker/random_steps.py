"""Random requests of one lane, over blocks of one worker or of several."""

from __future__ import annotations

import itertools
import random

import numpy as np
from engine import Engine, Request


class Workload:
    """Random requests of one lane: prompts in chunks, then decodes; each step is checked.

    ``pieces`` are ranges of block ids. A request takes its blocks from one of them, or from anywhere.
    """

    def __init__(self, engine: Engine, pieces: list[range], seed: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.free = [list(piece) for piece in pieces]
        self.requests: list[tuple[Request, int]] = []  # and the length of its prompt

    def _arrive(self) -> None:
        piece = self.random.choice([None, *range(len(self.free))])
        prompt = self.random.choice([1, 20, 32, 33, 100, 170])
        blocks: list[int] = []
        for _ in range(-(-(prompt + 10) // self.engine.geometry.block_size(0))):
            candidates = [ids for ids in ([self.free[piece]] if piece is not None else self.free) if ids]
            if not candidates:
                for block in blocks:
                    self.free[0].append(block)
                return
            ids = self.random.choice(candidates)
            blocks.append(ids.pop(self.random.randrange(len(ids))))
        self.requests.append((Request(0, 0, blocks), prompt))

    def step(self, padding: int = 0) -> None:
        if len(self.requests) < 6:
            self._arrive()
        chosen = [r for r in self.requests if self.random.random() < 0.8] or self.requests[:1]
        decodes = [r for r, prompt in chosen if r.context >= prompt]
        chunks = [(r, prompt) for r, prompt in chosen if r.context < prompt]
        for request in decodes:
            request.query = 1
        for request, prompt in chunks:
            request.query = min(prompt - request.context, self.random.choice([1, 7, 32, 90]))
        if decodes or chunks:
            self.engine.step(len(decodes), [*decodes, *(r for r, _ in chunks)], padding)
        for request, _ in chosen:
            request.context += request.query
        done = [entry for entry in self.requests if entry[0].context >= entry[1] + 10]
        for request, _ in done:
            for block in request.blocks:
                self.free[self.random.randrange(len(self.free))].append(block)
        self.requests = [entry for entry in self.requests if entry not in done]


def ranges(counts: list[int]) -> list[range]:
    ends = np.cumsum([0, *counts]).tolist()
    return [range(begin, end) for begin, end in itertools.pairwise(ends)]
