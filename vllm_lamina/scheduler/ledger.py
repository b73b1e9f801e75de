"""The steps in flight, and what failed ones leave unwritten: whose part of a step is lost, and who relies on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Set

from vllm_lamina.compat.kv_blocks import Span


class StepLedger:
    """What each step in flight writes, request by request: steps end in the order in which they begin.

    vLLM takes the blocks of a step for filled when it schedules the step. One that fails leaves them behind unwritten,
    while other requests may have hit them as a cached prefix. The output of a step that reads them is not believed, and
    what that step writes counts as unwritten too.
    """

    def __init__(self) -> None:
        self._writing: deque[Mapping[str, Span]] = deque()
        """Of each step in flight and each request what it writes."""
        self._unwritten: dict[int, int] = {}
        """Blocks that lack something since the last `clear`, and the first slot of each that is not written."""
        self.lost: set[str] = set()
        """Requests whose part of a step was lost since the last `clear`."""
        self.failed = False
        """A step has failed since the last `clear`."""

    @property
    def in_flight(self) -> int:
        """Number of steps that have begun and not ended."""
        return len(self._writing)

    @property
    def unwritten(self) -> Set[int]:
        """Blocks that lack something that a lost part of a step was to write."""
        return self._unwritten.keys()

    def begin(self, spans: Mapping[str, Span]) -> None:
        """A step was scheduled that computes these tokens of these requests."""
        self._writing.append(spans)

    def end(self, failed: bool, held: Callable[[str], Span]) -> list[str]:
        """The oldest step has ended; returns the requests whose part of it is lost, to be taken back.

        Parameters
        ----------
        failed
            It was not completed.
        held
            All tokens of a request that count as computed, this step's included.
        """
        step = self._writing.popleft()
        lost: list[str] = []
        if failed:
            self.failed = True
            lost = list(step)
        elif self._unwritten:
            for name, (_, end, _) in step.items():
                # One that holds less than the step left it with has given blocks up since; it may have relied on them.
                if (holds := held(name))[1] < end or self.relies_on_unwritten(holds):
                    lost.append(name)
        for name in lost:
            begin, _, blocks = step[name]
            for first_token, block in blocks:
                # An earlier step's slot comes first.
                self._unwritten.setdefault(block, max(0, begin - first_token))
        self.lost.update(lost)
        return lost

    def relies_on_unwritten(self, held: Span) -> bool:
        """Whether some of these tokens are unwritten, although they count as computed."""
        _, end, blocks = held
        return any(
            first_token + self._unwritten[block] < end
            for first_token, block in blocks
            if block in self._unwritten
        )

    def clear(self) -> None:
        """Nobody relies on what was unwritten any more, nor can hit it."""
        self._unwritten.clear()
        self.lost.clear()
        self.failed = False
