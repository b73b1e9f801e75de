"""`vllm serve --executor lamina` as its clients and its operator know vLLM, up to SIGTERM."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from models import ATTENTION_MODULES, MLP_MODULES, ModelZoo, create_adapter
from openai import OpenAI
from programs import LAMINA, TINY_ENGINE, process_named, session, wait_for
from server import VllmServer

MODEL = "tiny"
EMPTY_ENGINE_RSS_MIB = 1024
"""More than a model worker of a tiny model takes, less than one with this server's KV cache besides."""


@pytest.fixture(scope="module")
def server(model_zoo: ModelZoo, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    flags = (
        *TINY_ENGINE,
        "--enforce-eager",
        "--served-model-name",
        MODEL,
        *LAMINA,
        "--lamina-stagger",
        "always",
    )
    lora = ("--enable-lora", "--max-loras", "3")  # one slot more than adapters: see equality/test_lora.py
    directory = tmp_path_factory.mktemp("server")
    environment = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_OMP_THREADS_BIND": "auto"}
    environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
    with VllmServer(model_zoo("llama"), *flags, *lora, directory=directory, **environment) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: VllmServer) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=60, max_retries=0)


def get(server: VllmServer, path: str) -> str:
    with urllib.request.urlopen(f"{server.url}/{path}", timeout=60) as answer:
        return answer.read().decode()


