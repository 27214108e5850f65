"""The shape of the project: rooms, doors and the order of imports; what leaves the checkout."""

import ast
import importlib
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
    ["flow"],
    ["sde", "configs"],
    ["libs.files", "libs.ops", "libs.diffusion", "libs.runtime"],
    ["libs.model", "libs.data"],
    ["datasets"],
    ["libs.evaluate"],
    ["libs.parts"],
    ["libs.train"],
    ["train", "eval", "sample", "pipeline", "benchmarks"],
    ["train_ldm_discrete", "eval_ldm_discrete", "scripts", "app"],
]
NOT_IN_ROOMS = ("tests/", "setup.py", "libs/__init__.py")
MAX_ARGUMENTS = 16  # of DiM


def project_files():
    """Paths relative to the checkout of what git has or would take."""
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(words, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("this is no git repository: its files cannot be told from others")
    return sorted(name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def find_room(module):
    """('libs.model', 3): the room of a dotted name and its line; (None, None) without one."""
    for line, rooms in enumerate(ROOMS):
        for room in rooms:
            if module == room or module.startswith(room + "."):
                return room, line
    return None, None


def list_imports(source, package=""):
    """Dotted names that a module imports, anywhere in it; of `from a import b` a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: -node.level or None], base]).strip(".")
            yield from (f"{base}.{alias.name}" for alias in node.names)


def list_door(room):
    """What a room's __init__.py offers, by import or definition."""
    door = ROOT / room.replace(".", "/") / "__init__.py"
    nodes = ast.parse(door.read_text()).body if door.is_file() else []
    imported = {a.asname or a.name for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names}
    return imported | {n.name for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


def is_module(name):
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").is_file() or path.is_dir()


def find_violations(module, source):
    """Sentences on imports of `module` that the table or the doors do not allow."""
    own, own_line = find_room(module)
    for name in list_imports(source, module):
        room, line = find_room(name)
        if room is None or room == own:
            continue
        if line >= own_line:
            yield f"{module} imports {name}, whose room is not above its own"
        if name.removeprefix(f"{room}.") in list_door(room) or room == "configs":
            continue
        if (name if is_module(name) else name.rpartition(".")[0]) != room:
            yield f"{module} imports {name} past the door of {room}"


def list_modules():
    """{dotted name: path} of the files that stand in rooms."""
    names = [n for n in project_files() if n.endswith(".py") and not n.startswith(NOT_IN_ROOMS)]
    return {n[:-3].replace("/", ".").removesuffix(".__init__"): ROOT / n for n in names}


def test_every_file_has_a_room():
    assert [name for name in list_modules() if find_room(name)[0] is None] == []
    for room in sum(ROOMS, []):
        assert is_module(room), f"{room} is in the table, but is not there"


def test_imports_keep_to_rooms_and_doors():
    files = list_modules().items()
    assert [line for name, path in files for line in find_violations(name, path.read_text())] == []


@pytest.mark.parametrize("room", [p.parent.name for p in sorted(ROOT.glob("libs/*/__init__.py"))])
def test_a_door_offers_what_it_imports(room):
    """And not a module of the same name that a later line loads."""
    door = importlib.import_module(f"libs.{room}")
    for node in ast.parse(Path(door.__file__).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            source = importlib.import_module(node.module)
            for alias in node.names:
                name = alias.asname or alias.name
                assert getattr(door, name) is getattr(source, alias.name), name


def test_test_modules_import_no_test_module():
    tests = [ROOT / name for name in project_files() if re.match(r"tests/test_\w+\.py", name)]
    imports = {path.name: list(list_imports(path.read_text())) for path in tests}
    assert len(tests) > 20
    assert [n for n, names in imports.items() if any(i.startswith("test_") for i in names)] == []


@pytest.mark.parametrize("module, source, broken", [
    ("libs.model.dim", "from libs.train import train", 1),
    ("libs.model.dim", "def f():\n    import libs.train.loop", 2),
    ("libs.train.loop", "from libs.model.dim import DiM", 1),
    ("libs.train.loop", "from libs.model import dim", 1),
    ("libs.train.loop", "from ..model import dim", 1),
    ("libs.ops.backends", "from libs.runtime import flags", 2),
    ("benchmarks.bench_ops", "from libs.ops import reference", 1),
    ("train", "import eval", 1),
    ("libs.train.loop", "from libs.model import DiM", 0),
    ("libs.model.dim", "from libs.model.layers import fit_patches", 0),
    ("configs.digits_T_DiM", "from configs import common", 0),
])  # fmt: skip
def test_the_rules_would_notice(module, source, broken):
    assert len(list(find_violations(module, source))) == broken


def test_dim_has_few_arguments():
    from libs.model import DiM

    parameters = inspect.signature(DiM).parameters.values()
    assert len(parameters) <= MAX_ARGUMENTS
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)


def test_no_file_knows_where_it_was_written():
    """No path of a developer's machine, and no home directory."""
    machine = re.compile(rb"(?<![\w.:~/-])/(work|root|home/\w+|Users/\w+)/")
    found = [name for name in project_files() if machine.search((ROOT / name).read_bytes())]
    assert found == []
    assert machine.search(b"see /" + b"work/x") and machine.search(b'"/' + b'root/x"')
    assert not machine.search(b"https://a.b/" + b"root/x") and not machine.search(b"net/work/x")


def test_generic_names_are_not_importable_elsewhere(tmp_path):
    """In this environment, where the project is installed; -I ignores PYTHONPATH and the working
    directory.
    """
    ours = sorted({module.split(".")[0] for module in list_modules()} - {"datasets"})
    assert {"utils", "sde", "libs", "configs", "train", "scripts"} <= set(ours)
    code = (
        "import importlib.metadata, importlib.util, sys\n"
        "importlib.metadata.version('dim-diffusion-mamba')\n"
        "found = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]\n"
        "ours = importlib.util.find_spec('datasets')\n"
        "print(found, bool(ours and 'site-packages' not in str(ours.origin)))"
    )
    words = [sys.executable, "-I", "-c", code, *ours]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout == "[] False\n", done.stdout + done.stderr
