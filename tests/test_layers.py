"""The shape of the project: which module may import which, small scripts, and names that stay in
the checkout.
"""

import ast
import fnmatch
import graphlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Modules by layer; a pattern takes what no line has by name. Each may import lower layers and,
# without cycles, its own.
LAYERS = {
    0: ["configs", "configs.*", "utils", "sde", "libs", "libs.arrays", "libs.dpm_solver",
        "libs.ema", "libs.loading", "libs.lr", "libs.ops.reference", "libs.pickled", "libs.run",
        "libs.scan_order", "libs.sharding"],
    1: ["libs.ops", "libs.ops.*", "datasets", "libs.autoencoder", "libs.cifar10",
        "libs.feature_files", "libs.feature_writer", "libs.features", "libs.flags",
        "libs.graphs", "libs.guidance", "libs.images", "libs.metrics", "libs.precision_recall",
        "libs.samplers", "libs.torch_files", "libs.watch", "libs.weights"],
    2: ["libs.layers", "libs.mamba", "libs.codec"],
    3: ["libs.dim", "libs.uvit", "libs.official", "libs.models"],
    4: ["libs.launch", "libs.engine", "libs.batches", "libs.checkpoint", "libs.evaluation",
        "libs.evaluation_run", "libs.image_store", "libs.outputs", "libs.real_images",
        "libs.resume", "libs.training"],
    5: ["train", "train_ldm_discrete", "eval", "eval_ldm_discrete", "sample", "scripts.*"],
}  # fmt: skip
NOT_LAYERED = ("tests/", "benchmarks/", "setup.py")
MAX_SCRIPT_LINES, MAX_ARGUMENTS = 80, 14
SCRIPTS = [
    "train.py", "train_ldm_discrete.py", "eval.py", "eval_ldm_discrete.py", "sample.py",
]  # fmt: skip


def project_files():
    """Paths relative to the checkout of what git has or would take."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("this is no git repository: its files cannot be told from others")
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def module_name(path):
    """'libs/ops/__init__.py' -> 'libs.ops'."""
    parts = Path(path).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules():
    """{module: path} of the layered part of the project."""
    return {
        module_name(name): ROOT / name
        for name in project_files()
        if name.endswith(".py") and not name.startswith(NOT_LAYERED)
    }


def layer_of(module):
    """The layer of a module, by its own name before any pattern; None if it has no place."""
    exact = [layer for layer, names in LAYERS.items() if module in names]
    wild = [layer for layer, names in LAYERS.items() for n in names if fnmatch.fnmatch(module, n)]
    return next(iter(exact + wild), None)


def imported_names(source, module, is_package):
    """Dotted names that a module imports, anywhere in it: `import a.b`, `from a import b` (a and
    a.b), relative ones, and strings that name a module exactly, as importlib takes them.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base]).strip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value:
            yield node.value


def imports(module, path, known):
    """Modules of ours that a module imports; of `from libs.ops import cpu` the submodule, and not
    also the package.
    """
    text, is_package = path.read_text(encoding="utf-8"), path.name == "__init__.py"
    names = set(imported_names(text, module, is_package))
    found = {name for name in names if name in known and name != module}
    packages = {name for name in found if known[name].name == "__init__.py"}
    used_for_submodules = {
        package for package in packages if not used_itself(text, package, found)
    }
    return found - used_for_submodules


