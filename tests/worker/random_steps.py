"""Random requests of one lane, over blocks of one worker or of several."""

from __future__ import annotations

import itertools
import random

import numpy as np
from engine import Engine, Request


class Workload:
    """Random requests of one lane: prompts in chunks, then decodes; each step is checked.

    ``pieces`` are ranges of block ids. A request takes its blocks, those of all groups of layers, from one of them, or
    from anywhere. Blocks that no layer of a group can see any more go to others, and the request has block 0 there.
    """

    def __init__(self, engine: Engine, pieces: list[range], seed: int) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.free = [list(piece) for piece in pieces]
        self.requests: list[tuple[Request, int]] = []  # and the length of its prompt

    def _take_blocks(self, count: int, piece: int | None) -> list[int] | None:
        blocks: list[int] = []
        for _ in range(count):
            candidates = [ids for ids in ([self.free[piece]] if piece is not None else self.free) if ids]
            if not candidates:
                self._give_back(blocks)
                return None
            ids = self.random.choice(candidates)
            blocks.append(ids.pop(self.random.randrange(len(ids))))
        return blocks

    def _give_back(self, blocks: list[int]) -> None:
        for block in blocks:
            self.free[self.random.randrange(len(self.free))].append(block)

    def _arrive(self) -> None:
        piece = self.random.choice([None, *range(len(self.free))])
        prompt = self.random.choice([1, 20, 32, 33, 100, 170])
        tables: list[list[int]] = []
        for group in self.engine.geometry.groups:
            blocks = self._take_blocks(-(-(prompt + 10) // group.block_size), piece)
            if blocks is None:
                self._give_back(list(itertools.chain(*tables)))
                return
            tables.append(blocks)
        self.requests.append((Request(0, 0, tables[0], tables[1:]), prompt))

    def _leave_behind(self, request: Request) -> None:
        """As the scheduler does: what the next token does not see, later ones do not see either."""
        for group, blocks in zip(self.engine.geometry.groups, request.tables, strict=True):
            first = max(0, request.context - group.window + 1) if group.window else 0
            if group.chunk:
                first = max(first, request.context // group.chunk * group.chunk)
            passed = range(min(first // group.block_size, len(blocks)))
            self._give_back([blocks[i] for i in passed if blocks[i]])
            for i in passed:
                blocks[i] = 0

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
            self._leave_behind(request)
        done = [entry for entry in self.requests if entry[0].context >= entry[1] + 10]
        for request, _ in done:
            self._give_back([block for blocks in request.tables for block in blocks if block])
        self.requests = [entry for entry in self.requests if entry not in done]


def ranges(counts: list[int]) -> list[range]:
    """Of as many block ids; 0 is nobody's."""
    ends = np.cumsum([0, *counts]).tolist()
    return [range(max(begin, 1), end) for begin, end in itertools.pairwise(ends)]
