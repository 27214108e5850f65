"""DiM-T, class-conditional, on scikit-learn's 1,797 handwritten digits, 8x8: the whole road in
minutes on two CPU cores.

    make demo
    accelerate launch ./train.py --config=configs/digits_T_DiM.py

Expected, on two cores: 3 minutes; class agreement of at least 97% and a Frechet distance (features
of a small digits classifier) at most twice that of two halves of the real images.
"""

from configs import common


def get_config():
    config = common.get_config()

    config.dataset.name = "digits"
    config.dataset.cfg = True

    config.nnet = common.dim_nnet(input_size=8, in_channels=1, dim=64, depth=9, num_classes=10)

    config.optimizer.lr = 0.001
    config.lr_scheduler.warmup_steps = 100
    config.max_grad_norm = 1.0

    config.train.mode = "cond"
    config.train.n_steps = 3000
    config.train.batch_size = 64
    config.train.ema_rate = 0.995
    config.train.num_workers = 0
    config.train.eval_interval = 1000
    config.train.save_interval = 1000
    config.train.keep_last = 2
    config.train.fid_samples = 0

    config.sample.n_samples = 1000
    config.sample.mini_batch_size = 250
    config.sample.sample_steps = 25
    config.sample.cfg = True
    config.sample.scale = 0.4
    config.sample.labels = "balanced"
    config.sample.features = "digits_classifier"
    return config
