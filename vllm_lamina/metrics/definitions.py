"""Every metric of Lamina, declared once: the registry, the documentation and the tests derive from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PREFIX = "vllm:lamina_"

STATES = ("attending", "appending", "waiting", "idle")
"""What an attention worker's serving thread does: label ``state`` of ``worker_seconds``."""


@dataclass(frozen=True)
class Metric:
    """One metric, ``vllm:lamina_NAME``.

    Attributes
    ----------
    name
        A counter is exposed as ``NAME_total``, a histogram as ``NAME_bucket``, ``NAME_sum`` and ``NAME_count``.
    labels
        Beside vLLM's ``model_name`` and ``engine``.
    alert
        When a person should look; empty where the value alone says nothing.
    """

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    meaning: str
    alert: str = ""
    labels: tuple[str, ...] = ()

    @property
    def exposed_name(self) -> str:
        """The name in ``/metrics``, of a histogram without its suffixes."""
        return PREFIX + self.name + ("_total" if self.kind == "counter" else "")


WORKER = ("worker",)

METRICS: tuple[Metric, ...] = (
    Metric("workers", "gauge", "workers", "Attention workers that the engine uses."),
    Metric(
        "workers_up",
        "gauge",
        "workers",
        "Attention workers that answer and serve an engine.",
        "below `lamina_workers` for a minute",
    ),
    Metric(
        "recoveries",
        "counter",
        "recoveries",
        "Losses of an attention worker that the engine survived.",
        "any",
    ),
    Metric(
        "requests_recomputed",
        "counter",
        "requests",
        "Requests whose KV cache was lost with an attention worker and computed again.",
    ),
    Metric(
        "tokens_recomputed",
        "counter",
        "tokens",
        "Tokens whose KV cache was lost with an attention worker and computed again.",
        "a rate near that of `vllm:prompt_tokens_total`: the engine repeats its work",
    ),
    Metric("steps", "counter", "steps", "Steps of the model worker, of all batches in flight."),
    Metric(
        "batches_in_flight",
        "gauge",
        "batches",
        "Batches with running requests: 2 while they are staggered, 1 where one is faster.",
    ),
    Metric(
        "exchange_wait_seconds",
        "histogram",
        "seconds",
        "The model worker's wait for the output of one layer, with nothing else to do: one value for each layer of a "
        "step. Time in which another batch uses the model worker is not counted.",
        "the 99th percentile at ten times its usual value: the network or an attention worker is slow",
    ),
    Metric(
        "model_worker_busy_seconds",
        "counter",
        "seconds",
        "Time that the model worker computed (rank 0 of a tensor-parallel model); its rate is the busy fraction.",
    ),
    Metric(
        "worker_up",
        "gauge",
        "0 or 1",
        "Whether the attention worker answers and serves an engine.",
        "0 for a minute, at an address that is in use",
        WORKER,
    ),
    Metric(
        "worker_heartbeat_misses",
        "counter",
        "heartbeats",
        "Signs of life, for which the API server asks each second, that the attention worker did not give in time.",
        "any rate that lasts: the network or the worker's CPUs are overloaded",
        WORKER,
    ),
    Metric(
        "worker_rejected_frames",
        "counter",
        "frames",
        "Malformed messages that the attention worker dropped.",
        "any: a bug, or a stranger on the data network",
        WORKER,
    ),
    Metric(
        "worker_refused_clients",
        "counter",
        "clients",
        "Peers that the worker's control port turned away: no or another secret.",
        "any rate that lasts",
        WORKER,
    ),
    Metric(
        "worker_received_bytes",
        "counter",
        "bytes",
        "Bytes of q, k, v and step descriptions to the attention worker, headers included.",
        "a rate near the link's capacity",
        WORKER,
    ),
    Metric(
        "worker_sent_bytes",
        "counter",
        "bytes",
        "Bytes of attention output (and LSE) from the attention worker, headers included.",
        "a rate near the link's capacity",
        WORKER,
    ),
    Metric(
        "worker_kv_cache_usage_perc",
        "gauge",
        "fraction",
        "KV blocks of the attention worker that requests hold; 1 means all.",
        "above 0.95 while `vllm:num_preemptions_total` grows: more memory is needed",
        WORKER,
    ),
    Metric(
        "worker_kv_cache_bytes",
        "gauge",
        "bytes",
        "Size of the attention worker's KV pool, of the blocks that this engine has there.",
        "",
        WORKER,
    ),
    Metric(
        "worker_seconds",
        "counter",
        "seconds",
        "Time of the attention worker by state: `attending`, `appending`, `waiting` (for the next message of a step), "
        "`idle` (no step in flight). The rates of the first two are the busy fraction; what all are short of 1 is the "
        "handling of messages, and what else the system runs on its CPUs.",
        "`attending` above 0.9: attention limits the throughput",
        (*WORKER, "state"),
    ),
    Metric("worker_steps", "counter", "steps", "Steps in which the attention worker had a part.", "", WORKER),
    Metric(
        "worker_tokens_appended",
        "counter",
        "tokens",
        "Tokens whose k and v the attention worker stored; a token counts once in each layer.",
        "",
        WORKER,
    ),
)


def metrics_table() -> str:
    """The metrics as a Markdown table, as docs/metrics.md shows it."""
    rows = [
        f"| `{metric.exposed_name}`{_labels(metric)} | {metric.kind} | {metric.unit} | {metric.meaning} "
        f"| {metric.alert} |"
        for metric in METRICS
    ]
    return "\n".join(
        ["| Metric | Type | Unit | Meaning | Alert on |", "| --- | --- | --- | --- | --- |", *rows]
    )


def _labels(metric: Metric) -> str:
    return " by " + ", ".join(f"`{label}`" for label in metric.labels) if metric.labels else ""
