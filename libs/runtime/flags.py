"""Command lines: `--config=FILE --config.<key>=<value>` and flags, by absl and ml_collections."""

import difflib
import errno
import os
import runpy
import sys
import types
from pathlib import Path

import torch
from absl import flags as absl_flags
from ml_collections import config_dict, config_flags

from configs import common
from utils import UserError, flatten

CONFIGS = Path(common.__file__).parent
REQUIRED = object()  # the default of a flag that must be given
config_file = object()  # kind of the flag --config


class FlagError(UserError):
    """A wrong flag, config file, key or value; exit status 2, as for any command-line error."""

    exit_code = 2


def load_config(path: str) -> config_dict.ConfigDict:
    """What get_config() of the Python file `path` returns; FlagError if there is no such file."""
    if not os.path.isfile(path):
        names = sorted(file.name for file in CONFIGS.glob("*_*.py") if file.name[0] != "_")
        near = difflib.get_close_matches(Path(path).name, names, n=1, cutoff=0.5)
        hint = f"did you mean configs/{near[0]}?" if near else f"configs/ has {', '.join(names)}"
        raise FlagError(f"config file {path} does not exist; {hint}")
    return runpy.run_path(path)["get_config"]()


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
    "config": (config_file, REQUIRED, "config file; --config.<key>=<value> changes one value"),
    "workdir": (file_path, None, "run directory; otherwise workdir/<config>/<changed values>"),
}
EVALUATION = {
    **TRAINING,
    "nnet_path": (file_path, REQUIRED, "a <step>.ckpt directory, or a file with weights"),
    "output_path": (file_path, None, "json file of the result; otherwise evaluation.json"),
}


class _Parser(absl_flags.ArgumentParser):
    def __init__(self, kind):
        self.parse = kind


def _define_flags(spec, config, argv):
    values = absl_flags.FlagValues()
    for name, (kind, default, text) in spec.items():
        default = None if default is REQUIRED else default
        if kind is bool:
            absl_flags.DEFINE_boolean(name, default, text, flag_values=values)
        elif kind is not config_file:
            flag = absl_flags.Flag(_Parser(kind), absl_flags.ArgumentSerializer(), name, None, text)
            flag.value = default
            absl_flags.DEFINE_flag(flag, flag_values=values)
    try:
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    except (AttributeError, KeyError) as error:  # ConfigDict's, one in the other
        reason = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error.args[0]
        raise FlagError(f"the config has no key {reason}") from error
    return values


def _take_config(argv):
    """(path given by --config or None, the other words)."""
    values = absl_flags.FlagValues()
    values.set_gnu_getopt()
    absl_flags.DEFINE_string("config", None, "", flag_values=values)
    rest = values(argv, known_only=True)
    return values.config and file_path(values.config), rest


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

    A kind is str, int, float, bool, `int_list`, `file_path` or `config_file`. The result has one
    attribute a flag; if 'config' is among them, `config` is the locked ConfigDict with the
    overrides applied (None without --config), `config_path` its file and `overrides` the dict
    {'train.batch_size': 64} of what the command line changed. FlagError for a wrong flag or value.
    """
    try:
        path, argv = _take_config(argv) if "config" in spec else (None, argv)
        config = load_config(path) if path else None
        if {"--help", "-h"} & set(argv):
            _show_help(spec, config)
        values = _define_flags(spec, config, argv)
        extra = values(argv)[1:]
    except absl_flags.Error as error:
        raise FlagError(str(error)) from error
    parsed = {name: values[name].value for name in spec if name != "config"}
    if "config" in spec:
        overrides = config_flags.get_override_values(values["config"]) if path else {}
        parsed |= {"config": config, "config_path": path, "overrides": overrides}
    absent = [n for n, (_, default, _) in spec.items() if default is REQUIRED and parsed[n] is None]
    if extra or absent:
        wrong = f"unexpected argument {extra[0]!r}" if extra else f"--{absent[0]} is required"
        raise FlagError(f"{wrong}; flags are written --name=value, and --help lists them")
    if config is not None:
        check_values(config)
        for key, value in flatten(config).items():
            if isinstance(value, str) and value.startswith("~"):
                config.update_from_flattened_dict({key: file_path(value)})
    return types.SimpleNamespace(**parsed)


def _explain_shortage(error):
    """A sentence for a full disk or memory that ran out; None for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"cannot write {error.filename or ''}: {error.strerror}; make room"
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
    said = str(text).rpartition("utils.UserError: ")[2]  # out of torch's words on a worker
    # A progress bar may have no line end.
    print(f"\nerror{where}: {' '.join(said.split())}", file=sys.stderr, flush=True)
    sys.exit(status)


def run_main(main, spec: dict) -> None:
    """Call main(flags) with the parsed command line. A UserError, a full disk or memory that ran
    out is one line on stderr and exit status 1, 2 for a FlagError; Ctrl-C is 130. Other exceptions
    keep their traceback.
    """
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
