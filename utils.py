"""What every script needs before it starts: flags, configs, run directory, seeds, pictures.

Layer 0: imports nothing of ours, nor accelerate. torch and Pillow are imported where they are
used, so that a wrong flag is reported in a fraction of a second.
"""

import contextlib
import difflib
import hashlib
import importlib.util
import json
import logging
import math
import operator
import os
import re
import socket
import sys
import time
import traceback
import types
from pathlib import Path

from absl import flags as absl_flags
from ml_collections import config_dict, config_flags
from ml_collections.config_flags import tuple_parser

CHECKOUT = Path(__file__).resolve().parent


class UserError(ValueError):
    """A mistake of the user's: one sentence saying what is wrong and what to do, no traceback."""

    exit_code = 1


class FlagError(UserError):
    """A wrong flag, config file, key or value; exit code 2, as for any command-line error."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------
# Files

def make_directory(path) -> Path:
    """Make the directory `path` and its parents; UserError if that cannot be."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the directory {path}: {error.strerror}") from error
    return Path(path)


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; on success it takes the place of `path` atomically."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value) -> None:
    """Write dicts, tuples, lists, strings and numbers (floats exactly) as JSON, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path):
    """Read what `write_json` wrote; every JSON array comes back as a tuple.

    Raises UserError for a file that is missing or is not JSON.
    """
    try:
        return _tuples(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _tuples(value):
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(item) for item in value)
    return value


# ---------------------------------------------------------------------------------------------
# Configs

def flatten(config) -> dict:
    """{'train.batch_size': 64, ...} of a nested ConfigDict or dict, in its own order."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, (config_dict.ConfigDict, dict)):
            flat.update({f"{key}.{name}": leaf for name, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def config_differences(old, new) -> list[str]:
    """Lines `train.batch_size: 64 -> 128` for what differs between two configs, or two dicts.

    Tuples and lists with the same entries are equal: JSON does not tell them apart.
    """
    old, new = flatten(old), flatten(new)

    def shown(flat, key):
        return repr(_tuples(flat[key])) if key in flat else "absent"

    keys = list(old) + [key for key in new if key not in old]
    return [f"{key}: {shown(old, key)} -> {shown(new, key)}"
            for key in keys if shown(old, key) != shown(new, key)]


def _config_files() -> list[str]:
    return sorted(path.name for path in (CHECKOUT / "configs").glob("*_*.py")
                  if not path.name.startswith("_"))


def _no_such_config(path: str) -> FlagError:
    names = _config_files()
    near = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.5)
    hint = f"; did you mean configs/{near[0]}?" if near else ""
    return FlagError(f"config file {path} does not exist{hint} (configs/ has: {', '.join(names)})")


def _import_error(path: str, error: Exception) -> FlagError:
    if isinstance(error, SyntaxError) and error.filename:
        name, line = error.filename, error.lineno
    else:
        # The innermost frame in the config's own folder: a line of a library says nothing.
        folder = os.path.dirname(os.path.abspath(path))
        frames = [frame for frame in traceback.extract_tb(error.__traceback__)
                  if os.path.dirname(os.path.abspath(frame.filename)) == folder]
        name, line = (frames[-1].filename, frames[-1].lineno) if frames else (path, "?")
    reason = str(error.msg if isinstance(error, SyntaxError) else error)
    return FlagError(f"config file {os.path.relpath(name)}, line {line}: "
                     f"{type(error).__name__}: {reason}")


def load_config(path: str) -> config_dict.ConfigDict:
    """The ConfigDict that get_config() of the Python file `path` returns.

    Raises FlagError if the file is missing, fails to import, or returns something else.
    """
    if not os.path.isfile(path):
        raise _no_such_config(path)
    loader = importlib.machinery.SourceFileLoader("_dim_config", path)
    module = types.ModuleType(loader.name)
    module.__file__ = path
    try:
        loader.exec_module(module)
        config = module.get_config() if hasattr(module, "get_config") else None
    except Exception as error:  # a config is a program: it may raise anything
        raise _import_error(path, error) from error
    if not isinstance(config, config_dict.ConfigDict):
        raise FlagError(f"config file {path} has no function get_config() that returns an "
                        "ml_collections.ConfigDict")
    return config


# ---------------------------------------------------------------------------------------------
# Flags

REQUIRED = object()


def config_file(text: str):
    """Kind of the flag --config: its value is a file, and --config.key=value overrides keys."""
    raise NotImplementedError("parse_flags handles --config itself")


def int_list(text: str) -> tuple[int, ...]:
    """Kind of flags such as --classes=3,7."""
    return tuple(int(item) for item in text.split(","))


_KIND_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "text",
               tuple: "a tuple such as '(1, 2)'", list: "a list such as '[1, 2]'",
               int_list: "integers separated by commas"}

