"""Predicts decode steps of this machine from a calibration, then measures them: stock vLLM, and Lamina.

    vllm-lamina plan calibrate --output host.toml
    python benchmarks/planner_validation.py --calibration host.toml --models .models/SmolLM2-135M-Instruct random
    python benchmarks/planner_validation.py ... --update docs/planner.md

``random`` is a model of 0.3 billion random parameters. Calibration sees neither model. Comparisons are kept in the file
of `--output`, so that one system or model can be measured again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import numpy as np
from paper import replace_section

from vllm_lamina.planner.calibrate import calibrate, random_model, split_cpus
from vllm_lamina.planner.cost import ComputeGroup
from vllm_lamina.planner.deployment import Baseline, Deployment, Lamina
from vllm_lamina.planner.devices import Catalogue, read_catalogue
from vllm_lamina.planner.engine_steps import Case, measure_steps
from vllm_lamina.planner.model_configs import load_model
from vllm_lamina.planner.models import Model
from vllm_lamina.planner.results import steady_state

STEPS = 24
REPEATS = 2
CASES = [
    Case(batch, context)
    for context, batches in ((256, (1, 4, 16)), (1024, (1, 4, 16)), (4096, (1, 4)), (7680, (1,)))
    for batch in batches
]
SYSTEMS = {"vLLM": 0, "Lamina, 1 batch": 1, "Lamina, 2 batches": 2}
"""Batches in flight of each system; 0 is stock vLLM."""


@dataclass(frozen=True)
class Comparison:
    """One predicted and measured time between tokens, in seconds; `measured` is the lower quartile."""

    model: str
    system: str
    batch: int
    context: int
    predicted: float
    measured: float
    median: float

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What was compared."""
        return self.model, self.system, self.batch, self.context

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1.0


def deployment(model: Model, catalogue: Catalogue, batches: int) -> Deployment:
    """Stock vLLM on the model worker's CPUs, or Lamina with this many batches."""
    host, worker = catalogue.device("this-host"), catalogue.device("this-host-worker")
    group = ComputeGroup(model, host, 1, catalogue.collective)
    if not batches:
        return Baseline(group)
    return Lamina(group, worker, 1, catalogue.transport("this-host"), lanes=batches)


def compare(path: Path, catalogue: Catalogue, cpus: tuple[str, str], systems: list[str]) -> list[Comparison]:
    """Predict first, then measure every case on every system."""
    model = load_model(str(path))
    found = []
    for system in systems:
        built = deployment(model, catalogue, SYSTEMS[system])
        predictions = [steady_state(built, case.batch, case.context + STEPS / 2 + 3).tbt for case in CASES]
        measured = measure_steps(
            path,
            CASES * REPEATS,
            batches=SYSTEMS[system],
            model_cpus=cpus[0],
            worker_cpus=cpus[1],
            steps=STEPS,
            random_weights=not any(path.glob("*.safetensors")),
            deadline=2400.0,
        )
        for index, predicted in enumerate(predictions):
            # The better of the repeats: other work on this machine only ever adds time.
            m = min(measured[index :: len(CASES)], key=lambda repeat: repeat.quartile)
            found.append(Comparison(model.name, system, m.batch, m.context, predicted, m.quartile, m.median))
            print(
                f"{model.name} {system} {m.batch} x {m.context}: {predicted:.4f} s, measured {m.quartile:.4f} s"
            )
    return found


def markdown(found: list[Comparison], cpus: tuple[str, str]) -> str:
    """The table of docs/planner.md, with the median error of each system and model."""
    systems = [system for system in SYSTEMS if any(c.system == system for c in found)]
    lines = [
        f"Measured on {date.today().isoformat()}, model worker on CPUs {cpus[0]}, attention worker on CPUs {cpus[1]}. "
        f"TBT in ms, predicted / measured (error); measured is the lower quartile of {STEPS} steps, the better of "
        f"{REPEATS} runs.",
        "",
        f"| Model | Batch x context | {' | '.join(systems)} |",
        "| --- | --- " + "| --- " * len(systems) + "|",
    ]
    by_case: dict[tuple[str, int, int], dict[str, Comparison]] = {}
    for c in found:
        by_case.setdefault((c.model, c.batch, c.context), {})[c.system] = c
    for (model, batch, context), cells in by_case.items():
        texts = [
            f"{1e3 * c.predicted:.1f} / {1e3 * c.measured:.1f} ({c.error:+.0%})"
            if (c := cells.get(system))
            else "-"
            for system in systems
        ]
        lines.append(f"| {model} | {batch} x {context} | {' | '.join(texts)} |")
    lines.append("")
    for model in dict.fromkeys(c.model for c in found):
        for system in systems:
            errors = [c.error for c in found if (c.model, c.system) == (model, system)]
            if errors:
                lines.append(
                    f"- {model}, {system}: median error {np.median(np.abs(errors)):.0%}, largest "
                    f"{max(errors, key=abs):+.0%}"
                )
    return "\n".join(lines)


def main() -> None:
    """Calibrate if asked, predict, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calibration", type=Path, required=True, help="file of `vllm-lamina plan calibrate`"
    )
    parser.add_argument("--calibrate", action="store_true", help="make that file first")
    parser.add_argument("--models", nargs="+", default=["random"], help="model directories, or 'random'")
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument(
        "--cpus", default=None, help="CPUs of both workers, such as '0;1' (default: half each)"
    )
    parser.add_argument("--update", type=Path, help="Markdown file whose validation section to replace")
    parser.add_argument(
        "--output", type=Path, help="JSON file of comparisons, read if it is there, and written"
    )
    args = parser.parse_args()
    if args.calibrate:
        calibrate(args.calibration, args.cpus)
    catalogue, cpus = read_catalogue(args.calibration), split_cpus(args.cpus)
    found: list[Comparison] = []
    if args.output and args.output.exists():
        found = [Comparison(**row) for row in json.loads(args.output.read_text())]
    with tempfile.TemporaryDirectory() as directory:
        for name in args.models:
            path = Path(directory, "random-0.3B") if name == "random" else Path(name)
            if name == "random":
                random_model(path, 1024, 24, 2816, vocabulary=32000)
            for new in compare(path, catalogue, cpus, args.systems):
                found = [c for c in found if c.key != new.key] + [new]
    text = markdown(found, cpus)
    print(text)
    if args.output:
        args.output.write_text(json.dumps([asdict(c) for c in found], indent=1))
    if args.update:
        replace_section(args.update, "validation", text)


if __name__ == "__main__":
    main()
