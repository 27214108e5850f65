"""The shape of the project: rooms, doors and the order of imports, and names that stay in the
checkout.
"""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# The rooms in the order of imports: each may import the rooms of the lines above it.
ROOMS = [
    ["utils"],
    ["sde", "configs"],
    ["libs.files", "libs.ops", "libs.diffusion", "libs.runtime"],
    ["libs.model", "libs.data"],
    ["datasets"],
    ["libs.parts"],
    ["libs.evaluate"],
    ["libs.train"],
    ["train", "eval", "sample", "scripts"],
    ["train_ldm_discrete", "eval_ldm_discrete"],
]
NOT_IN_ROOMS = ("tests/", "benchmarks/", "setup.py", "libs/__init__.py")
MAX_ARGUMENTS = 16  # of DiM


def project_files():
    """Paths relative to the checkout of what git has or would take."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("this is no git repository: its files cannot be told from others")
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def room_of(module):
    """('libs.model', 5): the room of a dotted name and its line; (None, None) without one."""
    for line, rooms in enumerate(ROOMS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return room, line
    return None, None


def imported_names(source, package=""):
    """Dotted names that a module imports, anywhere in it; of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: -node.level or None], base]).strip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def door_names(room):
    """What a room's __init__.py offers, by import or definition."""
    door = ROOT / room.replace(".", "/") / "__init__.py"
    if not door.is_file():
        return set()
    nodes = ast.parse(door.read_text()).body
    imported = {a.asname or a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
    return imported | {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def violations(module, source):
    """Sentences on imports of `module` that the table or the doors do not allow."""
    own, own_line = room_of(module)
    for name in imported_names(source, module):
        room, line = room_of(name)
        if room is None or room == own:
            continue
        if line >= own_line:
            yield f"{module} imports {name}, whose room is not above its own"
        if name.removeprefix(f"{room}.") in door_names(room) or room == "configs":
            continue
        if (name if is_module(name) else name.rpartition(".")[0]) != room:
            yield f"{module} imports {name} past the door of {room}"


def modules():
    """{dotted name: path} of the files that stand in rooms."""
    names = [n for n in project_files() if n.endswith(".py") and not n.startswith(NOT_IN_ROOMS)]
    return {n[:-3].replace("/", ".").removesuffix(".__init__"): ROOT / n for n in names}


def test_every_file_has_a_room():
    assert [name for name in modules() if room_of(name)[0] is None] == []
    for room in sum(ROOMS, []):
        assert is_module(room), f"{room} is in the table, but is not there"


def test_imports_keep_to_rooms_and_doors():
    said = [line for name, path in modules().items() for line in violations(name, path.read_text())]
    assert said == []


@pytest.mark.parametrize(
    "module, source, broken",
    [
        ("libs.model.dim", "from libs.train import train", 1),
        ("libs.model.dim", "def f():\n    import libs.train.loop", 2),
        ("libs.train.loop", "from libs.model.dim import DiM", 1),
        ("libs.train.loop", "from libs.model import dim", 1),
        ("libs.train.loop", "from ..model import dim", 1),
        ("libs.ops.backends", "from libs.runtime import flags", 2),
        ("train", "import eval", 1),
        ("libs.train.loop", "from libs.model import DiM", 0),
        ("libs.model.dim", "from libs.model.layers import RMSNorm", 0),
        ("configs.digits_T_DiM", "from configs import common", 0),
    ],
)
def test_the_rules_would_notice(module, source, broken):
    assert len(list(violations(module, source))) == broken


def test_dim_has_few_arguments():
    from libs.model import DiM

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