config_flags.register_flag_parser_for_type(list, tuple_parser.TupleParser())


class _Parser(absl_flags.ArgumentParser):
    def __init__(self, kind):
        self.parse = kind


def _define(values, name, kind, default, text):
    default = None if default is REQUIRED else default
    if kind is bool:
        absl_flags.DEFINE_boolean(name, default, text, flag_values=values)
    else:
        flag = absl_flags.Flag(_Parser(kind), absl_flags.ArgumentSerializer(), name, None, text)
        flag.value = default
        absl_flags.DEFINE_flag(flag, flag_values=values)


def _split_config(arguments):
    """(path given by --config or None, the other arguments)."""
    path, rest, iterator = None, [], iter(arguments)
    for argument in iterator:
        if re.fullmatch("--?config", argument):
            path = next(iterator, None)
            if path is None or path.startswith("--"):
                raise FlagError("--config needs a value: the path of a config file")
        elif re.match("--?config=", argument):
            path = argument.split("=", 1)[1]
        else:
            rest.append(argument)
    return path, rest


def _nearest_key(key: str, keys) -> str:
    same_name = [name for name in keys if name.split(".")[-1] == key.split(".")[-1]]
    near = difflib.get_close_matches(key, same_name or keys, n=1, cutoff=0.0 if same_name else 0.5)
    return near[0] if near else ""


def _check_key(key: str, config) -> None:
    keys = flatten(config)
    section = [name for name in keys if name.startswith(key + ".")]
    if section:
        raise FlagError(f"--config.{key} is a section, not a value; set one of its keys, "
                        f"for example --config.{section[0]}={keys[section[0]]}")
    if key not in keys:
        near = _nearest_key(key, keys)
        hint = f"did you mean --config.{near}?" if near else "--help lists its keys"
        raise FlagError(f"the config has no key --config.{key}; {hint}")


def _check_overrides(arguments, config) -> None:
    for argument in arguments:
        match = re.match(r"--?(no)?config\.([^=]+)", argument)
        if match and config is None:
            raise FlagError(f"{argument} overrides a config, but no --config was given")
        if match:
            _check_key(match[2], config)


def _check_elements(overrides: dict, defaults: dict) -> None:
    """The entries of a tuple or list must have a type that an entry of the default has."""
    for key, value in overrides.items():
        allowed = {type(item) for item in defaults[key]} if isinstance(value, tuple) else set()
        allowed |= {int} if float in allowed else set()
        wrong = [item for item in value if type(item) not in allowed] if allowed else []
        if wrong:
            raise FlagError(f"--config.{key} has the entry {wrong[0]!r}; its entries must be like "
                            f"those of the default, {defaults[key]!r}")


def _absl_error(error, kinds: dict) -> FlagError:
    """absl's complaint as one sentence. kinds: the type of each flag and config key."""
    if isinstance(error, absl_flags.UnrecognizedFlagError):
        near = difflib.get_close_matches(error.flagname, kinds, n=1, cutoff=0.5)
        hint = f"did you mean --{near[0]}?" if near else "--help lists the flags"
        return FlagError(f"unknown flag --{error.flagname}; {hint}")
    match = re.match(r"flag --(?P<name>[^=\s]+?)=(?P<value>.*?): ", str(error), re.DOTALL)
    if match and match["name"] in kinds:
        expected = _KIND_NAMES.get(kinds[match["name"]], "valid")
        return FlagError(f"--{match['name']} must be {expected}, got {match['value']!r}")
    return FlagError(str(error))


def _kinds(spec: dict, config) -> dict:
    kinds = {name: kind for name, (kind, _, _) in spec.items()}
    for key in flatten(config) if config is not None else ():
        *sections, name = key.split(".")
        kinds[f"config.{key}"] = operator.attrgetter(".".join(sections))(config).get_type(name) \
            if sections else config.get_type(name)
    return kinds


def _show_help(spec: dict, config) -> None:
    print((sys.modules["__main__"].__doc__ or "").strip() + "\n\nFlags:")
    for name, (kind, default, text) in spec.items():
        ending = "required" if default is REQUIRED else f"default: {default}"
        print(f"  --{name}={_KIND_NAMES.get(kind, 'path of a config file')}\n"
              f"      {text} ({ending})")
    if config is None:
        print("\nGive --config as well to see the keys that --config.<key>=<value> can set.")
    else:
        print("\nConfig keys and their values, set by --config.<key>=<value>:")
        print("\n".join(f"  {key} = {value!r}" for key, value in flatten(config).items()))
    sys.exit(0)


