"""Pictures from a trained network, and their figures.

run_evaluation, measure             a whole evaluation; Frechet distance in training
make_image_sampler                  images by index, of a config
draw_rows, make_grid_images         pictures of sample.py; of a training, over all processes
FEATURES, make_features             name -> feature network; one by its name
extract_features, load_real         features of a data set's images, by batches; of real images
METRICS, Moments, save_statistics   name -> f(generated, real) -> figures; sums; a statistics file
Classifier                          for its training
"""

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
