"""The planner can be left out: the rest does not import it, and the command line works without it and its packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vllm_lamina

ROOT = Path(vllm_lamina.__file__).parent
PLANNER = ROOT / "planner"
DOOR = ROOT / "cli" / "plan.py"


def imports(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it; of ``from a import b`` both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            found |= {f"{node.module}", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_only_the_command_line_imports_the_planner() -> None:
    others = [path for path in ROOT.rglob("*.py") if PLANNER not in path.parents]
    assert [path for path in others if "vllm_lamina.planner" in " ".join(imports(path))] == [DOOR]


def test_the_planner_imports_only_small_modules_of_the_rest() -> None:
    for path in PLANNER.glob("*.py"):
        modules = {name.split(".")[1] for name in imports(path) if name.startswith("vllm_lamina.")}
        # Calibration times the attention kernel, on CPUs that are divided as for an engine.
        more = {"kernels", "executor"} if path.name == "calibrate.py" else set()
        assert modules <= {"planner", "config", "errors", "run_module", "units"} | more, path


def run(missing: list[str], *args: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process in which some modules cannot be imported."""
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing})); "
        f"from vllm_lamina.cli import main; sys.exit(main({list(args)}))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_help_without_the_planner_and_its_packages() -> None:
    result = run(["numpy", "matplotlib", "tqdm", "vllm_lamina.planner"], "--help")
    assert result.returncode == 0, result.stderr
    assert "plan " in result.stdout


@pytest.mark.parametrize("missing", ["numpy", "tqdm", "vllm_lamina.planner"])
def test_plan_without_the_extra_says_what_to_install(missing: str) -> None:
    result = run([missing], "plan", "--list")
    assert result.returncode == 1
    assert result.stderr.startswith(f"vllm-lamina plan: {missing}")
    assert result.stderr.endswith(" is missing; install it with: pip install 'vllm-lamina[plan]'\n")
    assert result.stderr.count("\n") == 1


def test_plan_imports_neither_vllm_nor_torch_nor_matplotlib() -> None:
    result = run(["vllm", "torch", "matplotlib"], "plan", "--list")
    assert result.returncode == 0, result.stderr
    assert "h100" in result.stdout
