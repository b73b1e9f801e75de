"""The flags: that vLLM's engine arguments accept ours, and that they end where vLLM's executor finds them.

Relies on: ``vllm.engine.arg_utils.EngineArgs`` and ``AsyncEngineArgs`` (dataclasses), ``EngineArgs.add_cli_args``,
``from_cli_args`` and ``create_engine_config``, the fields ``distributed_executor_backend`` and ``additional_config``,
and ``vllm.utils.argparse_utils.FlexibleArgumentParser``.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_lamina.compat.arguments import EXECUTOR
from vllm_lamina.errors import ConfigError
from vllm_lamina.executor import LaminaExecutor


def parse(*flags: str) -> EngineArgs:
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    return AsyncEngineArgs.from_cli_args(parser.parse_args(["--model", ".", *flags]))


def test_nothing_changes_without_the_executor() -> None:
    args = parse()
    assert args.distributed_executor_backend is None
    assert not args.additional_config


def test_flags_select_the_executor() -> None:
    args = parse("--executor", "lamina", "--lamina-memory", "1GiB", "--lamina-worker-cpus", "1")
    assert args.distributed_executor_backend == EXECUTOR
    assert args.additional_config == {"lamina": {"memory": "1GiB", "worker_cpus": "1"}}


def test_flags_add_to_additional_config() -> None:
    given = json.dumps({"lamina": {"memory": "1GiB"}, "other": 1})
    args = parse("--executor", "lamina", "--lamina-worker-cpus", "1", "--additional-config", given)
    assert args.additional_config == {"lamina": {"memory": "1GiB", "worker_cpus": "1"}, "other": 1}


@pytest.mark.parametrize("cls", [EngineArgs, AsyncEngineArgs])
def test_keyword_arguments_select_the_executor(cls: type[EngineArgs]) -> None:
    args = cls(model=".", executor="lamina", lamina_memory="1GiB")
    assert args.distributed_executor_backend == EXECUTOR
    assert args.additional_config == {"lamina": {"memory": "1GiB"}}
    # `vllm bench` builds its engine from the fields of the parsed arguments.
    again = cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls) if field.init})
    assert again.additional_config == args.additional_config


def test_the_class_selects_the_executor() -> None:
    args = EngineArgs(
        model=".",
        distributed_executor_backend=LaminaExecutor,
        additional_config={"lamina": {"memory": "1GiB"}},
    )
    assert args.distributed_executor_backend == EXECUTOR


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"executor": "laminar"}, "unknown executor 'laminar'; the only one is 'lamina'"),
        ({"lamina_memory": "1GiB"}, "--lamina-memory needs --executor lamina"),
        ({"executor": "lamina", "lamina_memroy": "1GiB"}, "did you mean 'memory'"),
        (
            {"executor": "lamina", "distributed_executor_backend": "mp"},
            "remove --distributed-executor-backend mp",
        ),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineArgs(model=".", **arguments)


def test_options_without_the_executor_are_refused_when_the_engine_is_configured() -> None:
    args = EngineArgs(model=".", additional_config={"lamina": {"memory": "1GiB"}})
    with pytest.raises(ConfigError, match="needs --executor lamina"):
        args.create_engine_config()


@pytest.mark.parametrize("directories", [[], [""]], ids=["elsewhere", "there"])
def test_children_import_from_the_working_directory_only_if_this_process_does(
    directories: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr(sys, "path", [*filter(None, sys.path), *directories])
    with pytest.raises(ValueError, match="model"):
        EngineArgs(model=str(tmp_path), executor="lamina").create_engine_config()
    assert bool(os.environ["PYTHONSAFEPATH"]) != bool(directories)
