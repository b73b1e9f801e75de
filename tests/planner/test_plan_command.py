"""The command line of the planner: answers, JSON, errors that help."""

import json
import re
from pathlib import Path

import pytest

from vllm_lamina.cli import main

FAST = ["--requests", "200", "--devices", "h100,h20", "--trace", "azure-code"]


def plan(*args: str) -> int:
    return main(["plan", *args])


def config(path: Path, **changes: object) -> Path:
    values = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
    } | changes
    (path / "config.json").write_text(json.dumps(values))
    return path


def test_answer_in_words(capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    plot = tmp_path / "plan.png"
    model = str(config(tmp_path) / "config.json")
    assert plan("--model", model, *FAST, "--plot", str(plot)) == 0
    text = capsys.readouterr().out
    assert "DISAGGREGATE" in text
    assert f"vllm serve {tmp_path}" in text
    assert "2026-05" in text
    assert plot.stat().st_size > 5_000


def test_answer_as_json(capsys) -> None:  # type: ignore[no-untyped-def]
    assert plan("--model", "llama3-70b", *FAST, "--json", "--prices", "paper") == 0
    found = json.loads(capsys.readouterr().out)
    assert isinstance(found["disaggregate"], bool)
    split = next(c for c in found["candidates"] if c["lamina"])
    assert split["commands"][1].startswith("vllm-lamina worker --listen 0.0.0.0:7100 --memory 86GB")
    assert " --executor lamina --lamina-batches " in split["commands"][3]
    assert "--lamina-workers attention-0:7100" in split["commands"][3]
    assert split["not_in_this_release"]
    alone = next(c for c in found["candidates"] if not c["lamina"])
    assert alone["commands"][1].startswith("vllm serve meta-llama/Meta-Llama-3-70B --max-num-seqs")
    assert alone["not_in_this_release"] == []


LLAMA = ["--model", "llama3-70b"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "llama3-7b"], "unknown model 'llama3-7b'; did you mean llama3-70b"),
        (["--model", "x" * 5000], "unknown model 'xxx"),
        (["--model", "/nowhere/config.json"], "cannot read the model's configuration"),
        ([], "which model"),
        ([*LLAMA, "--devices", "h10,h20"], "unknown device 'h10'; did you mean"),
        ([*LLAMA, "--devices", ""], "unknown device ''; Known"),
        ([*LLAMA, "--devices", "h100,xeon-6900p"], "no price is known for xeon-6900p .*--price"),
        ([*LLAMA, "--devices", "a10", "--prices", "paper"], "no price of the paper is known for a10"),
        ([*LLAMA, "--devices", "a10", "--budget", "2/h"], "do not fit on .* at least 7"),
        ([*LLAMA, "--price", "h2=1"], "unknown device 'h2'; did you mean"),
        ([*LLAMA, "--trace", "kimi"], "unknown trace 'kimi'; did you mean kimi-"),
        ([*LLAMA, "--trace", "/nowhere/a.csv"], "cannot read the trace /nowhere/a.csv: No such file"),
        ([*LLAMA, "--transport", "tcp"], "unknown transport 'tcp'"),
        ([*LLAMA, "--catalogue", "/nowhere/own.toml"], "cannot read /nowhere/own.toml: No such file"),
        (["calibrate", "--output", "host.toml", "--cpus", "0"], "--cpus '0' must name both workers' CPUs"),
        (["calibrate", "--output", "host.toml", "--cpus", "a;b"], "--cpus 'a;b': 'a' is not a list of CPUs"),
        (
            ["calibrate", "--output", "host.toml", "--cpus", "0;99999"],
            "--cpus '0;99999' names CPUs .*: 99999",
        ),
    ],
)
def test_errors_help(capsys, args: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    assert plan(*args) == 2
    assert_one_line(capsys.readouterr().err, message)


def assert_one_line(error: str, message: str) -> None:
    assert error.count("\n") == 1, error
    assert re.search(message, error), error


@pytest.mark.parametrize("value", ["0", "-1", "-0.5", "nan", "inf", "-inf", "1e400", "cheap", "", "9" * 5000])
@pytest.mark.parametrize("option", ["--rate", "--budget", "--tbt-slo", "--requests", "--price"])
def test_numbers_that_cannot_be_are_refused(capsys, option: str, value: str) -> None:  # type: ignore[no-untyped-def]
    text = f"h20={value}" if option == "--price" else value
    with pytest.raises(SystemExit, match="2"):
        plan(*LLAMA, f"{option}={text}")
    assert f"error: argument {option}: {text!r} is not" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rate", "-1"], "--rate: '-1' is not a number of requests per second, such as 200"),
        (["--rate"], "--rate: expected one argument"),
        (["--requests", "1.5"], "--requests: '1.5' is not a whole number above 0"),
        (["--budget", "45/min"], "--budget: '45/min' is not an amount per hour, such as 45/h"),
        (["--tbt-slo", "100us"], "--tbt-slo: '100us' is not a time, such as 100ms or 0.1s"),
        (["--price", "h20"], "--price: 'h20' is not DEVICE=USD, such as h20=1.10"),
        (["--prices", "old"], "--prices: invalid choice: 'old'"),
        (["--plot", "/nowhere/plan.png"], "--plot: '/nowhere/plan.png' is not a file that can be written"),
        (["--plot", ""], "--plot: '' is not a file that can be written"),
        (["calibrate", "--output", "/"], "--output: '/' is not a file that can be written"),
        (["calibrate"], "required: --output"),
    ],
)
def test_other_values_that_the_parser_refuses(capsys, args: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit, match="2"):
        plan(*LLAMA, *args)
    assert message in capsys.readouterr().err.splitlines()[-1]


