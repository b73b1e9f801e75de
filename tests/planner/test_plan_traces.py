"""Traces: synthetic ones keep the paper's means, files are read in their public formats."""

from pathlib import Path

import numpy as np
import pytest

from vllm_lamina.errors import ConfigError
from vllm_lamina.planner.traces import WORKLOADS, load_trace


@pytest.mark.parametrize("name", WORKLOADS)
def test_synthetic_traces_have_the_papers_means(name: str) -> None:
    trace, recipe = load_trace(name, seed=3), WORKLOADS[name]
    assert len(trace) == recipe.requests
    assert trace.prompts.mean() == pytest.approx(recipe.prompt.mean, rel=0.005)
    assert trace.outputs.mean() == pytest.approx(recipe.output.mean, rel=0.01)
    assert (np.diff(trace.arrivals) >= 0).all()


def test_same_seed_same_trace() -> None:
    one, two, other = load_trace("azure-code"), load_trace("azure-code"), load_trace("azure-code", seed=1)
    np.testing.assert_array_equal(one.prompts, two.prompts)
    assert (one.prompts != other.prompts).any()


def test_azure_csv(tmp_path: Path) -> None:
    path = tmp_path / "AzureLLMInferenceTrace_code.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:03.9799600,4808,10\n"
        "2023-11-16 18:17:04.0319600,3180,8\n"
    )
    trace = load_trace(str(path))
    np.testing.assert_allclose(trace.arrivals, [0.0, 0.052], atol=1e-6)
    assert trace.prompts.tolist() == [4808, 3180]
    assert trace.outputs.tolist() == [10, 8]


def test_azure_csv_of_2024_has_time_zones(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2024-05-12 00:00:00.001163+00:00,1452,3\n"
        "2024-05-12 00:00:01.001163+00:00,600,0\n"
    )
    trace = load_trace(str(path))
    np.testing.assert_allclose(trace.arrivals, [0.0, 1.0])
    assert trace.outputs.tolist() == [3, 1]


def test_mooncake_jsonl_is_sorted_by_arrival(tmp_path: Path) -> None:
    path = tmp_path / "conversation_trace.jsonl"
    path.write_text(
        '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'
        '{"timestamp": 26482, "input_length": 700, "output_length": 5, "hash_ids": [46]}\n'
    )
    trace = load_trace(str(path))
    np.testing.assert_allclose(trace.arrivals, [0.0, 1.0])
    assert trace.prompts.tolist() == [700, 6955]


def test_mean_context_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "two.jsonl"
    path.write_text(
        '{"timestamp": 0, "input_length": 100, "output_length": 20}\n'
        '{"timestamp": 0, "input_length": 1000, "output_length": 60}\n'
    )
    assert load_trace(str(path)).mean_context == pytest.approx((100 * 20 + 200 + 1000 * 60 + 1800) / 80)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "TIME,Tokens\n1,2\n", "not an Azure trace .*TIMESTAMP"),
        ("a.jsonl", '{"timestamp": 1}\n', "not a Mooncake trace .*input_length"),
        ("a.jsonl", "nonsense\n", "request 1: not JSON"),
        ("a.jsonl", "", "has no requests"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_trace(str(tmp_path / name))


def test_unknown_and_missing_traces() -> None:
    with pytest.raises(ConfigError, match="did you mean azure-conv"):
        load_trace("azure-con")
    with pytest.raises(ConfigError, match="cannot read the trace"):
        load_trace("/nowhere/a.csv")
