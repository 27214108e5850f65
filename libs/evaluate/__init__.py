"""Pictures from a trained network, and their figures."""

from libs.evaluate.features import (
    DIGITS_CLASSIFIER_PATH,
    FEATURES,
    DigitsClassifier,
    choose_real,
    load_real,
    make_features,
)
from libs.evaluate.generate import (
    describe_result,
    draw_in_batches,
    make_grid_images,
    make_grid_labels,
    make_image_sampler,
    measure,
)
from libs.evaluate.metrics import METRICS, Moments, save_statistics
from libs.evaluate.run import run_evaluation

__all__ = [
    "DIGITS_CLASSIFIER_PATH",  # file of the trained DigitsClassifier
    "DigitsClassifier",
    "FEATURES",  # registry: name -> feature network
    "METRICS",  # registry: name -> f(generated, real) -> figures
    "Moments",  # count, sum and products of features
    "choose_real",  # statistics file or data set to compare with
    "describe_result",  # a result as a line for people
    "draw_in_batches",  # pictures of sample.py
    "load_real",  # features of real images
    "make_features",  # a feature network by name
    "make_grid_images",  # pictures of a training, over all processes
    "make_grid_labels",  # labels of sample.py's pictures
    "make_image_sampler",  # images by index, of a config
    "measure",  # Frechet distance in training
    "run_evaluation",  # a whole evaluation
    "save_statistics",  # a statistics file
]
