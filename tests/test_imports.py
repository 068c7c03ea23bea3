"""The architecture document that cannot go stale: who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CUDA_ROOMS = ("runtime/backends/cuda", "runtime/kernels/cuda/")
LLVM_ROOMS = ("gguf_tools/processor.py", "gguf_tools/kernel_files.py")
FILES = sorted(p for package in ("gguf_tools", "runtime") for p in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def uses(path: Path, *modules: str) -> bool:
    return any(n == m or n.startswith(m + ".") for n in imports(path) for m in modules)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", FILES, ids=name)
def test_directions(path: Path) -> None:
    here = name(path)
    if here.startswith("gguf_tools/"):
        assert not uses(path, "runtime"), "gguf_tools never imports runtime"
    if here not in ("runtime/umbrella.py", "gguf_tools/__main__.py", "runtime/__main__.py"):
        assert not uses(path, "gguf_tools.cli", "runtime.cli"), "nobody imports a cli"
    if here not in (
        "gguf_tools/cli.py",
        "gguf_tools/command.py",
        "gguf_tools/convert_command.py",
        "gguf_tools/file_commands.py",
        "gguf_tools/shared_options.py",
        "runtime/cli.py",
        "runtime/eval_command.py",
        "runtime/imatrix_command.py",
        "runtime/measure_commands.py",
        "runtime/tokenize_command.py",
        "runtime/umbrella.py",
    ):
        assert not uses(path, "typer", "click"), "typer belongs to the command lines"
    if here.startswith(("gguf_tools/quants/", "gguf_tools/archs/")):
        package = here.rsplit("/", 1)[0].replace("/", ".")
        allowed = (
            package,
            "gguf_tools.errors",
            "gguf_tools.jit",
            "gguf_tools.simd",
            "gguf_tools.values",
        )
        for module in imports(path):
            if module.startswith("gguf_tools.") and module != "gguf_tools.quants":
                assert module.startswith(allowed), f"{here} imports {module}"
    if here.startswith("gguf_tools/feedback/"):
        allowed = ("feedback", "quants", "errors", "jit", "simd")
        for module in imports(path):
            if module.startswith("gguf_tools."):
                known = tuple(f"gguf_tools.{name}" for name in allowed)
                assert module.startswith(known), f"{here} imports {module}"
    if here.startswith("gguf_tools/packed/"):
        allowed = ("packed", "errors", "json_files", "safetensors_file", "archs.config")
        for module in imports(path):
            if module.startswith("gguf_tools.") and module != "gguf_tools.packed":
                known = tuple(f"gguf_tools.{name}" for name in allowed)
                assert module.startswith(known), f"{here} imports {module}"
    if here in ("runtime/sampling.py", "runtime/tokenizer.py", "runtime/templates.py"):
        assert not uses(path, "runtime.model", "runtime.config", "runtime.backends")
    if here == "runtime/generation.py":
        assert not uses(path, "runtime.tokenizer", "runtime.templates")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_numba_stays_in_its_rooms(path: Path) -> None:
    here = name(path)
    if here.startswith(("gguf_tools/compiler/", *CUDA_ROOMS)):
        return
    assert not uses(path, "numba"), "kernels name what is in gguf_tools.simd"
    assert here in LLVM_ROOMS or not uses(path, "llvmlite")


@pytest.mark.parametrize("path", FILES, ids=name)
def test_print_stays_with_the_terminal(path: Path) -> None:
    if name(path) in (
        "gguf_tools/cli.py",
        "gguf_tools/command.py",
        "gguf_tools/convert_command.py",
        "gguf_tools/file_commands.py",
        "runtime/cli.py",
        "runtime/chat.py",
        "runtime/eval_command.py",
        "runtime/imatrix_command.py",
        "runtime/measure_commands.py",
        "runtime/tokenize_command.py",
    ):
        return
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    ]
    assert not [c.lineno for c in calls if c.func.id == "print"], "libraries report by values"


@pytest.mark.parametrize("module", ["gguf_tools.cli", "runtime.cli", "runtime.umbrella"])
def test_command_lines_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(result.stdout.split())
    assert not loaded & {"numba", "numpy", "tokenizers", "gguf", "prompt_toolkit"}