def parse_flags(argv: list[str], spec: dict) -> types.SimpleNamespace:
    """Parse a command line; `spec` is {name: (kind, default, help)}.

    A kind is str, int, float, bool, `int_list` or `config_file`; the default REQUIRED makes the
    flag compulsory. The result has one attribute a flag; if 'config' is among them, `config` is
    the locked ConfigDict with the overrides applied (None without --config), `config_path` its
    file and `overrides` the dict {'train.batch_size': 64} of what the command line changed.

    Raises FlagError, a sentence that names the wrong flag, key or value and the nearest right one.
    """
    path, arguments = _split_config(argv[1:]) if "config" in spec else (None, argv[1:])
    config = load_config(path) if path is not None else None
    if {"--help", "-help", "-h", "--helpfull"} & set(arguments):
        _show_help(spec, config)
    _check_overrides(arguments, config)
    values = absl_flags.FlagValues()
    for name, (kind, default, text) in spec.items():
        if kind is not config_file:
            _define(values, name, kind, default, text)
    kinds, defaults = _kinds(spec, config), flatten(config) if config is not None else {}
    try:
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, flag_values=values,
                                            sys_argv=[argv[0], *arguments])
        extra = values([argv[0], *arguments])[1:]
    except absl_flags.Error as error:
        raise _absl_error(error, kinds) from error
    if extra:
        raise FlagError(f"unexpected argument {extra[0]!r}; flags are written --name=value")
    parsed = {name: values[name].value for name in spec if name != "config"}
    if "config" in spec:
        overrides = config_flags.get_override_values(values["config"]) if path else {}
        _check_elements(overrides, defaults)
        parsed.update(config=config, config_path=path, overrides=overrides)
    for name, (_, default, text) in spec.items():
        if default is REQUIRED and parsed[name] is None:
            raise FlagError(f"--{name} is required: {text}")
    return types.SimpleNamespace(**parsed)


def _report(error: UserError) -> None:
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        # Most errors are every rank's, and rank 0 says them: its exit makes the launcher end us
        # during this sleep. One that is ours alone (our share of the data) is said after it.
        time.sleep(3)
    where = f" (rank {rank})" if rank > 0 else ""
    print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def run_main(main, spec: dict) -> None:
    """Call main(flags) with the parsed command line; a UserError becomes one line on stderr.

    Exit code 1 for a UserError, 2 for a FlagError; other exceptions keep their traceback.
    """
    try:
        main(parse_flags(sys.argv, spec))
    except UserError as error:
        _report(error)
        sys.exit(error.exit_code)


# ---------------------------------------------------------------------------------------------
# The run directory

def _file_name(text: str) -> str:
    """`text` as a file name; what had to be replaced or cut is told apart by a hash."""
    safe = re.sub(r"[^A-Za-z0-9._=+-]+", "_", text)
    if safe == text and len(safe) <= 255:
        return safe
    return f"{safe[:246]}-{hashlib.blake2b(text.encode(), digest_size=4).hexdigest()}"


def run_directory(config_path: str, overrides: dict, workdir: str | None) -> Path:
    """`workdir`, or workdir/<config name>/<overrides>, the convention of U-ViT.

    The last part is 'default' without overrides, else 'optimizer.lr=0.001-train.batch_size=64':
    sorted, and different for different overrides.
    """
    if workdir:
        return Path(workdir)
    # A string with '=' or '-' in it could imitate another override: repr quotes it, which hashes.
    parts = [f"{key}={value if re.fullmatch('[A-Za-z0-9._+]*', str(value)) else repr(value)}"
             for key, value in sorted(overrides.items())]
    return Path("workdir") / Path(config_path).stem / _file_name("-".join(parts) or "default")


class RunLock:
    """Keeps a second run out of `directory` until `release` or the death of this process.

    The lock is the operating system's and belongs to the process: kill -9 releases it at once,
    and forked data loader workers do not inherit it (an flock they would keep alive).
    Raises UserError naming the holder's process id and host. Take it on one rank only.
    """

    def __init__(self, directory):
        path = make_directory(directory) / ".lock"
        try:
            self._file = path.open("a+", encoding="utf-8")  # "a+" keeps the holder's text
        except OSError as error:
            raise UserError(f"cannot write into {directory}: {error.strerror}") from error
        try:
            _lock(self._file)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read() or "another process"
            self._file.close()
            raise UserError(f"{directory} is in use by {holder}; wait for it, stop it, or give "
                            "another --workdir") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.release()


