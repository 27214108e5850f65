"""Around every script: command lines, processes, logs, CUDA graphs.

run_main, parse_flags, TRAINING, EVALUATION     call a script's main with its flags, of these kinds:
REQUIRED, file_path, int_list                   must be given; a path; 3,7
load_config, check_values, config_beside        of a file; the config.json beside weights
read_class_names                                of the run that made weights
make_accelerator, Precision                     the process's part in the run; its number format
requested_engine, wait_without_timeout          what the processes agree on
environment, get_logger, MetricsLog             what a run says about itself
StopRequest                                     how a run stops
read_batches                                    a data set's batches out of worker processes
SamplingNetwork, GraphedTraining                a network replayed from CUDA graphs
"""

from libs.runtime.cuda_graphs import GraphedTraining, SamplingNetwork
from libs.runtime.flags import (
    EVALUATION,
    REQUIRED,
    TRAINING,
    check_values,
    config_beside,
    file_path,
    int_list,
    load_config,
    parse_flags,
    read_class_names,
    run_main,
)
from libs.runtime.launch import Precision, make_accelerator, requested_engine, wait_without_timeout
from libs.runtime.logs import MetricsLog, environment, get_logger
from libs.runtime.stop import StopRequest
from libs.runtime.workers import read_batches
