"""Writes the commands that start a deployment, and says what of it this release of vllm-lamina cannot run yet."""

from __future__ import annotations

from pathlib import Path

from vllm_lamina.planner.cost import MEMORY_UTILISATION
from vllm_lamina.planner.deployment import Deployment, Lamina
from vllm_lamina.planner.models import Model

PORT = 7100
_MODEL_WORKER_KINDS = ("cpu",)
_ATTENTION_WORKER_KINDS = ("cpu",)
_MAX_BATCHES = 2


def model_to_serve(argument: str, model: Model) -> str:
    """What to give `vllm serve`: the directory of a config.json, or the model's name on the hub."""
    if argument.endswith("config.json"):
        return str(Path(argument).parent)
    return model.name if "/" in model.name else argument


def commands(deployment: Deployment, model_argument: str, max_sequences: int) -> list[str]:
    """Return the shell commands, attention workers first, each headed by where to run it."""
    compute = deployment.compute
    serve = f"vllm serve {model_to_serve(model_argument, deployment.model)} --max-num-seqs {max_sequences}"
    if compute.tensor_parallel > 1:
        serve += f" --tensor-parallel-size {compute.tensor_parallel}"
    if not isinstance(deployment, Lamina):
        return [f"# on {compute.tensor_parallel} x {compute.device.name}", serve]
    memory = int(MEMORY_UTILISATION * deployment.attention_device.memory_bytes / 1e9)
    hosts = [f"attention-{index}" for index in range(deployment.attention_workers)]
    lamina = f"--executor lamina --lamina-batches {deployment.lanes}"
    where = hosts[0] if len(hosts) == 1 else f"each of {hosts[0]} to {hosts[-1]}"
    return [
        f"# on {where}, with one {deployment.attention_device.name}",
        f"vllm-lamina worker --listen 0.0.0.0:{PORT} --memory {memory}GB --secret-file lamina.secret",
        f"# on {deployment.model_workers} x {compute.device.name}",
        f"{serve} {lamina} --lamina-workers {','.join(f'{host}:{PORT}' for host in hosts)} "
        "--lamina-secret-file lamina.secret",
    ]


def limits(deployment: Deployment) -> list[str]:
    """Return what the deployment needs that this release does not do; empty if it can run."""
    if not isinstance(deployment, Lamina):
        return []
    missing = []
    if deployment.compute.device.kind not in _MODEL_WORKER_KINDS:
        missing.append(
            f"model workers on {deployment.compute.device.key} (CUDA is written and has not been run)"
        )
    if deployment.attention_device.kind not in _ATTENTION_WORKER_KINDS:
        missing.append(f"attention workers on {deployment.attention_device.key} (they run on CPUs)")
    if deployment.lanes > _MAX_BATCHES:
        missing.append(f"{deployment.lanes} staggered batches ({_MAX_BATCHES} at most)")
    return missing
