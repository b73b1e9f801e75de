"""``vllm-lamina plan``: should this model be disaggregated, onto what, and what does it bring."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

from tqdm import tqdm  # type: ignore[import-untyped]

from vllm_lamina.errors import ConfigError, LaminaError
from vllm_lamina.planner.devices import PRICE_SETS, Catalogue, read_catalogue
from vllm_lamina.planner.model_configs import builtin_models, load_model
from vllm_lamina.planner.report import answer_as_json, format_answer, plot_answer
from vllm_lamina.planner.search import Question, answer
from vllm_lamina.planner.traces import WORKLOADS, load_trace

_EXAMPLES = """examples:
  vllm-lamina plan --model llama3-70b --trace kimi-conv --devices h100,h20
  vllm-lamina plan --model ./config.json --trace AzureLLMInferenceTrace_conv.csv --devices h100,h20 \\
      --price h100=2.95 --price h20=1.10 --budget 45/h --tbt-slo 100ms --plot plan.png
  vllm-lamina plan calibrate --output host.toml
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command and its options; the parsed arguments' `run` is `run`."""
    parser = subparsers.add_parser(
        "plan",
        help="say whether to disaggregate a model, onto which devices, and what that brings",
        description="Compares tensor-parallel vLLM with Lamina on the devices you could rent, by simulation.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--model", help="short name, or a Hugging Face config.json, or the directory that holds one")
    option(
        "--trace",
        default="azure-conv",
        help="trace's name, or an Azure CSV or Mooncake JSONL file (%(default)s)",
    )
    option("--devices", default="h100,h20", help="devices to choose from, separated by commas (%(default)s)")
    option(
        "--price",
        type=_price,
        action="append",
        default=[],
        metavar="DEVICE=USD",
        help="price of one device for one hour",
    )
    option(
        "--prices", choices=PRICE_SETS, default="latest", help="which of the catalogue's prices (%(default)s)"
    )
    option("--budget", type=_dollars, metavar="USD/h", help="money per hour; the answer is what it buys")
    option(
        "--tbt-slo", type=_seconds, metavar="MS", help="time that 99%% of tokens come within, such as 100ms"
    )
    option("--transport", default="nccl", help="network between the workers: nccl, fhbn, ideal (%(default)s)")
    option("--prefill", action="store_true", help="compute prompts on the same devices (default: elsewhere)")
    option(
        "--rate",
        type=_rate,
        metavar="REQ/S",
        help="requests per second to serve (default: compare engines saturated)",
    )
    option(
        "--requests",
        type=_count,
        default=3000,
        help="requests of the trace to simulate, at least (%(default)s)",
    )
    option("--catalogue", type=Path, metavar="TOML", help="your devices, prices and measurements")
    option("--json", action="store_true", help="print the answer as JSON")
    option("--plot", type=_file, metavar="PNG", help="draw cost against throughput")
    option("--list", action="store_true", help="list the devices, models and traces known by name")
    parser.set_defaults(run=run)
    actions = parser.add_subparsers(metavar="[calibrate]")
    calibrate = actions.add_parser(
        "calibrate", help="measure this host with the attention kernel and vLLM, for --catalogue"
    )
    calibrate.add_argument("--output", type=_file, required=True, metavar="TOML", help="file to write")
    calibrate.add_argument(
        "--cpus", default=None, metavar="LIST", help="CPUs of model and attention worker, as 0;1"
    )
    calibrate.set_defaults(run=_run_calibrate)


def run(args: argparse.Namespace) -> int:
    """Answer the question; returns the exit status, 2 if it cannot be answered."""
    try:
        if args.list:
            print(_listing(read_catalogue(args.catalogue)))
            return 0
        if not args.model:
            raise ConfigError("which model? Give --model, or see --list")
        # Off a terminal, or for a program, there is no bar.
        quiet = args.json or None
        bar = partial(tqdm, desc="simulating", unit="deployment", delay=1.0, leave=False, disable=quiet)
        found = answer(_question(args), progress=bar)
        if args.json:
            print(json.dumps(answer_as_json(found, args.model), indent=2))
        else:
            print(format_answer(found, args.model))
        if args.plot:
            plot_answer(found, args.plot)
    except LaminaError as error:
        print(f"vllm-lamina plan: {error}", file=sys.stderr)
        return 2
    return 0


def _question(args: argparse.Namespace) -> Question:
    catalogue = read_catalogue(args.catalogue)
    for name, usd in args.price:
        catalogue = catalogue.with_price(name, usd)
    trace = load_trace(args.trace)
    devices = tuple(catalogue.device(name.strip()) for name in args.devices.split(","))
    for device in devices:
        device.price(args.prices)
    catalogue.transport(args.transport)
    return Question(
        model=load_model(args.model),
        trace=trace.saturating(),
        rate=args.rate,
        devices=devices,
        catalogue=catalogue,
        transport=args.transport,
        price_set=args.prices,
        budget=args.budget,
        tbt_slo=args.tbt_slo,
        prefill=args.prefill,
        requests=args.requests,
    )


def _amount(text: str, number: str, wanted: str) -> float:
    """Read a number above 0; nobody means one beyond the bounds, and figures made of it may leave a float's range."""
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if not 1e-6 <= value <= 1e12:
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted} (above 0: 1e-6 to 1e12)")
    return value


def _rate(text: str) -> float:
    return _amount(text, text, "a number of requests per second, such as 200")


def _dollars(text: str) -> float:
    return _amount(
        text, text.strip().removeprefix("$").removesuffix("/h"), "an amount per hour, such as 45/h"
    )


def _price(text: str) -> tuple[str, float]:
    device, _, dollars = text.partition("=")
    return device, _amount(text, dollars, "DEVICE=USD, such as h20=1.10")


def _seconds(text: str) -> float:
    number = text.removesuffix("ms")
    unit = 1.0 if number == text and text.endswith("s") else 1e-3
    return _amount(text, number if unit < 1 else text[:-1], "a time, such as 100ms or 0.1s") * unit


def _file(text: str) -> Path:
    """Read the name of a file to write, so that one that cannot be is known before the work is done."""
    path = Path(text)
    if not path.name or path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not a file that can be written")
    return path


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < float(text) <= 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0 (at most 1e9)")
    return int(text)


def _listing(catalogue: Catalogue) -> str:
    lines = ["Devices:"]
    for device in catalogue.devices.values():
        prices = "; ".join(f"{p.usd:.2f} USD/h ({p.date}, {p.source})" for p in device.prices)
        lines.append(
            f"  {device.key:<14}{device.flops / 1e12:>6.0f} TFLOP/s {device.memory_bytes / 1e9:>6.0f} GB "
            f"{device.memory_bandwidth / 1e12:>6.2f} TB/s  {prices or 'no price known'}"
        )
    lines.append("Models:")
    for key, model in builtin_models().items():
        lines.append(
            f"  {key:<16}{model.weight_bytes / 1e9:>7.1f} GB, {model.layers} layers, G = {model.group:g}, "
            f"{model.kv_bytes_per_token:,} bytes of KV per token"
        )
    lines.append("Traces:")
    for key, recipe in WORKLOADS.items():
        lines.append(
            f"  {key:<14}mean prompt {recipe.prompt.mean:,.0f}, mean output {recipe.output.mean:,.0f} tokens"
        )
    return "\n".join(lines)


def _run_calibrate(args: argparse.Namespace) -> int:
    from vllm_lamina.planner.calibrate import calibrate

    try:
        calibrate(args.output, args.cpus)
    except LaminaError as error:
        print(f"vllm-lamina plan calibrate: {error}", file=sys.stderr)
        return 2
    return 0
