"""Pictures from a trained network, and their figures."""

from libs.evaluate.generate import (
    ImageSampler,
    describe,
    draw_in_batches,
    make_grid_images,
    make_grid_labels,
    make_image_sampler,
    measure,
    result_of,
)
from libs.evaluate.metrics import (
    DIGITS_CLASSIFIER_PATH,
    FEATURES,
    DigitsClassifier,
    Moments,
    NoFeatures,
    make_features,
    require_known,
    save_statistics,
)
from libs.evaluate.real_images import (
    can_be_measured,
    images_to_measure,
    real_images,
    require_statistics,
)
from libs.evaluate.run import run_evaluation

__all__ = [
    "DIGITS_CLASSIFIER_PATH",
    "DigitsClassifier",
    "FEATURES",
    "ImageSampler",
    "Moments",
    "NoFeatures",
    "can_be_measured",
    "describe",
    "draw_in_batches",
    "images_to_measure",
    "make_features",
    "make_grid_images",
    "make_grid_labels",
    "make_image_sampler",
    "measure",
    "real_images",
    "require_known",
    "require_statistics",
    "result_of",
    "run_evaluation",
    "save_statistics",
]
