"""Command lines: `--config=FILE --config.<key>=<value>` and flags, by absl and ml_collections."""

import difflib
import errno
import functools
import operator
import os
import re
import runpy
import sys
import traceback
import types
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from absl import flags as absl_flags
from ml_collections import config_dict, config_flags

from configs import common
from libs.runtime.logs import Output
from utils import UserError, flatten, listed, look_up, read_json

CONFIGS = Path(common.__file__).parent
REQUIRED = object()  # the default of a flag that must be given
_OPEN_KEY = re.compile(r"--?config\.(process|loss|nnet\.mixer)\.(?:(\w+)\.)?(\w+)(?:=|$)")


class FlagError(UserError):
    """A wrong flag, config file, key or value; exit status 2, as for any command-line error."""

    exit_code = 2


def _explain_key(error):
    """A sentence for the error of a ConfigDict that lacks a key."""
    # An AttributeError holds the KeyError, which lists the fields of a locked section.
    reason = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error.args[0]
    key, hint = re.split("\n| does not exist", reason)[0], re.search("\nDid you mean .*", reason)
    return f"the config has no key {key.removeprefix('Key ')}{'.' + hint[0] if hint else ''}"


def config_beside(weights):
    """The path of the config.json beside `weights`, a checkpoint or a file in it."""
    return (Path(weights) if Path(weights).is_dir() else Path(weights).parent) / "config.json"


def read_class_names(weights):
    """Names of the classes, by number, of the run that made `weights`; [] if none are known."""
    folder = config_beside(weights).absolute().parent
    files = [path / "environment.json" for path in (folder, folder.parent.parent)]
    known = next((read_json(path) for path in files if path.is_file()), {})
    return [*known.get("classes", ())]


def _find_config(weights):
    """The path of the config beside `weights`; None for None."""
    if weights and not (path := config_beside(weights)).is_file():
        lack = "has no config.json beside it" if Path(weights).exists() else "does not exist"
        advice = "give a <step>.ckpt directory, or --config=<config file> of the model"
        raise FlagError(f"{weights} {lack}: {advice}")
    return str(path) if weights else None


def _read_json_config(path):
    """The config of the run that wrote this config.json, keys newer than the run with defaults."""
    values = read_json(path)
    if not {"nnet", "pred", "sample", "train"} <= values.keys():
        raise FlagError(f"{path} is no config.json of a run: give --config=<config file>")
    config = common.get_config().unlock()
    config.nnet = look_up(common.NNETS, values["nnet"]["name"], "nnet.name")().unlock()
    config.update(values)
    return config


