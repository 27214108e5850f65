"""DiM-T, class-conditional, on scikit-learn's 1,797 handwritten digits, 8x8, by flow matching: the
whole road in little more than a minute on two CPU cores.

    make demo
    python train.py --config=configs/digits_T_flow.py
"""

from configs import common, digits_T_DiM


def get_config():
    config = digits_T_DiM.get_config()
    config.pred = "velocity_pred"
    config.process.update(name="flow", times="logit_normal")
    config.loss.internal = common.d(weight=0.5, block=1)

    config.optimizer.betas = (0.9, 0.95)

    config.train.n_steps = 850
    config.train.eval_interval = 850
    config.train.grid_samples = 0
    config.train.save_interval = 850

    config.sample.algorithm = "adams_bashforth"
    config.sample.sample_steps = 20
    return config
