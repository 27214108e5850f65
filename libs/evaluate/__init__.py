"""Pictures from a trained network, and their figures.

run_evaluation                      a whole evaluation
compare                             results side by side, and what differs in their settings
write_report, report_run            report.html of a run; whose failure is a line of the log
ImageSampler                        images by index, of a config
choose_classes                      those that are drawn where none is asked for
make_grid_images, collect_features  a training's pictures, over all processes; their features
FEATURES, make_features             name -> feature network; one by its name
Extractors                          the feature networks that metrics need, in one
extract_features, load_real         features of a data set's images, by batches; of real images
metric, choose_metrics              decorator of f(generated, real) -> figure; names in a text
compute_metrics, make_feature_set   figures of features; an array of features, for metrics
Statistics                          sums of features, for a statistics file
Classifier                          for its training
"""

from libs.evaluate.features import FEATURES, Classifier, Extractors, extract_features, make_features
from libs.evaluate.generate import ImageSampler, choose_classes, collect_features, make_grid_images
from libs.evaluate.metrics import choose_metrics, compute_metrics, make_feature_set, metric
from libs.evaluate.real import Statistics, load_real
from libs.evaluate.report import compare
from libs.evaluate.run import run_evaluation
from libs.evaluate.run_report import report_run, write_report
