"""Around every script: flags, processes, logs, CUDA graphs."""

from libs.runtime.cuda_graphs import GraphedTraining, SamplingNetwork
from libs.runtime.flags import (
    EVALUATION,
    REQUIRED,
    TRAINING,
    check_values,
    config_file,
    file_path,
    int_list,
    run_main,
)
from libs.runtime.launch import (
    Precision,
    make_accelerator,
    ranks,
    requested_engine,
    wait_without_timeout,
)
from libs.runtime.logs import (
    MetricsLog,
    StopRequest,
    detach_worker,
    environment,
    get_logger,
    has_logged,
    starting_workers,
)
from libs.runtime.watch import WAITING, beat

__all__ = [
    "EVALUATION",
    "GraphedTraining",
    "MetricsLog",
    "Precision",
    "REQUIRED",
    "SamplingNetwork",
    "StopRequest",
    "TRAINING",
    "WAITING",
    "beat",
    "check_values",
    "config_file",
    "detach_worker",
    "environment",
    "file_path",
    "get_logger",
    "has_logged",
    "int_list",
    "make_accelerator",
    "ranks",
    "requested_engine",
    "run_main",
    "starting_workers",
    "wait_without_timeout",
]
