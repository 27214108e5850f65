"""Command lines and configs: `--config=FILE --config.<key>=<value>`, and every mistake in them as
one sentence.

torch is imported by nothing here, so that a wrong flag is reported in a fraction of a second.
"""

import difflib
import errno
import functools
import importlib.util
import operator
import os
import re
import sys
import time
import traceback
import types
from pathlib import Path

from absl import flags as absl_flags
from ml_collections import config_dict, config_flags
from ml_collections.config_flags import tuple_parser

from configs import common
from libs.runtime import watch
from libs.runtime.logs import one_line
from utils import UserError, flatten, listed

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class FlagError(UserError):
    """A wrong flag, config file, key or value; exit code 2, as for any command-line error."""

    exit_code = 2


# ---------------------------------------------------------------------------------------------
# Configs


def _config_files() -> list[str]:
    return sorted(path.name for path in CONFIGS.glob("*_*.py") if not path.name.startswith("_"))


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
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if os.path.dirname(os.path.abspath(frame.filename)) == folder
        ]
        name, line = (frames[-1].filename, frames[-1].lineno) if frames else (path, "?")
    reason = str(error.msg if isinstance(error, SyntaxError) else error)
    return FlagError(
        f"config file {os.path.relpath(name)}, line {line}: {type(error).__name__}: {reason}"
    )


def _check_complete(path: str, config) -> None:
    found, needed = flatten(config), flatten(common.get_config())
    # The other keys of a network are its constructor's, which libs.model.build compares.
    needed |= dict.fromkeys(("nnet.name", "nnet.pretrained_path"))
    absent = [
        key for key, default in needed.items()
        if key not in found or (found[key] is None and default is not None)
    ]  # fmt: skip
    if absent:
        raise FlagError(
            f"config file {path} has no value for {listed(absent)}: a config file "
            "starts from configs.common.get_config() and gives it an nnet, as "
            "configs/digits_T_DiM.py does"
        )