def used_itself(text, package, found):
    """Whether something of the package's own __init__ is imported, not only its submodules."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            if any(f"{package}.{alias.name}" not in found for alias in node.names):
                return True
        elif isinstance(node, ast.Import) and any(alias.name == package for alias in node.names):
            return True
    return False


def graph():
    known = modules()
    return {module: imports(module, path, known) for module, path in known.items()}


def violations(edges):
    """Sentences on imports that the table does not allow."""
    said = []
    for module, targets in sorted(edges.items()):
        for target in sorted(targets):
            own, other = layer_of(module), layer_of(target)
            configs = module.startswith("configs") and target.startswith("configs")
            if other > own:
                said.append(f"{module} (layer {own}) imports {target} (layer {other})")
            elif own == 0 and not configs:
                said.append(f"{module} (layer 0) imports {target}: layer 0 imports nothing of ours")
            elif own == 4 and other == 3:
                said.append(f"{module} (layer 4) imports {target}: the model is an argument")
            elif own == 5 and other == 5:
                said.append(f"{module} imports {target}: scripts do not import one another")
    return said


def test_every_module_has_a_place_and_every_place_a_module():
    known = modules()
    assert [name for name in known if layer_of(name) is None] == [], "without a layer in this table"
    patterns = [name for names in LAYERS.values() for name in names]
    stale = [name for name in patterns if not any(fnmatch.fnmatch(m, name) for m in known)]
    assert stale == [], "in the table, but no such module"


def test_imports_keep_to_the_layers():
    assert violations(graph()) == []


def test_there_are_no_cycles():
    tuple(graphlib.TopologicalSorter(graph()).static_order())  # raises CycleError, which names it


def test_the_checks_would_notice():
    """Each rule on imports that break it, in every way of writing them."""
    known = {name: Path(f"{name.replace('.', '/')}.py") for name in ("libs.dim", "libs.mamba")}
    for text in (
        "import libs.dim",
        "from libs import dim",
        "from libs.dim import DiM",
        "def f():\n    from libs.dim import DiM",
        "from . import dim",
        "from .dim import DiM",
        "importlib.import_module('libs.dim')",
    ):
        assert "libs.dim" in set(imported_names(text, "libs.mamba", False)) & known.keys(), text
    for module, target in (
        ("libs.mamba", "libs.dim"), ("libs.ema", "utils"), ("sde", "libs.ema"),
        ("configs.common", "utils"), ("libs.training", "libs.models"), ("train", "eval"),
        ("scripts.compute_fid_stats", "train"), ("libs.ops.backends", "libs.layers"),
    ):  # fmt: skip
        assert len(violations({module: {target}})) == 1, f"{module} -> {target}"
    for module, target in (
        ("configs.digits_T_DiM", "configs.common"), ("libs.ops.cpu_scan", "libs.ops.reference"),
        ("libs.training", "libs.evaluation"), ("train", "libs.models"), ("datasets", "utils"),
    ):  # fmt: skip
        assert violations({module: {target}}) == []
    assert layer_of("libs.ops.reference") == 0 and layer_of("libs.ops.cpu") == 1
    assert layer_of("libs.new_thing") is None and layer_of("new_script") is None


def test_accelerate_is_for_layers_4_and_5():
    users = {
        module
        for module, path in modules().items()
        for name in imported_names(path.read_text(encoding="utf-8"), module, False)
        if re.fullmatch(r"accelerate(\.[\w.]+)?", name)
    }
    assert "libs.launch" in users
    assert {module for module in users if layer_of(module) < 4} == set()


# ---------------------------------------------------------------------------------------------
# Sizes


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_short(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= MAX_SCRIPT_LINES


def test_dim_has_few_arguments():
    from libs.dim import DiM

    parameters = inspect.signature(DiM).parameters.values()
    assert len(parameters) <= MAX_ARGUMENTS
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)


# ---------------------------------------------------------------------------------------------
# What leaves the checkout


def test_no_file_knows_where_it_was_written():
    """No path of a developer's machine, and no home directory."""
    machine = re.compile(rb"(?<![\w.:~/-])/(work|root|home/\w+|Users/\w+)/")
    found = [name for name in project_files() if machine.search((ROOT / name).read_bytes())]
    assert found == []
    assert machine.search(b"see /" + b"work/x") and machine.search(b'"/' + b'root/x"')
    assert not machine.search(b"https://a.b/" + b"root/x") and not machine.search(b"net/work/x")


def test_generic_names_are_not_packaged():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    tools = project["tool"]["setuptools"]
    assert tools["packages"] == [] and tools["py-modules"] == []
    assert not {"scripts", "gui-scripts", "entry-points"} & project["project"].keys()


def test_generic_names_are_not_importable_elsewhere(tmp_path):
    """In this environment, where the project is installed; -I ignores PYTHONPATH and the working
    directory.
    """
    ours = sorted({module.split(".")[0] for module in modules()} - {"datasets"})
    assert {"utils", "sde", "libs", "configs", "train", "scripts"} <= set(ours)
    code = (
        "import importlib.metadata, importlib.util, sys\n"
        "importlib.metadata.version('dim-diffusion-mamba')\n"
        "found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]\n"
        "ours = importlib.util.find_spec('datasets')\n"
        "print(found, bool(ours and 'site-packages' not in str(ours.origin)))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, *ours],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout == "[] False\n", done.stdout + done.stderr


def test_environment_pyproject_and_setup_agree():
    """Dependencies are written once, in pyproject.toml; the others refer to it."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    yaml = pytest.importorskip("yaml")
    from packaging.specifiers import SpecifierSet

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "dynamic" not in project and project["dependencies"]
    environment = yaml.safe_load((ROOT / "environment.yaml").read_text(encoding="utf-8"))
    packages = environment["dependencies"]
    assert [name for name in packages if isinstance(name, dict)] == [{"pip": ["-e ."]}]
    python = [name for name in packages if isinstance(name, str) and name.startswith("python=")]
    assert sorted(map(str, packages[:-1])) == sorted(["pip", *python]), "nothing but python and pip"
    assert python[0].split("=")[-1] in SpecifierSet(project["requires-python"])

    calls = [
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    assert len(calls) == 1 and not calls[0].args
    own = {"cmdclass", "ext_modules"}  # what it builds; no name, version or dependency
    assert {keyword.arg for keyword in calls[0].keywords} <= own


def test_the_test_extra_has_what_the_tests_import():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"]["test"]}
    assert {"pytest", "ruff", "datasets"} <= names