def post(server: VllmServer, path: str, **body: str | bool) -> bytes:
    request = urllib.request.Request(
        f"{server.url}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def metric(server: VllmServer, name: str) -> float:
    """The value of a metric that has no labels but those of the engine."""
    [value] = re.findall(rf"^vllm:{name}{{[^}}]*}} (\S+)$", get(server, "metrics"), re.MULTILINE)
    return float(value)


def cpus_of_threads(pid: int) -> set[int]:
    """CPUs on which any thread of a process may run."""
    cpus: set[int] = set()
    for file in Path(f"/proc/{pid}/task").glob("*/status"):
        try:
            status = file.read_text()
        except (FileNotFoundError, ProcessLookupError):  # the thread has ended
            continue
        [allowed] = re.findall(r"^Cpus_allowed_list:\s*(\S+)$", status, re.MULTILINE)
        for part in allowed.split(","):
            first, _, last = part.partition("-")
            cpus |= set(range(int(first), int(last or first) + 1))
    return cpus


def resident_mib(pid: int) -> float:
    [kib] = re.findall(r"^VmRSS:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kib) / 1024


def test_several_sequences_of_one_request(client: OpenAI) -> None:
    options = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 8, "seed": 1, "n": 3}
    first, again = (
        [choice.text for choice in client.completions.create(**options).choices] for _ in range(2)
    )
    assert len(first) == 3
    assert len(set(first)) > 1
    assert again == first


def test_a_prompt_that_is_too_long_is_the_clients_error(server: VllmServer, client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        client.completions.create(model=MODEL, prompt=[5] * 600, max_tokens=8)
    get(server, "health")


def test_what_would_end_stock_vllm_is_the_clients_error(server: VllmServer, client: OpenAI) -> None:
    """Log-probabilities of the prompt, of an engine with LoRA on CPUs."""
    for asked in ({"extra_body": {"prompt_logprobs": 1}}, {"echo": True, "logprobs": 1}):
        with pytest.raises(
            openai.BadRequestError, match=r"prompt_logprobs is not supported .* --enable-lora"
        ):
            client.completions.create(model=MODEL, prompt="Once upon", max_tokens=2, **asked)
    assert client.completions.create(model=MODEL, prompt="Once upon", max_tokens=2, logprobs=1).choices
    get(server, "health")


def test_a_client_that_disconnects_frees_its_request(server: VllmServer, client: OpenAI) -> None:
    options = {"model": MODEL, "temperature": 0.0, "extra_body": {"ignore_eos": True}}
    alone = client.completions.create(**options, prompt="Hello", max_tokens=30).choices[0].text
    # Several times: what a disconnect meets, a step of its own batch or of the other one, is a matter of chance.
    for _ in range(8):
        streams = [
            client.completions.create(**options, prompt=f"Number {i}", max_tokens=480, stream=True)
            for i in range(4)
        ]
        for stream in streams:
            next(iter(stream))
            stream.close()
        assert client.completions.create(**options, prompt="Hello", max_tokens=30).choices[0].text == alone
    assert wait_for(lambda: metric(server, "num_requests_running") == 0, 30.0)
    assert wait_for(lambda: metric(server, "kv_cache_usage_perc") == 0, 10.0)


def test_the_prefix_cache_is_reset_under_load(server: VllmServer, client: OpenAI) -> None:
    def ask(prompt: str, began: threading.Event) -> str:
        options = {"temperature": 0.0, "max_tokens": 250, "extra_body": {"ignore_eos": True}}
        text = ""
        for chunk in client.completions.create(model=MODEL, prompt=prompt, stream=True, **options):
            began.set()
            text += chunk.choices[0].text
        return text

    prompts = [f"Number {i}" for i in range(4)]
    alone = [ask(prompt, threading.Event()) for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as pool:
        began = [threading.Event() for _ in prompts]
        answers = [pool.submit(ask, *arguments) for arguments in zip(prompts, began, strict=True)]
        assert all(event.wait(60.0) for event in began)
        for _ in range(5):
            reset = json.loads(post(server, "reset_prefix_cache?reset_running_requests=true"))
            assert reset == {"success": True}
        assert [answer.result() for answer in answers] == alone


def test_structured_output(client: OpenAI) -> None:
    """Several grammars and none at the same time."""

    def ask(name: str | None) -> str:
        form = {"type": "object", "properties": {name: {"enum": [1, 2]}}, "required": [name]}
        schema = {"name": "form", "schema": form | {"additionalProperties": False}}
        body = {"response_format": {"type": "json_schema", "json_schema": schema}} if name else {}
        return (
            client.completions.create(model=MODEL, prompt="Fill in:", max_tokens=200, extra_body=body)
            .choices[0]
            .text
        )

    names = ["lane", "worker", None, "batch", "token", None]
    with ThreadPoolExecutor(len(names)) as pool:
        texts = list(pool.map(ask, names))
    for name, text in zip(names, texts, strict=True):
        if name is not None:
            assert json.loads(text)[name] in (1, 2)


def test_adapters_come_and_go(
    server: VllmServer, client: OpenAI, model_zoo: ModelZoo, tmp_path: Path
) -> None:
    """LoRA adapters are loaded and unloaded while both batches are in flight."""

    def ask(model: str, max_tokens: int = 40) -> str:
        options = {"temperature": 0.0, "max_tokens": max_tokens, "extra_body": {"ignore_eos": True}}
        return client.completions.create(model=model, prompt="Once upon a time", **options).choices[0].text

    long = ask(MODEL, 400)
    with ThreadPoolExecutor(12) as pool:
        meanwhile = [pool.submit(ask, MODEL, 400) for _ in range(4)]
        for name, modules in (("one", ATTENTION_MODULES), ("other", MLP_MODULES)):
            adapter = create_adapter(Path(model_zoo("llama")), tmp_path / name, 8, modules, seed=1)
            post(server, "v1/load_lora_adapter", lora_name=name, lora_path=str(adapter))
        models = [MODEL, "one", "other"]
        alone = [ask(model) for model in models]
        assert len(set(alone)) == len(models)
        assert list(pool.map(ask, models * 3)) == alone * 3
        post(server, "v1/load_lora_adapter", lora_name="one", lora_path=str(adapter), load_inplace=True)
        assert ask("one") == alone[models.index("other")]
        post(server, "v1/unload_lora_adapter", lora_name="one")
        with pytest.raises(openai.NotFoundError):
            ask("one")
        assert [answer.result() for answer in meanwhile] == [long] * 4


def test_where_the_memory_and_the_threads_are(server: VllmServer) -> None:
    processes = session(server.process.pid)
    attention_worker = process_named(processes, r"vllm_lamina\.worker\.attention_worker")
    model_worker = process_named(processes, r"^VLLM::Worker")
    assert not cpus_of_threads(attention_worker) & cpus_of_threads(model_worker)
    assert "0 B on the model worker" in server.log_file.read_text()
    assert resident_mib(model_worker) < EMPTY_ENGINE_RSS_MIB


def test_sigterm_leaves_nothing(server: VllmServer) -> None:
    """The last test of the server: `VllmServer.stop` checks processes and shared memory."""
    server.stop()
    assert server.process.returncode == 0
    # Sockets between vLLM's processes, and where its workers found each other: stock vLLM leaves them too.
    assert server.temporary_files() <= {"UUID", "vllm_dist_UUID"}