H100, AZURE = "[device.h100]\n", "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def mooncake(timestamp: object = 0, prompt: object = 5, output: object = 6) -> str:
    return f'{{"timestamp": {timestamp}, "input_length": {prompt}, "output_length": {output}}}\n'


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--model x.json", "", "x.json is not valid JSON"),
        ("--model x.json", "[]", "x.json holds no JSON object"),
        ("--model x.json", "{}", "the configuration of x has no 'hidden_size'"),
        ("--model x.json", b"\xff", "x.json is not valid JSON"),
        ("--model x.json", '{"hidden_size": -1}', "hidden_size of x must be a whole number above 0, not -1"),
        ("--model x.json", '{"hidden_size": NaN}', "hidden_size of x must be .* not nan"),
        ("--model x.json", '{"hidden_size": "wide"}', "hidden_size of x must be .* not 'wide'"),
        ("--trace x.csv", "", "trace 'x' has no requests"),
        ("--trace x.csv", AZURE, "trace 'x' has no requests"),
        ("--trace x.csv", b"\xff\xfe", "x.csv is not an Azure trace .*: request 1: 'utf-8' codec"),
        ("--trace x.csv", "TIME,Tokens\n1,2\n", "x.csv is not an Azure trace .*: request 1: no 'TIMESTAMP'"),
        ("--trace x.csv", AZURE + "today,1,2\n", "request 1: Invalid isoformat string: 'today'"),
        ("--trace x.csv", AZURE + "2024-05-12,1\n", "request 1: invalid literal for int.* ''"),
        ("--trace x.csv", AZURE + "2024-05-12,1,2\n2024-05-12,1,-2\n", "request 2: '-2' tokens"),
        ("--trace x.jsonl", "", "trace 'x' has no requests"),
        ("--trace x.jsonl", mooncake() + "{\n", "x.jsonl is not a Mooncake trace .*: request 2: not JSON"),
        ("--trace x.jsonl", "7\n", "request 1: not an object of numbers"),
        ("--trace x.jsonl", mooncake(timestamp="NaN"), "request 1: arrival at nan"),
        ("--trace x.jsonl", mooncake(prompt="null"), "request 1: not an object of numbers"),
        ("--trace x.jsonl", mooncake(prompt=-5), "request 1: -5 tokens"),
        ("--trace x.jsonl", mooncake(output=1.5), "request 1: 1.5 tokens"),
        ("--trace x.jsonl", mooncake(output=10**30), "request 1: 10+ tokens"),
        ("--trace x.jsonl", mooncake(output="1e400"), "request 1: cannot convert float infinity"),
        ("--catalogue x.toml", "nonsense", "x.toml is not valid TOML"),
        ("--catalogue x.toml", b"\xff\xfe", "x.toml is not valid TOML"),
        ("--catalogue x.toml", "[devices.h100]", "x.toml has 'devices', which is none of device, transport"),
        ("--catalogue x.toml", "device = 3", "'device' of x.toml must be a table, not 3"),
        ("--catalogue x.toml", "[device]\nh100 = 3", "device 'h100' must be a table, not 3"),
        (
            "--catalogue x.toml",
            H100 + "flops = 1",
            "device 'h100' has flops, which the planner does not know",
        ),
        ("--catalogue x.toml", H100 + "tflops = 0", "tflops of device 'h100' must be .* above 0, not 0"),
        ("--catalogue x.toml", H100 + "memory_gb = nan", "memory_gb of device 'h100' must be .* not nan"),
        (
            "--catalogue x.toml",
            H100 + "link_gbs = -1",
            "link_gbs of device 'h100' must be .* at least 0, not -1",
        ),
        ("--catalogue x.toml", H100 + "name = 1", "name of device 'h100' must be text in quotes, not 1"),
        ("--catalogue x.toml", H100 + "kind = 'npu'", "unknown kind of device 'npu'"),
        ("--catalogue x.toml", H100 + "price = 3", "price of device 'h100' must be a list of tables, not 3"),
        (
            "--catalogue x.toml",
            H100 + "price = [{usd = 0}]",
            "usd of price of device 'h100' must be .* not 0",
        ),
        ("--catalogue x.toml", "[device.shelf]\nkind = 'gpu'", "device 'shelf' lacks 'name'"),
        ("--catalogue x.toml", "[efficiency.gpu]\nweight_mbu = 2", r"weight_mbu of .*'gpu': .*in \(0, 1\]"),
        ("--catalogue x.toml", "[efficiency.gpu]\ngemm_mfu = [1]", "gemm_mfu of .* a list of .*not \\[1\\]"),
        ("--catalogue x.toml", "[transport.nccl]\nutilisation = 2", "utilisation of .* at most 1, not 2"),
        (
            "--catalogue x.toml",
            "[collective]\nlatency_us = inf",
            "latency_us of collective must be .* not inf",
        ),
    ],
)
def test_files_that_cannot_be_say_where(  # type: ignore[no-untyped-def]
    capsys, monkeypatch, tmp_path, option: str, text: str | bytes, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file_name = option.split()[1]
    (tmp_path / file_name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert plan(*LLAMA, *option.split()) == 2
    assert_one_line(capsys.readouterr().err, message)


def test_sparse_attention_is_refused(capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = str(config(tmp_path, index_topk=2048))
    assert plan("--model", model, *FAST) == 2
    assert "sparse attention by an indexer" in capsys.readouterr().err


def test_own_devices_and_measurements(capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    own = tmp_path / "own.toml"
    own.write_text(
        """
[device.h20]
price = [{usd = 1.0, source = "my contract", date = "2026-06"}]
[device.shelf]
name = "the one on the shelf"
kind = "gpu"
tflops = 100
memory_gb = 200
memory_tbps = 2
network_gbps = 100
link_gbs = 0
source = "measured"
price = [{usd = 0.5, source = "power", date = "2026-06"}]
[device.shelf.efficiency]
weight_mbu = 0.5
gemm_mfu = [[1, 0.2], [128, 0.6]]
attention_mbu = 0.7
attention_mfu = 0.4
step_overhead_us = 500
source = "measured"
"""
    )
    args = [
        "--model",
        "llama3-8b",
        "--catalogue",
        str(own),
        "--requests",
        "200",
        "--trace",
        "azure-code",
        "--devices",
        "h20,shelf",
    ]
    assert plan(*args) == 0
    text = capsys.readouterr().out
    assert "my contract" in text
    assert "shelf" in text


def test_listing(capsys) -> None:  # type: ignore[no-untyped-def]
    assert plan("--list") == 0
    text = capsys.readouterr().out
    for name in ("h100", "xeon-6900p", "llama3-70b", "kimi-ta", "no price known"):
        assert name in text
