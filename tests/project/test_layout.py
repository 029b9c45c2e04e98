"""The shape of the project: who imports whom, what package code must not do, what is shipped."""

import ast
import importlib
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kvloom

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = (
    "bench",
    "blend",
    "calibration",
    "certify",
    "cli",
    "compress",
    "connectors",
    "evaluation",
    "kvstore",
    "rag",
    "retrieval",
    "service",
    "testing",
)
NOT_SHIPPED = (
    "bench/reference",
    "bench/results",
    "bench/results/gpu",
)  # code that trains the bundled model (which is shipped); last results
MOST_FILES = 20
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))],
)

BASE = {"errors", "core", "calibration"}
METHODS = {"compress", "retrieval", "blend"}
MAY_IMPORT = {
    "errors": set(),
    "core": {"errors"},
    "calibration": {"core", "errors"},
    "compress": BASE,
    "retrieval": BASE | {"compress"},
    "blend": BASE,
    "kvstore": BASE | {"compress"},
    "testing": BASE | METHODS | {"kvstore"},
    "connectors": BASE | METHODS | {"kvstore"},
    "rag": BASE | METHODS | {"kvstore", "connectors"},
    "service": BASE | METHODS | {"kvstore", "connectors", "__init__"},
    "evaluation": BASE | METHODS | {"kvstore", "connectors", "__init__"},
    "certify": BASE | METHODS | {"kvstore", "connectors", "evaluation", "__init__"},
    "bench": BASE | METHODS | {"kvstore", "connectors", "evaluation", "certify", "rag", "__init__"},
    "cli": BASE | METHODS | {"kvstore", "connectors", "evaluation", "certify", "bench", "rag", "service", "__init__"},
}
READS_ENVIRONMENT = {"connectors", "service", "evaluation", "certify", "bench", "cli"}

# A training script resumes from its own checkpoints, `weights_only=True`; nothing that is served passes through it.
MAY_TORCH_LOAD = {"bench/reference/train.py"}


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def room(path: Path) -> str:
    """Top-level folder or module that a source file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Line and room of every import from within the project, wherever in the file it stands."""
    package = ["kvloom", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = base + (node.module.split(".") if node.module else [])
            names = [[*module, alias.name] for alias in node.names] if module == ["kvloom"] else [module]
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        else:
            continue
        for parts in names:
            if parts[0] == "kvloom":
                known = len(parts) > 1 and parts[1] in MAY_IMPORT
                yield node.lineno, parts[1] if known else "__init__"


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def calls(path: Path) -> Iterator[tuple[int, str, ast.Call]]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func), node


def test_the_tree_was_found() -> None:
    assert {"core", "errors", *PACKAGES} <= {room(p) for p in SOURCES}


def test_imports_follow_the_table() -> None:
    wrong = [
        f"{where(path, line)} imports {target}"
        for path in SOURCES
        if room(path) != "__init__"
        for line, target in imported_rooms(path)
        if target != room(path) and target not in MAY_IMPORT[room(path)]
    ]
    assert wrong == []


def test_imports_within_the_project_are_relative() -> None:
    wrong = [
        where(path, node.lineno)
        for path in SOURCES
        for node in ast.walk(parsed(path))
        if (isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "kvloom")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "kvloom" for alias in node.names))
    ]
    assert wrong == []


def test_the_table_itself_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    source = tmp_path / "kvstore" / "tiers" / "bad.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "from ...blend.rope import x\nfrom ..keys import y\nfrom ... import core, KVStore\nimport kvloom.bench\n"
    )
    assert list(imported_rooms(source)) == [(1, "blend"), (2, "kvstore"), (3, "core"), (3, "__init__"), (4, "bench")]


def test_no_assert_in_package_code() -> None:
    wrong = [
        where(path, node.lineno)
        for path in SOURCES
        if room(path) != "testing"  # contract tests, which pytest runs
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Assert)
    ]
    assert wrong == []


