"""Configures engines as `vllm serve` and `LLM` do, without starting them, and says how each attempt ended.

    configure.py CASES RESULTS

Importing vLLM takes much longer than configuring an engine, so one process does it for all cases. A case is an object
with either `arguments`, keyword arguments of EngineArgs, or `command`, the arguments of the program `vllm`; with
`environment`, where it is another than the program's; and with `patience`, the seconds in which an attention worker has
to answer, where they are fewer than usual.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import vllm.model_executor.models.registry as registry
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.cli import serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_lamina.transport.connection import AttentionWorkerConnection

CONNECT: Any = AttentionWorkerConnection.connect.__func__  # type: ignore[attr-defined]
(PATIENCE,) = CONNECT.__defaults__


def main(cases: str, results: str) -> None:
    outcomes = [outcome(case) for case in json.loads(Path(cases).read_text())]
    Path(results).write_text(json.dumps(outcomes))


def outcome(case: dict[str, Any]) -> dict[str, Any]:
    """What became of one engine: its two fields that select Lamina, and what else vLLM or Lamina chose, or the kind and
    text of the error; and what was logged.
    """
    printed = io.StringIO()
    handler = Records()
    logger = logging.getLogger("vllm")
    logger.addHandler(handler)
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            patch.dict(os.environ, case.get("environment", {})),
            patch.object(CONNECT, "__defaults__", (case.get("patience", PATIENCE),)),
        ):
            engine = from_command(case["command"]) if "command" in case else EngineArgs(**case["arguments"])
            config = engine.create_engine_config()
            chosen = chosen_in(config)
    except SystemExit:
        return {"error": "SystemExit", "message": printed.getvalue()}
    except Exception as error:  # whatever it is: the test compares its kind and text
        return {"error": type(error).__name__, "message": str(error)}
    finally:
        logger.removeHandler(handler)
    return {
        "backend": str(engine.distributed_executor_backend),
        "additional_config": engine.additional_config,
        "chosen": chosen,
        "log": handler.lines,
    }


class Records(logging.Handler):
    """Keeps the lines that are logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def chosen_in(config: Any) -> dict[str, Any]:
    """What a user who gives nothing leaves to vLLM and Lamina."""
    backend = config.attention_config.backend
    return {
        "device": config.device_config.device_type,
        "V2": config.use_v2_model_runner,
        "block size": config.cache_config.block_size,
        "attention backend": backend and backend.name,
        "scheduler": config.scheduler_config.scheduler_cls,
        "asynchronous": config.scheduler_config.async_scheduling,
    }


def from_command(command: list[str]) -> EngineArgs:
    """The engine that `vllm COMMAND...` would start."""
    with patch.object(sys, "argv", ["vllm", *command]):
        parser = FlexibleArgumentParser()
        serve.ServeSubcommand().subparser_init(parser.add_subparsers())
        arguments = parser.parse_args()
    arguments.model = arguments.model_tag or arguments.model
    return AsyncEngineArgs.from_cli_args(arguments)


if __name__ == "__main__":
    # vLLM asks a process of its own about the class of each model, for as long as importing vLLM takes.
    registry._run_in_subprocess = lambda inspect: inspect()
    main(*sys.argv[1:])