def load_config(path: str) -> config_dict.ConfigDict:
    """What get_config() of the Python file `path` returns, or the config of a run's config.json;
    FlagError if there is no such file, or it sets a key that no config has.
    """
    if not os.path.isfile(path):
        names = sorted(file.name for file in CONFIGS.glob("*_*.py") if file.name[0] != "_")
        near = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.5)
        folder = os.path.relpath(CONFIGS)
        hint = f"did you mean {folder}/{near[0]}?" if near else f"{folder} has {listed(names)}"
        raise FlagError(f"config file {path} does not exist; {hint}")
    if path.endswith(".json"):
        return _read_json_config(path)
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # a module beside it can be imported
    try:
        return runpy.run_path(path)["get_config"]()
    except (AttributeError, KeyError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        if Path(frames[-1].filename).name != "config_dict.py":
            raise
        others = "config_dict.py", "common.py"
        line = [frame for frame in frames if Path(frame.filename).name not in others][-1]
        raise FlagError(f"{line.filename}, line {line.lineno}: {_explain_key(error)}") from error


def check_values(config) -> None:
    """FlagError for a value outside RANGES and CHOICES of configs.common; None passes."""
    flat = flatten(config)
    for key, (low, high) in common.RANGES.items():
        value = flat.get(key)
        entries = value if isinstance(value, tuple) else (value,)
        if not all(entry is None or low <= entry <= high for entry in entries):
            raise FlagError(f"--config.{key} is {value!r}, expected {low} to {high}")
    for key, choices in common.CHOICES.items():
        if flat.get(key) not in (None, *choices):
            raise FlagError(f"--config.{key} is {flat[key]!r}, expected one of {choices}")


def file_path(text: str) -> str:
    """Kind of flags that name a file or a folder: a leading ~ is the home directory."""
    return os.path.expanduser(text)


def int_list(text: str) -> tuple[int, ...]:
    """Kind of flags such as --classes=3,7."""
    return tuple(int(item) for item in text.split(","))


# Flags of the training and of the evaluation scripts: name -> (kind, default, help).
TRAINING = {
    "config": (file_path, REQUIRED, "config file; --config.<key>=<value> changes one value"),
    "workdir": (file_path, None, "run directory; otherwise workdir/<config>/<changed values>"),
}
EVALUATION = {
    **TRAINING,
    "config": (file_path, None, "config file; otherwise the config.json beside the weights"),
    "nnet_path": (file_path, REQUIRED, "a <step>.ckpt directory, or a file with weights"),
    "images": (file_path, None, "a folder, .zip or .npz of pictures, measured without --nnet_path"),
    "output_path": (file_path, None, "json file of the result; otherwise evaluation_<step>.json"),
}


class _Parser(absl_flags.ArgumentParser):
    def __init__(self, kind):
        self.parse = kind


def _define_flags(spec):
    values = absl_flags.FlagValues()
    values.set_gnu_getopt()
    for name, (kind, default, text) in spec.items():
        default = None if default is REQUIRED else default
        if kind is bool:
            absl_flags.DEFINE_boolean(name, default, text, flag_values=values)
        else:
            absl_flags.DEFINE(_Parser(kind), name, default, text, flag_values=values)
    return values


def _parse_last(flag, parse, word):
    """Of a flag that is given twice, the last value counts, as of all others."""
    flag.present = 0
    parse(word)


def _add_keys(config, words):
    """Give `process`, `loss` and `nnet.mixer` the keys that `words` set and they lack, of any type:
    what reads these sections refuses a wrong name.
    """
    for found in filter(None, map(_OPEN_KEY.match, words)):
        place, inner, key = found.groups()
        section = functools.reduce(operator.getitem, place.split("."), config)
        if inner and inner not in section:
            section[inner] = config_dict.ConfigDict()
        section = section[inner] if inner else section
        if not isinstance(section, config_dict.ConfigDict):
            raise FlagError(f"config.{place}.{inner} is one value: it has no key {key}")
        if key not in section:
            section[key] = config_dict.placeholder(object)


def _override(config, values, words):
    """Change `config` as --config.<key>=<value> in `words` says; {key: value}, other words."""
    delattr(values, "config")  # its path
    try:
        _add_keys(config, words)
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    except (AttributeError, KeyError) as error:
        raise FlagError(_explain_key(error)) from error
    for flag in (values[name] for name in values):
        if isinstance(flag, absl_flags.MultiFlag):  # a tuple, to which a second would be added
            flag.parse = functools.partial(_parse_last, flag, flag.parse)
    words = values(words)
    check_values(config)
    for key, value in flatten(config).items():
        if isinstance(value, str) and value.startswith("~"):
            config.update_from_flattened_dict({key: file_path(value)})
    return config_flags.get_override_values(values["config"]), words


def _show_help(spec, config):
    print((sys.modules["__main__"].__doc__ or "").strip() + "\n\nFlags:")
    for name, (_, default, text) in spec.items():
        ending = "required" if default is REQUIRED else f"default: {default}"
        print(f"  --{name}: {text} ({ending})")
    for key, value in flatten(config or {}).items():
        print(f"  --config.{key}={value!r}")
    sys.exit(0)


def parse_flags(argv: list[str], spec: dict) -> types.SimpleNamespace:
    """Parse a command line; `spec` is {name: (kind, default, help)}.

    A kind is str, int, float, bool, `int_list` or `file_path`. The result has one attribute a flag;
    if 'config' is among them, `config` is the locked ConfigDict with the overrides applied (None
    without a config), `config_path` its file and `overrides` the dict {'train.batch_size': 64} of
    what the command line changed. FlagError for a wrong flag or value.
    """
    values, config, overrides = _define_flags(spec), None, {}
    try:
        words = values(argv, known_only=True)
        parsed = {name: values[name].value for name in spec}
        path = parsed.get("config") or _find_config(parsed.get("nnet_path"))
        if parsed.get("images"):  # neither network nor config
            path, spec = path or common.__file__, {**spec, "nnet_path": (None, None, "")}
        config = load_config(path) if path else None
        if {"--help", "-h"} & set(words):
            _show_help(spec, config)
        overrides, (_, *extra) = _override(config, values, words) if path else ({}, values(words))
    except absl_flags.Error as error:
        raise FlagError(str(error)) from error
    absent = [n for n, (_, default, _) in spec.items() if default is REQUIRED and parsed[n] is None]
    if extra or absent:
        wrong = f"unexpected argument {extra[0]!r}" if extra else f"--{absent[0]} is required"
        raise FlagError(f"{wrong}; flags are written --name=value, and --help lists them")
    if "config" in spec:
        parsed |= {"config": config, "config_path": path, "overrides": overrides}
    return types.SimpleNamespace(**parsed)


def _explain_shortage(error):
    """A sentence for a full disk or memory that ran out; None for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write {error.filename or ''}: {error.strerror}; make room"
    if str(error).startswith("DataLoader worker") or "shared memory" in str(error):
        last = str(error).strip().rpartition("\n")[2]
        return (
            f"{last}; memory ran out, or /dev/shm is small: give more (docker run --shm-size=8g), "
            "or lower num_workers"
        )
    shortages = (torch.OutOfMemoryError, MemoryError)
    if isinstance(error, shortages) or "can't allocate memory" in str(error):
        return (
            f"memory ran out ({str(error)[:200]}): raise --config.gradient_accumulation_steps, set "
            "--config.nnet.activation_checkpointing=True, or lower --config.sample.mini_batch_size"
        )
    return None


def _fail(text, status):
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f" (rank {rank})"
    # Of a worker's error torch makes a text, its own words and a traceback before the sentence.
    said = str(text).rpartition(f"{type(text).__name__}: ")[2]
    # A progress bar may have no line end.
    print(f"\nerror{where}: {' '.join(said.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def run_main(main, spec: dict) -> None:
    """Call main(flags) with the parsed command line. A UserError, a full disk or memory that ran
    out is one line on stderr and exit status 1, 2 for a FlagError; Ctrl-C is 130.
    """
    with redirect_stdout(Output(sys.stdout)), redirect_stderr(Output(sys.stderr)):
        try:
            main(parse_flags(sys.argv, spec))
        except UserError as error:
            _fail(error, error.exit_code)
        except KeyboardInterrupt:
            _fail("interrupted", 130)  # as shells have it: 128 + SIGINT
        except Exception as error:
            if not (text := _explain_shortage(error)):
                raise
            _fail(text, UserError.exit_code)
        finally:
            sys.stdout.flush()