def write_run_files(directory, config, environment: dict) -> list[str]:
    """Write config.json and environment.json (from `libs.run.environment`) into `directory`.

    Returns lines saying what differs from the files that were there; none for a new run.
    """
    changes = []
    for name, value in ("config", config.to_dict()), ("environment", environment):
        path = Path(directory) / f"{name}.json"
        if path.exists():
            changes += [f"{name}: {line}" for line in config_differences(read_json(path), value)]
        write_json(path, value)
    return changes


def _lock(file) -> None:
    """Lock `file` for this process; BlockingIOError if another holds it."""
    if sys.platform == "win32":
        import msvcrt
        file.seek(1 << 30)  # a locked byte cannot be read on Windows: lock one beyond the text
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
        return
    import fcntl
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # POSIX allows EAGAIN and EACCES
        raise BlockingIOError from error
    except OSError as error:  # some cluster file systems have no locks: better unlocked than not
        logging.getLogger("dim").warning("cannot lock %s (%s): make sure that no second run uses "
                                         "this directory", file.name, error.strerror)


# ---------------------------------------------------------------------------------------------
# Seeds

def derive_seed(*keys: int | str) -> int:
    """A seed in [0, 2^63) from integers and strings, the same on every platform and process.

    Draws keyed by (seed, 'noise', step, position) are independent of rank and batch layout.
    """
    exact = [key if isinstance(key, str) else operator.index(key) for key in keys]
    digest = hashlib.blake2b(json.dumps(exact).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


# ---------------------------------------------------------------------------------------------
# Pictures

def _to_uint8(images):
    import torch
    if images.dtype == torch.uint8:
        return images.detach().cpu()
    return images.detach().cpu().float().clamp(0, 1).mul(255).round().to(torch.uint8)


def save_png(path, image) -> None:
    """Save one image, (C, H, W) with C 1 or 3, float in [0, 1] (clamped) or uint8, atomically.

    Raises UserError if the file cannot be written.
    """
    from PIL import Image
    pixels = _to_uint8(image)
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3):
        raise ValueError(f"expected an image (1 or 3, H, W), got {tuple(image.shape)}")
    pixels = pixels[0] if pixels.shape[0] == 1 else pixels.permute(1, 2, 0)
    try:
        with replacing(path) as temporary:
            Image.fromarray(pixels.contiguous().numpy()).save(temporary, format="PNG")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def save_grid(path, images, nrow: int) -> None:
    """Save images (B, C, H, W), float in [0, 1] or uint8, as a grid with `nrow` a row.

    Small images are enlarged by a whole factor (nearest pixel) to a grid of 600 pixels or more.
    """
    from torchvision.utils import make_grid
    nrow = min(nrow, images.shape[0])
    scale = max(1, math.ceil(600 / (nrow * images.shape[-1])))
    large = _to_uint8(images).repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    save_png(path, make_grid(large, nrow=nrow))


# ---------------------------------------------------------------------------------------------
# Launchers

def set_cpu_if_no_gpu() -> None:
    """Where no GPU is visible, tell accelerate to use the CPU; call before any accelerate object.

    Without it, accelerate 1.x started by `accelerate launch --multi_gpu` or torchrun on a machine
    with no GPU makes every process a run of its own. Only `Accelerator` reads the variable:
    a `PartialState` made first does not.
    """
    import torch
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"


def check_world_size(num_processes: int) -> None:
    """Raise UserError unless accelerate's `num_processes` is what the launcher was asked for."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != num_processes:
        raise UserError(f"the launcher started {launched} processes, but accelerate sees "
                        f"{num_processes}: each would train alone; check the launch command")
    # Asked for several processes without --multi_gpu, `accelerate launch` starts one, with a
    # rendezvous address (prepare_simple_launcher_cmd_env of accelerate 1.x).
    alone = "ACCELERATE_MIXED_PRECISION" in os.environ and "WORLD_SIZE" not in os.environ
    if alone and "MASTER_PORT" in os.environ and "MASTER_PORT" not in _launcher_environment():
        raise UserError("accelerate launch was asked for several processes but started one: add "
                        "--multi_gpu (it works without a GPU too), or use --num_processes 1")


def _launcher_environment() -> dict:
    import psutil
    try:
        return psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return {"MASTER_PORT": ""}  # not to be known: assume that the user exported it
