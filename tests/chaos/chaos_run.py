"""One run: a server and its attention workers, clients, storms, and what must be true in the end."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import traceback
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from clients import MODEL
from footprint import Footprint, descriptors, footprint
from layouts import EMBEDDED, HOSTS, Layout
from network import hosts
from outcome import FAILURES_SHOWN, Outcome
from questions import Question
from server import ServerFailed, VllmServer
from storms import Disturbance, Kind, Storm, storms
from traffic import Traffic
from victims import (
    EMBEDDED_WORKER,
    ENGINE,
    WORKER_MEMORY,
    EmbeddedVictim,
    Paused,
    RemoteVictim,
    Victim,
    matching,
    remote_victims,
)

from vllm_lamina.transport.secret import write_secret

USERS = 12
WARM_UP = 40
"""Requests at once, before anything is measured or disturbed."""

RECOVERY_DEADLINE = 60.0
"""Seconds from the end of a storm to the answer to a new question: for as long the engine tries."""

SETTLED = 20.0
"""Seconds that the engine has to give back what requests had, once there are none."""

WATCH_SECONDS = 0.5

MAX_MODEL_LEN = 2048
ENGINE_FLAGS = (
    *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"),
    *("--gpu-memory-utilization", "0.1", "--served-model-name", MODEL),
    *("--executor", "lamina", "--lamina-stagger", "always"),
)

OF_RECOVERY = re.compile(r"Lamina: .*(lost|again|going on|takes the place|recovery took|in place of)")
"""What the log says that helps to understand a failure."""

RECOVERY_TOOK = re.compile(r"Lamina: recovery took ([\d.]+) s")


class Hopeless(Exception):
    """The run need not go on; the message says why."""


def run(
    layout: Layout,
    seed: int,
    seconds: float,
    model: str,
    questions: Sequence[Question],
    directory: Path,
    replay: Iterable[Storm] | None = None,
    only: frozenset[Kind] = frozenset(Kind),
    tell: Callable[[str], None] = print,
) -> Outcome:
    """Run a server under storms: those given, or those of the seed for so many seconds; of
    these disturbances only those of the kinds in `only`.

    `directory` receives the logs, and `events.json`. `tell` takes a line for each thing that happens.
    """
    outcome = Outcome(layout, seed)
    weather = iter(replay) if replay is not None else _until(seconds, storms(layout, seed))
    try:
        with ExitStack() as stack:
            machines = stack.enter_context(hosts(1 + layout.num_machines)) if layout.network == HOSTS else []
            secret = directory / "lamina.secret"
            write_secret(secret)
            workers = stack.enter_context(remote_victims(layout, machines[1:], secret, directory))
            where = {"host": machines[0].address, "prefix": machines[0].prefix} if machines else {}
            flags = (*ENGINE_FLAGS, *_worker_flags(layout, workers, secret))
            server = stack.enter_context(VllmServer(model, *flags, directory=directory, **where))
            victims = workers or [EmbeddedVictim(server)]
            chosen = (storm.only(only) for storm in weather)
            asyncio.run(_Chaos(outcome, server, victims, tell).run(questions, chosen))
            log = server.log_file.read_text(errors="replace")
            outcome.logged = [line for line in log.splitlines() if OF_RECOVERY.search(line)]
            outcome.recoveries = [float(seconds) for seconds in RECOVERY_TOOK.findall(log)]
            if server.process.poll() is None:
                server.stop()
            outcome.failures += [problem for worker in workers if (problem := worker.stop()) is not None]
    except ServerFailed as error:
        outcome.failures.append(str(error))
    outcome.write_events(directory / "events.json")
    return outcome


def _until(seconds: float, weather: Iterator[Storm]) -> Iterator[Storm]:
    """Storms that begin within so many seconds of the first."""
    end: float | None = None
    for storm in weather:
        end = end or time.monotonic() + seconds
        if time.monotonic() > end:
            return
        yield storm


def _worker_flags(layout: Layout, workers: Sequence[RemoteVictim], secret: Path) -> tuple[str, ...]:
    if layout.workers == EMBEDDED:
        return ("--lamina-memory", WORKER_MEMORY)
    addresses = [worker.address for worker in workers]
    flags = ["--lamina-workers", ",".join(addresses[: layout.num_workers])]
    if layout.has_spare:
        flags += ["--lamina-spares", addresses[-1]]
    if layout.partition is not None:
        flags += ["--lamina-partition", layout.partition]
    if layout.network == HOSTS:
        flags += ["--lamina-secret-file", str(secret)]
    else:
        flags += ["--lamina-transport", layout.network]
    return tuple(flags)


class _Chaos:
    def __init__(
        self, outcome: Outcome, server: VllmServer, victims: Sequence[Victim], tell: Callable[[str], None]
    ) -> None:
        self._outcome, self._server, self._victims, self._tell_line = outcome, server, victims, tell
        self._start = time.monotonic()
        self._busy = [asyncio.Lock() for _ in victims]

    async def run(self, questions: Sequence[Question], weather: Iterator[Storm]) -> None:
        outcome = self._outcome
        async with Traffic(self._server.url, questions, outcome.seed) as traffic:
            traffic.burst(WARM_UP)
            await traffic.finish_bursts()
            before = self._footprints()
            self._start = time.monotonic()
            traffic.start_users(USERS)
            watch = asyncio.create_task(self._watch(traffic))
            course = asyncio.create_task(self._course(traffic, weather))
            done, pending = await asyncio.wait((watch, course), return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
            for task in done:
                if isinstance(error := task.exception(), Hopeless):
                    outcome.failures.append(str(error))
                elif error is not None:
                    outcome.failures.append("".join(traceback.format_exception(error)))
            outcome.seconds = time.monotonic() - self._start
            outcome.count(traffic, self._start)
        if self._engine_lives():
            await asyncio.to_thread(self._check_what_is_left, *before)

    async def _course(self, traffic: Traffic, weather: Iterator[Storm]) -> None:
        for storm in weather:
            self._outcome.storms.append(storm)
            begin = time.monotonic()
            async with asyncio.TaskGroup() as group:
                for disturbance in storm.disturbances:
                    group.create_task(self._disturb(begin, disturbance, traffic))
            over = time.monotonic()
            try:
                probe = await traffic.probe(RECOVERY_DEADLINE)
            except TimeoutError:
                raise Hopeless(
                    f"{over - self._start:.2f} s: a question asked at a storm's end was not answered within "
                    f"{RECOVERY_DEADLINE:g} s"
                ) from None
            if probe.failure is None:
                self._outcome.answered_after.append(time.monotonic() - over)
                self._tell(f"a new question answered {time.monotonic() - over:.2f} s after the storm's end")
            await asyncio.sleep(storm.calm)
        await traffic.finish()

    async def _watch(self, traffic: Traffic) -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            late = time.monotonic() - before - WATCH_SECONDS
            self._outcome.late = max(self._outcome.late, (late, before - self._start))
            if not self._engine_lives():
                await asyncio.sleep(2.0)  # its clients are told
                raise Hopeless(f"{time.monotonic() - self._start:.2f} s: the engine ended")
            if len(traffic.failures) > FAILURES_SHOWN:
                raise Hopeless(f"{time.monotonic() - self._start:.2f} s: more failures would say nothing new")

    async def _disturb(self, begin: float, disturbance: Disturbance, traffic: Traffic) -> None:
        await asyncio.sleep(begin + disturbance.at - time.monotonic())
        async with self._alone(disturbance):
            self._tell(str(disturbance))
            self._outcome.kinds[disturbance.kind] += 1
            await self._do(disturbance, traffic)

    async def _do(self, disturbance: Disturbance, traffic: Traffic) -> None:
        match disturbance.kind:
            case Kind.BURST:
                traffic.burst(disturbance.count)
            case Kind.ABORTS:
                self._tell(f"{traffic.hang_up(disturbance.count)} clients hung up")
            case Kind.ENGINE_PAUSE:
                await self._pause(Paused(matching(self._server, ENGINE)), disturbance)
            case Kind.PAUSE:
                await self._pause(self._victims[disturbance.worker].pause(), disturbance)
            case Kind.KILL:
                await self._kill(disturbance)
            case Kind.CUT | Kind.DEAF | Kind.MUTE:
                await self._cut(disturbance)

    @contextlib.asynccontextmanager
    async def _alone(self, disturbance: Disturbance) -> AsyncIterator[None]:
        """Wait until the worker is back from an earlier disturbance: a process may take long to start."""
        if disturbance.worker < 0:
            yield
            return
        async with self._busy[disturbance.worker]:
            yield

    async def _pause(self, paused: Paused, disturbance: Disturbance) -> None:
        try:
            await asyncio.sleep(disturbance.seconds)
        finally:
            paused.resume()
        self._tell(f"end of {disturbance}")

    async def _kill(self, disturbance: Disturbance) -> None:
        victim = self._victims[disturbance.worker]
        if not victim.kill():
            self._tell(f"worker {disturbance.worker} was not there")
        if isinstance(victim, RemoteVictim):
            await asyncio.sleep(disturbance.seconds)
            await asyncio.to_thread(victim.start)
            self._tell(f"worker {disturbance.worker} was started again")

    async def _cut(self, disturbance: Disturbance) -> None:
        host = self._victims[disturbance.worker].host
        assert host is not None, "only hosts have links"
        cut = {Kind.CUT: host.cut_link, Kind.DEAF: host.lose_incoming, Kind.MUTE: host.lose_outgoing}
        await asyncio.to_thread(cut[disturbance.kind])
        try:
            await asyncio.sleep(disturbance.seconds)
        finally:
            await asyncio.to_thread(host.heal_link)
        self._tell(f"end of {disturbance}")

    def _engine_lives(self) -> bool:
        return self._server.process.poll() is None and bool(matching(self._server, "^VLLM::EngineCore"))

    def _engine_and_workers(self) -> tuple[list[int], list[int]]:
        """Process ids. An embedded worker is the worker, not the engine."""
        workers = [victim.pid for victim in self._victims if victim.pid is not None]
        return matching(self._server, ENGINE), workers

    def _footprints(self) -> tuple[Footprint, list[Footprint]]:
        engine, workers = self._engine_and_workers()
        return footprint(*engine), [footprint(pid) for pid in workers]

    def _check_what_is_left(self, engine_before: Footprint, workers_before: list[Footprint]) -> None:
        """No request is left, and no client connected."""
        outcome, server = self._outcome, self._server
        server.get("health")
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            if not _comes_true(lambda name=name: server.metric(name) == 0):
                outcome.failures.append(f"{name} is {server.metric(name):g} without a request")
        outcome.engine = engine_before, engine_before
        if not _comes_true(lambda: self._footprints()[0].is_about(engine_before)):
            engine, _ = self._engine_and_workers()
            outcome.failures.append(f"the engine gave something not back: {descriptors(*engine)}")
        outcome.engine = engine_before, self._footprints()[0]
        # Which workers the engine is connected to may have changed: each is compared with the largest.
        largest = max(workers_before, key=lambda worker: worker.descriptors)
        if not _comes_true(lambda: all(worker.is_about(largest) for worker in self._footprints()[1])):
            _, workers = self._engine_and_workers()
            holds = "; ".join(f"{footprint(pid)}: {descriptors(pid)}" for pid in workers)
            outcome.failures.append(f"a worker, at first with {largest}, gave something not back: {holds}")
        if (count := len(matching(server, EMBEDDED_WORKER))) != (outcome.layout.workers == EMBEDDED):
            outcome.failures.append(f"the engine has {count} embedded workers")

    def _tell(self, text: str) -> None:
        now = time.monotonic() - self._start
        self._outcome.happened.append((round(now, 2), text))
        self._tell_line(f"{now:8.2f} s  {text}")


def _comes_true(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + SETTLED
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True
