"""Reference for the planner's pipeline: every layer of every batch as an event, with first-in-first-out stages."""

from heapq import heappop, heappush


def time_between_tokens(
    *, layers: int, lanes: int, replicas: int, model: float, attention: float, steps: int = 30
) -> float:
    """Seconds per step of `lanes` equal batches in the steady state, from per-step stage times and no network.

    Slice k of batch j runs on replica (j + k) mod replicas, then attends on the shared pool.
    """
    model_free = [0.0] * replicas
    pool_free = 0.0
    slices = steps * layers
    stagger = model / replicas
    events = [(lane * stagger, lane, 0, "model") for lane in range(lanes)]
    done: list[list[float]] = [[] for _ in range(lanes)]
    while events:
        now, lane, index, stage = heappop(events)
        if stage == "model":
            replica = (lane + index) % replicas
            end = max(now, model_free[replica]) + model / layers
            model_free[replica] = end
            heappush(events, (end, lane, index, "attention"))
        else:
            pool_free = max(now, pool_free) + attention / layers
            done[lane].append(pool_free)
            if index + 1 < slices:
                heappush(events, (pool_free, lane, index + 1, "model"))
    # The second half of the run is past the start.
    half = slices // 2
    return max((times[-1] - times[half - 1]) / (slices - half) * layers for times in done)