def test_no_code_in_data() -> None:
    """No pickle, no `torch.load` or `torch.save`, no `eval` or `exec`: stored bytes are data."""
    wrong = []
    for path in SOURCES:
        may_load = str(path.relative_to(ROOT)) in MAY_TORCH_LOAD
        for line, name, call in calls(path):
            if name in {"eval", "exec"}:
                wrong.append(where(path, line))
            if name in {"torch.load", "torch.save"} and not may_load:
                wrong.append(where(path, line))
            if name == "torch.load" and "weights_only=True" not in [ast.unparse(word) for word in call.keywords]:
                wrong.append(where(path, line))
        for node in ast.walk(parsed(path)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if {module.split(".")[0] for module in modules} & {
                "pickle",
                "cPickle",
                "dill",
                "cloudpickle",
                "shelve",
                "marshal",
            }:
                wrong.append(where(path, node.lineno))
    assert wrong == []


def test_no_environment_reads_below_connectors() -> None:
    wrong = [
        where(path, node.lineno)
        for path in SOURCES
        if room(path) not in READS_ENVIRONMENT
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Attribute | ast.Name | ast.alias)
        and {"environ", "getenv"}
        & {getattr(node, "attr", None), getattr(node, "id", None), getattr(node, "name", None)}
    ]
    assert wrong == []


def test_packages_are_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {"kvloom": "."}
    for name in PACKAGES:
        for init in (ROOT / name).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT).parts
            if "/".join(parts) in NOT_SHIPPED:
                continue
            folders[".".join(("kvloom", *parts))] = "/".join(parts)
    assert set(settings["packages"]) == set(folders)
    assert settings["package-dir"] == folders


def test_no_stray_modules_in_the_root() -> None:
    """Every `.py` file in the root is shipped."""
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "core.py", "errors.py"}


def test_public_names_resolve() -> None:
    assert len(set(kvloom.__all__)) == len(kvloom.__all__)
    for name in kvloom.__all__:
        value = getattr(kvloom, name)
        if name != "__version__":
            assert value.__module__.startswith("kvloom.") or name == "ChunkKey"
            assert value.__name__ == name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kvloom.no_such_name


def test_typing_block_and_table_agree() -> None:
    """What a type checker sees of the root is what the lazy table gives at run time."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    seen = {
        alias.asname: (node.module or "")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert seen == kvloom._HOME


def test_import_is_light() -> None:
    """`import kvloom` and the command line load neither torch nor a framework."""
    heavy = {"torch", "numpy", "transformers", "matplotlib"}
    code = f"import sys, kvloom, kvloom.cli; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_class_is_loaded_once() -> None:
    """pytest may load the root under the checkout's name; no class may exist twice because of that."""
    importlib.import_module("kvloom.core")
    for name in kvloom.__all__:
        getattr(kvloom, name)
    found = {
        id(vars(module)["KVChunk"])
        for module in list(sys.modules.values())
        if "KVChunk" in getattr(module, "__dict__", {})
    }
    defining = {
        name
        for name, module in list(sys.modules.items())
        if getattr(getattr(module, "__dict__", {}).get("KVChunk"), "__module__", None) == name
    }
    assert len(found) == 1
    assert defining == {"kvloom.core"}


def test_wheel_holds_the_package_and_nothing_more(tmp_path: Path) -> None:
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the source tree is unknown")
    files = sorted({Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()})
    tree = tmp_path / "tree"
    for file in files:
        (tree / file).parent.mkdir(parents=True, exist_ok=True)
        (tree / file).symlink_to(ROOT / file)
    build = "from setuptools import build_meta; build_meta.build_wheel('..')"
    done = subprocess.run([sys.executable, "-c", build], cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        shipped = {name for name in archive.namelist() if ".dist-info/" not in name}
    roots = {*PACKAGES, "__init__.py", "core.py", "errors.py", "py.typed"}
    left_out = {file for file in files if file.parent.as_posix() in NOT_SHIPPED}
    assert shipped == {f"kvloom/{file.as_posix()}" for file in files if file.parts[0] in roots and file not in left_out}


def test_no_folder_is_crowded() -> None:
    counts = Counter(path.parent for path in [*SOURCES, *(ROOT / "tests").rglob("*.py")] if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): n for folder, n in counts.items() if n > MOST_FILES} == {}