def load_config(path: str) -> config_dict.ConfigDict:
    """The ConfigDict that get_config() of the Python file `path` returns.

    Raises FlagError if the file is missing, fails to import, returns something else, or lacks keys
    of configs.common.get_config() or its nnet.
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
        raise FlagError(
            f"config file {path} has no function get_config() that returns an "
            "ml_collections.ConfigDict"
        )
    _check_complete(path, config)
    return config


# ---------------------------------------------------------------------------------------------
# Values

_LARGEST = 2**63 - 1
_WHOLE, _NOT_NEGATIVE, _SHARE = (1, _LARGEST), (0, _LARGEST), (0, 1)
# Far beyond any network, near enough that a config.json from somebody else fills no memory.
_SIZE, _SIDE, _COUNT = (1, 1 << 16), (1, 1 << 14), (1, 1 << 10)

# What a run would stumble over only later or never, key -> (lowest, highest), of each entry of a
# tuple. Every other value is checked where it is used.
RANGES = {
    "seed": (-_LARGEST, _LARGEST), "gradient_accumulation_steps": _WHOLE,
    "max_grad_norm": _NOT_NEGATIVE, "ug_m": (2, 64), "ug_theta": _NOT_NEGATIVE,
    "ug_eta": _SHARE, "ug_T": _SHARE, "autoencoder.scale_factor": (1e-6, 1e6),
    "dataset.resolution": _SIDE, "dataset.p_uncond": _SHARE,
    "nnet.input_size": _SIDE, "nnet.in_channels": _SIZE, "nnet.patch_size": _SIDE,
    "nnet.dim": _SIZE, "nnet.depth": _COUNT, "nnet.heads": _SIZE, "nnet.mlp_ratio": _COUNT,
    "nnet.num_classes": (0, 1 << 24), "nnet.mamba.d_state": _COUNT, "nnet.mamba.d_conv": _COUNT,
    "nnet.mamba.expand": _COUNT, "optimizer.lr": (0, 1e3), "optimizer.eps": (1e-20, _LARGEST),
    "optimizer.weight_decay": _NOT_NEGATIVE, "optimizer.betas": (0, 0.999999),
    "train.n_steps": _WHOLE, "train.batch_size": (1, 10**7), "train.ema_rate": _SHARE,
    "train.num_workers": (0, 1024),
    "train.max_bad_steps": _WHOLE, "train.log_interval": _WHOLE, "train.eval_interval": _WHOLE,
    "train.save_interval": _WHOLE, "train.keep_last": _WHOLE, "train.fid_samples": _NOT_NEGATIVE,
    "train.grid_samples": _NOT_NEGATIVE, "sample.sample_steps": (1, 1 << 20),
    "sample.n_samples": (2, 10**9), "sample.mini_batch_size": _WHOLE,
    "sample.guidance_interval": _SHARE, "sample.vis_label": _NOT_NEGATIVE,
    "sample.scale": (-1e4, 1e4),
}  # fmt: skip
_LENGTHS = {"optimizer.betas": 2, "sample.guidance_interval": 2, "z_shape": 3}
_CHOICES = {
    "pred": ("noise_pred", "x0_pred"), "train.mode": ("uncond", "cond"),
    "lr_scheduler.name": ("customized", "cosine"),
}  # fmt: skip


def _expected(low, high, entries) -> str:
    """The range in words; its upper bound only if it says something, or if it is the broken one."""
    if high <= 1:
        return f"{low} to {high}"
    too_large = any(isinstance(entry, (int, float)) and entry > high for entry in entries)
    return f"{low} or more" + (f", at most {high}" if high < _LARGEST or too_large else "")


def check_values(config) -> None:
    """FlagError for a value that no run can use; a placeholder without a value is none."""
    values = {key: value for key, value in flatten(config).items() if value is not None}
    for key, value in values.items():
        entries = value if isinstance(value, (tuple, list)) else (value,)
        low, high = RANGES.get(key, (None, None))
        if key in _CHOICES and value not in _CHOICES[key]:
            expected = " or ".join(map(repr, _CHOICES[key]))
        elif key in _LENGTHS and len(entries) != _LENGTHS[key]:
            expected = f"{_LENGTHS[key]} entries"
        elif key in RANGES and not all(
            isinstance(entry, (int, float)) and low <= entry <= high for entry in entries
        ):
            expected = _expected(low, high, entries)
        else:
            continue
        raise FlagError(f"--config.{key} is {value!r}, expected {expected}")


def check_numbers(args, ranges: dict) -> None:
    """UserError for a flag beyond its (lowest, highest) in `ranges`; one not given is none."""
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            expected = f"{low} or more" if value < low else f"{low} to {high}"
            raise UserError(f"--{name} is {value}, it must be {expected}")


# ---------------------------------------------------------------------------------------------
# Flags

REQUIRED = object()
INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it: 128 + SIGINT
MAX_MESSAGE = 10_000  # characters of a sentence on the console


def config_file(text: str):
    """Kind of the flag --config: its value is a file, and --config.key=value overrides keys."""
    raise NotImplementedError("parse_flags handles --config itself")


def file_path(text: str) -> str:
    """Kind of flags that name a file or a folder: a leading ~ is the home directory."""
    return os.path.expanduser(text)


# Flags of the training and of the evaluation scripts.
TRAINING = {
    "config": (config_file, REQUIRED, "config file; --config.<key>=<value> changes one value"),
    "workdir": (file_path, None, "run directory; otherwise workdir/<config>/<changed values>"),
}
EVALUATION = {
    **TRAINING,
    "nnet_path": (
        file_path, REQUIRED, "a <step>.ckpt directory, a file in it, or an official nnet_ema.pth",
    ),
    "output_path": (
        file_path, None, "json file of the result; otherwise evaluation.json in the run directory",
    ),
}  # fmt: skip


def int_list(text: str) -> tuple[int, ...]:
    """Kind of flags such as --classes=3,7."""
    return tuple(int(item) for item in text.split(","))


_KIND_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    file_path: "a path",
    tuple: "a tuple such as '(1, 2)'",
    list: "a list such as '[1, 2]'",
    int_list: "integers separated by commas",
}

# Config keys that are files or folders, as flags of the kind `file_path`.
_PATH_KEYS = (
    "dataset.path", "dataset.fid_stats", "autoencoder.pretrained_path", "nnet.pretrained_path",
    "sample.path", "sample.adm_npz", "sample.fid_weights_path",
)  # fmt: skip

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
        raise FlagError(
            f"--config.{key} is a section, not a value; set one of its keys, "
            f"for example --config.{section[0]}={keys[section[0]]}"
        )
    if key not in keys:
        near = _nearest_key(key, keys)
        hint = f"did you mean --config.{near}?" if near else "--help lists its keys"
        raise FlagError(f"the config has no key --config.{key}; {hint}")


def _check_overrides(arguments, config) -> None:
    for argument in arguments:
        match = re.match(r"--?(no)?config\.([^=]*)", argument)
        if match and config is None:
            raise FlagError(f"{argument} overrides a config, but no --config was given")
        if match:
            _check_key(match[2], config)


def check_elements(overrides: dict, defaults: dict) -> None:
    """The entries of a tuple or list must have a type that an entry of the default has; of a
    placeholder, which has none, they are numbers.
    """
    for key, value in overrides.items():
        if not isinstance(value, (tuple, list)):
            continue
        like = (1.0,) if defaults[key] is None else defaults[key]
        allowed = {type(item) for item in like} | ({int} if float in map(type, like) else set())
        wrong = [item for item in value if type(item) not in allowed] if allowed else []
        if wrong:
            expected = (
                "numbers"
                if defaults[key] is None
                else f"like those of the default, {defaults[key]!r}"
            )
            raise FlagError(
                f"--config.{key} has the entry {wrong[0]!r}; its entries must be {expected}"
            )


def _expand_paths(config) -> None:
    values = flatten(config)
    paths = {key: file_path(values[key]) for key in _PATH_KEYS if isinstance(values[key], str)}
    config.update_from_flattened_dict(paths)


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
        kinds[f"config.{key}"] = (
            operator.attrgetter(".".join(sections))(config).get_type(name)
            if sections
            else config.get_type(name)
        )
    return kinds


def _show_help(spec: dict, config) -> None:
    print((sys.modules["__main__"].__doc__ or "").strip() + "\n\nFlags:")
    for name, (kind, default, text) in spec.items():
        ending = "required" if default is REQUIRED else f"default: {default}"
        print(
            f"  --{name}={_KIND_NAMES.get(kind, 'path of a config file')}\n      {text} ({ending})"
        )
    if config is None and "config" in spec:
        print("\nGive --config as well to see the keys that --config.<key>=<value> can set.")
    elif config is not None:
        print("\nConfig keys and their values, set by --config.<key>=<value>:")
        print("\n".join(f"  {key} = {value!r}" for key, value in flatten(config).items()))
    sys.exit(0)


def parse_flags(argv: list[str], spec: dict) -> types.SimpleNamespace:
    """Parse a command line; `spec` is {name: (kind, default, help)}.

    A kind is str, int, float, bool, `int_list`, `file_path` or `config_file`; the default REQUIRED
    makes the flag compulsory. The result has one attribute a flag; if 'config' is among them,
    `config` is the locked ConfigDict with the overrides applied (None without --config),
    `config_path` its file and `overrides` the dict {'train.batch_size': 64} of what the command
    line changed.

    Raises FlagError, a sentence that names the wrong flag, key or value and the nearest right one.
    """
    path, arguments = _split_config(argv[1:]) if "config" in spec else (None, argv[1:])
    path = file_path(path) if path is not None else None
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
            config_flags.DEFINE_config_dict(
                "config", config, flag_values=values, sys_argv=[argv[0], *arguments]
            )
        extra = values([argv[0], *arguments])[1:]
    except absl_flags.Error as error:
        raise _absl_error(error, kinds) from error
    if extra:
        raise FlagError(f"unexpected argument {extra[0]!r}; flags are written --name=value")
    parsed = {name: values[name].value for name in spec if name != "config"}
    if "config" in spec:
        overrides = config_flags.get_override_values(values["config"]) if path else {}
        check_elements(overrides, defaults)
        if config is not None:
            check_values(config)
            _expand_paths(config)
        parsed.update(config=config, config_path=path, overrides=overrides)
    for name, (_, default, text) in spec.items():
        if default is REQUIRED and parsed[name] is None:
            raise FlagError(f"--{name} is required: {text}")
    return types.SimpleNamespace(**parsed)


def _check_launcher() -> None:
    """UserError for a variable of the launchers that is no number, before anything reads it."""
    for name in "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE":
        value = os.environ.get(name, "0")
        try:
            int(value)
        except ValueError:
            raise UserError(
                f"the environment variable {name} is {value!r}, expected a whole number: unset it, "
                "or start with accelerate launch, which sets it"
            ) from None


def _rank() -> int:
    try:
        return int(os.environ.get("RANK", "0"))
    except ValueError:  # what `_check_launcher` complains of
        return 0


def _report(error: UserError) -> None:
    rank = _rank()
    if rank > 0:
        # Most errors are every rank's, and rank 0 says them: its exit makes the launcher end us
        # during this sleep. One that is ours alone (our share of the data) is said after it.
        time.sleep(4)
    where = f" (rank {rank})" if rank > 0 else ""
    if "tqdm" in sys.modules:  # a bar that is drawn would be the start of our line
        for bar in list(sys.modules["tqdm"].tqdm._instances):
            bar.close()
    print(f"error{where}: {one_line(str(error)[:MAX_MESSAGE])}", file=sys.stderr, flush=True)


# Files that cannot be written, wherever it happens.
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
# What to do about the other errors of a file, which may be of reading or of writing.
_FILE_ERRORS = {
    errno.EACCES: "check its permissions and those of its folder",
    errno.ENAMETOOLONG: "use shorter names",
    errno.ENOENT: "check the path, and whether something else removed it",
    errno.ENOTDIR: "check the path, which goes through a file as if it were a folder",
    errno.EISDIR: "give a file instead of a folder",
    errno.EMFILE: "allow this process more open files with ulimit -n, or use fewer workers",
    errno.EIO: "its disk or network file system fails: use another",
}


def _file_error(error):
    """A UserError for a file that cannot be read or written; None for any other exception."""
    if not isinstance(error, OSError):
        return None
    name = error.filename
    if error.errno in _DISK_ERRORS:
        where = f" {name}" if name else ""
        return UserError(f"cannot write{where}: {error.strerror}; make room or use another disk")
    if not name or error.errno not in _FILE_ERRORS:
        return None
    if error.errno == errno.EACCES and os.path.exists(name) and not os.access(name, os.R_OK):
        return UserError(f"cannot read {name}: {error.strerror}; check its permissions")
    return UserError(f"cannot use {name}: {error.strerror}; {_FILE_ERRORS[error.errno]}")


def _memory_error(error):
    """A UserError for memory that ran out, the GPU's or the host's; None for any other exception.

    torch raises OutOfMemoryError for the GPU, and for the host a RuntimeError of its allocator.
    """
    text = str(error)
    of_gpu = "torch" in sys.modules and isinstance(error, sys.modules["torch"].OutOfMemoryError)
    of_host = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in text
    )
    if not of_gpu and not of_host:
        return None
    said = ". ".join(text.split(". ")[:3]) if of_gpu else text.rpartition("] err == 0. ")[2]
    return UserError(
        f"memory of the {'GPU' if of_gpu else 'host'} ran out ({said or 'no room'}); take fewer "
        "images at once: raise --config.gradient_accumulation_steps or set "
        "--config.nnet.activation_checkpointing=True in training, lower "
        "--config.sample.mini_batch_size in evaluation and --batch_size of scripts; or end what "
        "else uses it"
    )


def run_main(main, spec: dict) -> None:
    """Call main(flags) with the parsed command line; a UserError becomes one line on stderr, and so
    does a file that cannot be read or written, memory that ran out, Ctrl-C, and the end of another
    process (libs.runtime.watch).

    Exit code 1 for a UserError, 2 for a FlagError, 130 for Ctrl-C; other exceptions keep their
    traceback.
    """
    try:
        _check_launcher()
        main(parse_flags(sys.argv, spec))
    except UserError as error:
        watch.fail(functools.partial(_report, error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        watch.fail(functools.partial(_report, UserError("interrupted")))
        sys.exit(INTERRUPTED)
    except Exception as error:
        said = _file_error(error) or _memory_error(error)
        if said is not None:
            watch.fail(functools.partial(_report, said))
        elif sentence := watch.ended_by_others(error):
            watch.say(sentence, _rank())
        else:
            watch.fail()
            raise
        sys.exit(UserError.exit_code)
