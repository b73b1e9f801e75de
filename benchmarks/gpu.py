"""The model on a GPU, measured: the questions first, then whole engines. Written without a GPU at hand.

    python -m benchmarks.gpu [--parts words exchange equality steps] [--output results]

Parts, each in processes of its own and under a time limit, so that a broken one costs only itself:

words      Does a stream see what the host writes, and the host what a stream writes, and after how long? In graphs too?
exchange   What a layer takes beyond its attention, with attention workers on this host's CPUs, one and two lanes, eager
           and captured.
equality   Tokens and log-probabilities of stock vLLM and of Lamina with one and two lanes, float32.
steps      Decode steps beside stock vLLM's, batches of 8, 64 and 256 at a context of 1024 tokens.

Prints a table; writes gpu.json and gpu.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_lamina._native import AttentionClient
from vllm_lamina.attention_backend.step import PlannedRequest, Step, StepPlan
from vllm_lamina.attention_backend.streamed_layers import StreamedLayers, memory_bytes
from vllm_lamina.device.base import Streams
from vllm_lamina.executor.sources.embedded import EmbeddedAttentionWorker
from vllm_lamina.kv_cache.geometry import Geometry
from vllm_lamina.kv_cache.partition import Partition, Pool, Share
from vllm_lamina.transport.connection import AttentionWorkerConnection

LIMITS = {"words": 40, "exchange": 90, "equality": 150, "steps": 200}
"""Seconds for each part, in this order: eight minutes in all."""

TIMEOUT = 20.0
BLOCK_SIZE = 128

Row = dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A Llama; ``heads`` are query heads, KV heads and head size."""

    hidden_size: int
    intermediate_size: int
    heads: tuple[int, int, int]
    layers: int


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    round_trips: int = 300
    widths: tuple[int, int, int] = (32, 8, 128)
    """Query heads, KV heads and head size of Llama-3-8B."""
    layers: int = 32
    exchanged_steps: int = 20
    batches: tuple[int, ...] = (8, 64, 256)
    context: int = 1024
    decoded: int = 32
    small: Model = Model(1024, 2816, (16, 4, 64), 8)
    big: Model = Model(4096, 14336, (32, 8, 128), 16)
    prompts: tuple[int, ...] = (1, 5, 17, 33, 64, 100, 129, 300, 511, 700, 1500, 3000)
    compared: int = 24
    memory: str = "16GiB"
    engine: dict[str, Any] = field(default_factory=lambda: {"max_model_len": 4096, "max_num_seqs": 256})
    stock: dict[str, Any] = field(default_factory=dict)
    """Options of stock vLLM alone."""


# What a run without a GPU has otherwise: see tests/device/gpu_on_cpu.py.
SIZES = Sizes()
PROGRAM = [sys.executable, "-m", "benchmarks.gpu"]


def make_streams() -> Streams:
    """The device's."""
    from vllm_lamina.device.cuda_streams import CudaStreams

    return CudaStreams()


def word_streams(memory: tuple[int, int]) -> Iterator[tuple[str, Any]]:
    """Streams that write words and wait for them, by the driver's operations and by kernels: None where there are none.

    ``memory`` is where the words are.
    """
    from vllm_lamina.device.cuda_streams import CudaStream, CudaStreams

    streams = CudaStreams()
    streams.register([memory])
    failed = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    for name, driver in (("kernels", None), ("driver", streams._driver)):
        is_missing = name == "driver" and driver is None
        yield name, None if is_missing else CudaStream(driver, failed, torch.cuda.current_device())


# ------------------------------------------------------------------------------------------------------------- words


def words(report: Callable[[Row], None]) -> None:
    """Round trips between a stream and a thread of the host."""
    memory = np.zeros(4096, np.uint8)
    there, back = memory.ctypes.data, memory.ctypes.data + 128
    streams = list(word_streams((memory.ctypes.data, memory.nbytes)))
    # The question that may break the process comes last.
    for captured in (False, True):
        for name, stream in streams:
            row = {"by": name, "captured": captured}
            if stream is None:
                report(row | {"error": "no cuda-bindings"})
            else:
                report(row | {"us": round_trip_us(stream, there, back, captured, SIZES.round_trips)})


