"""The command line of the planner: answers, JSON, errors that help."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_lamina.planner.__main__ import main

FAST = ["--requests", "200", "--devices", "h100,h20"]


def plan(monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["plan", *args])
    return main()


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


def test_answer_in_words(monkeypatch, capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    plot = tmp_path / "plan.png"
    model = str(config(tmp_path) / "config.json")
    assert plan(monkeypatch, "--model", model, *FAST, "--plot", str(plot)) == 0
    text = capsys.readouterr().out
    assert "DISAGGREGATE" in text
    assert f"vllm serve {tmp_path}" in text
    assert "2026-05" in text
    assert plot.stat().st_size > 5_000


def test_answer_as_json(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    assert plan(monkeypatch, "--model", "llama3-70b", *FAST, "--json", "--prices", "paper") == 0
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


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model", "llama3-7b"], "unknown model 'llama3-7b'; did you mean llama3-70b"),
        (["--model", "llama3-70b", "--devices", "h10,h20"], "unknown device 'h10'; did you mean"),
        (
            ["--model", "llama3-70b", "--devices", "h100,xeon-6900p"],
            "no price is known for xeon-6900p .*--price",
        ),
        (
            ["--model", "llama3-70b", "--devices", "a10", "--prices", "paper"],
            "no price of the paper is known for a10",
        ),
        (["--model", "llama3-70b", "--price", "h20"], "'h20' is not DEVICE=USD"),
        (["--model", "llama3-70b", "--price", "h20=-1"], "price of h20 must be above 0"),
        (["--model", "llama3-70b", "--trace", "kimi"], "unknown trace 'kimi'; did you mean kimi-"),
        (["--model", "llama3-70b", "--transport", "tcp"], "unknown transport 'tcp'"),
        (["--model", "llama3-70b", "--devices", "a10", "--budget", "2/h"], "do not fit on .* at least 7"),
        (["--model", "/nowhere/config.json"], "cannot read the model's configuration"),
        ([], "which model"),
    ],
)
def test_errors_help(monkeypatch, capsys, args: list[str], message: str) -> None:  # type: ignore[no-untyped-def]
    assert plan(monkeypatch, *args) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_mla_is_refused(monkeypatch, capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = str(config(tmp_path, kv_lora_rank=512))
    assert plan(monkeypatch, "--model", model, *FAST) == 2
    assert "multi-head latent attention" in capsys.readouterr().err


def test_bad_amounts_are_refused_by_the_parser(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    for args in (["--budget", "cheap"], ["--tbt-slo", "fast"]):
        with pytest.raises(SystemExit):
            plan(monkeypatch, "--model", "llama3-70b", *args)
        assert "is not a" in capsys.readouterr().err


def test_own_devices_and_measurements(monkeypatch, capsys, tmp_path) -> None:  # type: ignore[no-untyped-def]
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
    args = ["--model", "llama3-8b", "--catalogue", str(own), "--requests", "200", "--devices", "h20,shelf"]
    assert plan(monkeypatch, *args) == 0
    text = capsys.readouterr().out
    assert "my contract" in text
    assert "shelf" in text
    own.write_text("[device.shelf]\nname = 'incomplete'\n")
    assert plan(monkeypatch, *args) == 2
    assert "'shelf' lacks" in capsys.readouterr().err


def test_listing(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    assert plan(monkeypatch, "--list") == 0
    text = capsys.readouterr().out
    for name in ("h100", "xeon-6900p", "llama3-70b", "kimi-ta", "no price known"):
        assert name in text


def test_no_vllm_and_no_torch_needed() -> None:
    heavy = "('vllm', 'torch', 'matplotlib')"
    code = f"import sys, vllm_lamina.planner.command; sys.exit(any(m in sys.modules for m in {heavy}))"
    subprocess.run([sys.executable, "-c", code], check=True)
