"""Pictures from a trained network, and their figures."""

from libs.evaluate.features import (
    FEATURES,
    Classifier,
    extract_features,
    load_real,
    make_features,
)
from libs.evaluate.generate import draw_rows, make_grid_images, make_image_sampler, measure
from libs.evaluate.metrics import METRICS, Moments, save_statistics
from libs.evaluate.run import run_evaluation

__all__ = [
    "Classifier",  # for its training
    "FEATURES",  # registry: name -> feature network
    "METRICS",  # registry: name -> f(generated, real) -> figures
    "Moments",  # count, sum and products of features
    "draw_rows",  # pictures of sample.py
    "extract_features",  # features of a data set's images, by batches
    "load_real",  # features of real images
    "make_features",  # a feature network by name
    "make_grid_images",  # pictures of a training, over all processes
    "make_image_sampler",  # images by index, of a config
    "measure",  # Frechet distance in training
    "run_evaluation",  # a whole evaluation
    "save_statistics",  # a statistics file
]