def round_trip_us(stream: Any, there: int, back: int, captured: bool, times: int) -> float:
    """Microseconds from a word that the stream writes to one that it waits for, and the host writes."""

    def enqueue() -> None:
        for number in range(1, times + 1):
            stream.write(there, number)
            stream.wait(back, number)

    launch = _captured(enqueue) if captured else enqueue
    seen, answer = (ctypes.c_int32.from_address(word) for word in (there, back))
    seen.value = answer.value = 0

    def host() -> None:
        for number in range(1, times + 1):
            while seen.value < number:
                pass
            answer.value = number

    thread = threading.Thread(target=host)
    thread.start()
    begin = time.perf_counter()
    launch()
    stream.synchronize()
    elapsed = time.perf_counter() - begin
    thread.join()
    return round(elapsed / times * 1e6, 2)


def _captured(enqueue: Callable[[], None]) -> Callable[[], None]:
    """What replays it, as a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        enqueue()
    replay: Callable[[], None] = graph.replay
    return replay


# ---------------------------------------------------------------------------------------------------------- exchange


class DecodeSteps:
    """Steps of lanes in which nothing but attention is computed, each request with ``context`` tokens."""

    def __init__(
        self,
        streams: Streams,
        widths: tuple[int, int, int],
        num_layers: int,
        batch: int,
        num_lanes: int,
        captured: bool = False,
    ) -> None:
        self.batch, self.num_lanes, self.num_layers, self.captured = batch, num_lanes, num_layers, captured
        dtype = "float32" if streams.tensor((1,), torch.float32)[0].device.type == "cpu" else "bfloat16"
        scales = (widths[2] ** -0.5,) * num_layers
        self.geometry = Geometry.uniform(num_layers, BLOCK_SIZE, *widths, dtype, scales)  # type: ignore[arg-type]
        self.streams = streams

    def run(self, num_steps: int, context: int, cpus: list[int]) -> tuple[float, float]:
        """Microseconds of a layer, and of these in the attention worker: medians over steps of all lanes."""
        blocks = -(-(context + num_steps) // BLOCK_SIZE) * self.batch * self.num_lanes
        pool_bytes = self.geometry.block_bytes() * (blocks + 1) + (64 << 20)
        worker = EmbeddedAttentionWorker.start(pool_bytes, cpus)
        try:
            with AttentionWorkerConnection.connect(worker.address) as connection:
                return self._run(connection, num_steps, context, blocks)
        finally:
            worker.stop()

    def _run(
        self, connection: AttentionWorkerConnection, num_steps: int, context: int, blocks: int
    ) -> tuple[float, float]:
        ring = self.geometry.ring_bytes(self.batch, self.batch, context + num_steps + 1)
        ring += memory_bytes(self.geometry, self.num_lanes, self.batch)
        connection.configure(self.geometry, blocks, ring_bytes=ring, spin_us=2000, worker_spin_us=2000)
        share = Share(Pool("", 0), self.geometry, self.geometry.block_bytes(), blocks)
        partition = Partition("head", "one worker", self.geometry, (share,))
        client = AttentionClient([connection.channel], partition.to_native())
        layers = StreamedLayers(
            client, self.streams, partition, self.num_lanes, self.batch, spin_us=2000, timeout=TIMEOUT
        )
        took: list[float] = []
        attention: list[float] = []
        lanes = [
            threading.Thread(
                target=self._lane,
                args=(layers, client, lane, self._model(layers, lane), num_steps, context, took, attention),
            )
            for lane in range(self.num_lanes)
        ]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
        if len(took) < num_steps * self.num_lanes:
            raise RuntimeError("a lane ended before its last step")
        return statistics.median(took), statistics.median(attention)

    def _model(self, layers: StreamedLayers, lane: int) -> Callable[[Step], None]:
        """What enqueues a step's layers, in buffers that stay."""
        cache = self.geometry.caches[0]
        heads, kv_heads, size = self.geometry.layers[0].num_heads, cache.num_kv_heads, cache.head_size
        dtype = getattr(torch, cache.dtype)
        q, _ = self.streams.tensor((self.batch, heads, size), dtype)
        kv, _ = self.streams.tensor((self.batch, kv_heads, size), dtype)
        out, _ = self.streams.tensor((self.batch, heads, size), dtype)

        def capture() -> None:
            for layer in range(self.num_layers):
                layers.capture(lane, layer, q, kv, kv, out)

        def attend(step: Step) -> None:
            for layer in range(self.num_layers):
                layers.attend(lane, step, layer, q, kv, kv, out, _no_chunks)

        if not self.captured:
            return attend
        # Here, not on the lanes' threads: nothing else may go to the device meanwhile.
        replay = _captured(capture)
        return lambda step: replay()

    def _lane(
        self,
        layers: StreamedLayers,
        client: AttentionClient,
        lane: int,
        model: Callable[[Step], None],
        num_steps: int,
        context: int,
        took: list[float],
        attention: list[float],
    ) -> None:
        layers.enter(lane)
        each = -(-(context + num_steps) // BLOCK_SIZE)
        first = lane * self.batch * each
        for number in range(num_steps):
            requests = {
                f"{i}": PlannedRequest(
                    context + number,
                    1,
                    (np.arange(first + i * each, first + (i + 1) * each, dtype=np.int32),),
                )
                for i in range(self.batch)
            }
            step = Step(StepPlan(requests, lambda names=tuple(requests): names), self.geometry)
            begin = time.perf_counter()
            layers.announce(lane)
            layers.begin(lane)
            layers.prepare(lane, step)
            model(step)
            layers.wait(lane)
            layers.end(lane)
            layers.synchronize(lane)
            took.append((time.perf_counter() - begin) / self.num_layers * 1e6)
            attention.append(client.step_times(lane)[1] / self.num_layers * 1e6)
            if (failure := layers.take_failure(lane)) is not None:
                raise RuntimeError(failure)


def _no_chunks(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    raise AssertionError("decodes alone have no prefill chunk")


def exchange(report: Callable[[Row], None]) -> None:
    """At the widths of an 8B model."""
    cpus = sorted(os.sched_getaffinity(0))
    cpus = cpus[2:] or cpus[-1:]
    for captured in (False, True):
        for batch in SIZES.batches:
            for num_lanes in (1, 2):
                steps = DecodeSteps(make_streams(), SIZES.widths, SIZES.layers, batch, num_lanes, captured)
                took, attention = steps.run(SIZES.exchanged_steps, 100, cpus)
                case = {"batch": batch, "lanes": num_lanes, "captured": captured}
                report(case | {"layer us": took, "of these attention": attention})


# ----------------------------------------------------------------------------------------------------------- engines

SYSTEMS = {
    "stock": {},
    "one lane": {"executor": "lamina", "lamina_batches": 1},
    "two lanes": {"executor": "lamina", "lamina_batches": 2, "lamina_stagger": "always"},
}


def equality(report: Callable[[Row], None]) -> None:
    """Prompts of 1 to 3000 tokens, twice, so that the second time they are in the prefix cache."""
    model = _model("small", SIZES.small)
    outputs = {
        name: _in_process("tokens", str(model), json.dumps(options)) for name, options in SYSTEMS.items()
    }
    for name in list(SYSTEMS)[1:]:
        report({"system": name, **compare(outputs["stock"], outputs[name])})


def compare(expected: list[Any], actual: list[Any]) -> Row:
    """How many outputs, [tokens, log-probabilities] each, have the same tokens; and how far the log-probabilities are
    apart up to the first token that differs.
    """
    equal, worst = 0, 0.0
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(expected, actual, strict=True):
        same = next(
            (i for i, pair in enumerate(zip(tokens, other_tokens, strict=True)) if pair[0] != pair[1]),
            len(tokens),
        )
        equal += same == len(tokens)
        distances = (abs(a - b) for a, b in zip(logprobs[:same], other_logprobs[:same], strict=True))
        worst = max([worst, *distances])
    return {"equal": f"{equal} of {len(expected)}", "log-probabilities apart": worst}


def steps(report: Callable[[Row], None]) -> None:
    """An 8B model's widths, half of its layers, random weights."""
    model = _model("big", SIZES.big)
    for name, options in SYSTEMS.items():
        for row in _in_process("decode", str(model), json.dumps(options)):
            report({"system": name, **row})


def _tokens(model: str, options: str) -> list[Any]:
    llm = _engine(model, dtype="float32", **json.loads(options))
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": rng.integers(5, 1000, length).tolist()} for length in SIZES.prompts]
    outputs = []
    for _ in range(2):
        for request in llm.generate(prompts, _params(SIZES.compared, logprobs=1), use_tqdm=False):
            completion = request.outputs[0]
            logprobs = [next(iter(choices.values())).logprob for choices in completion.logprobs]
            outputs.append([list(completion.token_ids), logprobs])
    return outputs


def _decode(model: str, options: str) -> Iterator[Row]:
    begin = time.perf_counter()
    llm = _engine(model, dtype="bfloat16", load_format="dummy", **json.loads(options))
    started = time.perf_counter() - begin
    rng = np.random.default_rng(0)
    for batch in SIZES.batches:
        prompts = [{"prompt_token_ids": rng.integers(5, 1000, SIZES.context).tolist()} for _ in range(batch)]

        def seconds(num_tokens: int, prompts: list[Any] = prompts) -> float:
            begin = time.perf_counter()
            llm.generate(prompts, _params(num_tokens), use_tqdm=False)
            return time.perf_counter() - begin

        seconds(2)
        # The prompts are in the prefix cache now: the difference is decoding.
        step = (seconds(SIZES.decoded + 2) - seconds(2)) / SIZES.decoded
        yield {"batch": batch, "step ms": step * 1e3, "started in s": started}


def _params(num_tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, **more)


def _engine(model: str, **options: Any) -> Any:
    from vllm import LLM

    options |= {"lamina_memory": SIZES.memory} if "executor" in options else SIZES.stock
    return LLM(model, skip_tokenizer_init=True, gpu_memory_utilization=0.5, seed=0, **SIZES.engine, **options)


def _model(name: str, model: Model) -> Path:
    """With random weights; of the big one the configuration alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = Path(os.environ.get("TMPDIR", "/tmp")) / f"lamina-gpu-{name}"
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads[0],
        num_key_value_heads=model.heads[1],
        head_dim=model.heads[2],
        max_position_embeddings=32768,
        initializer_range=0.05,
        architectures=["LlamaForCausalLM"],
    )
    if name == "small":
        torch.manual_seed(0)
        LlamaForCausalLM(config).float().save_pretrained(directory)
    else:
        config.save_pretrained(directory)
    return directory


def _in_process(function: str, *arguments: str) -> Any:
    """What a function of this file returns, called in a process of its own: a GPU's memory is free again then."""
    command = [*PROGRAM, "--call", function, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{function} ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


# -------------------------------------------------------------------------------------------------------------- parts

PARTS: dict[str, Callable[[Callable[[Row], None]], None]] = {
    "words": words,
    "exchange": exchange,
    "equality": equality,
    "steps": steps,
}


def run_parts(parts: list[str], report: Callable[[str, Row], None]) -> None:
    """Each in a process, whose lines are its rows; what it has said when its time is over stands."""
    for part in parts:
        command = [*PROGRAM, "--part", part]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
            is_late = threading.Event()

            def end(child: Any = child, is_late: threading.Event = is_late) -> None:
                is_late.set()
                os.killpg(child.pid, signal.SIGKILL)

            limit = threading.Timer(LIMITS[part], end)
            limit.start()
            assert child.stdout is not None
            for line in child.stdout:
                if line.startswith("{"):
                    report(part, json.loads(line))
            status = child.wait()
            limit.cancel()
        if is_late.is_set():
            report(part, {"error": f"not over after {LIMITS[part]:g} s"})
        elif status != 0:
            report(part, {"error": f"status {status}"})


def page(described: dict[str, str], rows: list[tuple[str, Row]]) -> str:
    """What was measured, as Markdown: a table for each part."""
    lines = [", ".join(f"{name}: {value}" for name, value in described.items()), ""]
    for part in dict.fromkeys(part for part, _ in rows):
        of_part = [row for other, row in rows if other == part]
        columns = list(dict.fromkeys(name for row in of_part for name in row))
        lines += [f"**{part}**", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(_cell(row.get(name, '')) for name in columns)} |" for row in of_part]
        lines.append("")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe() -> dict[str, str]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "commit": os.environ.get("LAMINA_COMMIT") or commit.stdout.strip() or "unknown",
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": time.strftime("%Y-%m-%d"),
        "CPUs": str(len(os.sched_getaffinity(0))),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--output", type=Path, default=Path("results"), help="directory for gpu.json and gpu.md"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--call", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return PARTS[args.part](lambda row: print(json.dumps(row), flush=True))
    if args.call:
        function = {"tokens": _tokens, "decode": _decode}[args.call[0]]
        print(json.dumps(list(function(*args.call[1:]))), flush=True)
        os._exit(0)
    rows: list[tuple[str, Row]] = []

    def report(part: str, row: Row) -> None:
        rows.append((part, row))
        print(part, row, flush=True)

    described = describe()
    try:
        run_parts(args.parts, report)
    finally:
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "gpu.json").write_text(
            json.dumps({"machine": described, "rows": rows}, indent=2) + "\n"
        )
        (args.output / "gpu.md").write_text(page(described, rows))
        print(page(described, rows))
    return None


if __name__ == "__main__":
    main()
