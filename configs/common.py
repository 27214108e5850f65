"""Every key of a config, with its default, meaning and range; a config file states differences.

Sections and keys have the names of the official repository; `nnet` holds the keywords of the
network's constructor. A key without a value is a typed placeholder, so that
`--config.<key>=<value>` can set it.

A section refuses keys that it lacks. `process`, `loss` and `nnet.mixer` take more keys, in a file
or as flags: the keywords or names of what they choose. Another section is extended by giving it as
a whole: `config.optimizer = common.d(name="sgd", lr=0.1, momentum=0.9)`.
"""

import math

from ml_collections.config_dict import create as d
from ml_collections.config_dict import placeholder


def _lock(config, *open_sections):
    """`config`, where a key that it lacks is an error, but in these sections."""
    config.lock()
    for section in open_sections:
        config[section].unlock()
    return config


# What a run would stumble over only later: key -> (lowest, highest), of each entry of a tuple.
_FROM_1, _FROM_0, _SHARE = (1, math.inf), (0, math.inf), (0, 1)
RANGES = {
    "gradient_accumulation_steps": _FROM_1, "ug_m": (2, math.inf), "dataset.p_uncond": _SHARE,
    "nnet.scan_directions": (1, 3), "optimizer.lr": _FROM_0, "train.n_steps": _FROM_1,
    "train.batch_size": _FROM_1, "train.ema_rate": _SHARE, "train.ema_rates": _SHARE,
    "train.ema_lengths": (0.001, 0.28), "train.num_workers": _FROM_0,
    "train.max_bad_steps": _FROM_1, "train.routed_share": _SHARE, "train.log_interval": _FROM_1,
    "train.eval_interval": _FROM_1, "train.save_interval": _FROM_1, "train.keep_last": _FROM_1,
    "train.grid_samples": _FROM_0, "train.fid_samples": _FROM_0, "sample.sample_steps": _FROM_1,
    "sample.n_samples": (2, math.inf), "sample.repeats": _FROM_1, "sample.mini_batch_size": _FROM_1,
    "sample.guidance_interval": _SHARE, "sample.internal_scale": _FROM_0,
    "sample.internal_interval": _SHARE, "sample.reuse": _FROM_1, "sample.reuse_from": _FROM_1,
}  # fmt: skip
CHOICES = {
    "train.mode": ("uncond", "cond"), "train.mixed_precision": ("no", "fp16", "bf16"),
    "sample.labels": ("random", "balanced"), "nnet.pad_layout": ("lateral", "rho_pad"),
}  # fmt: skip


def dim_nnet(**differences):
    """The nnet section of a DiM; libs.model.PRESETS has sizes."""
    nnet = d(
        name="dim",
        pretrained_path=placeholder(str),  # weights to start from
        input_size=placeholder(int),  # side of the input: of the latent, or in pixels
        in_channels=placeholder(int),
        patch_size=2,
        dim=placeholder(int),
        depth=placeholder(int),  # odd: half the blocks, a middle one, the other half
        num_classes=placeholder(int),
        mixer=d(name="mamba"),  # or attention, with heads=dim // 64 and qkv_bias=False
        # Of mamba: states a channel, width of the convolution, channels of the scan over dim.
        mamba=d(d_state=16, d_conv=3, expand=2),
        num_pad_tokens=placeholder(int),  # pads at a row's or column's end; without it, d_conv
        pad_layout="lateral",  # or rho_pad
        scan_directions=3,  # 1 to 3, walked in turn by the blocks
        mlp_time_embed=False,
        drop_path=0.0,  # stochastic depth of the last block, 0 to 1; linear from the first
        activation_checkpointing=False,  # recompute blocks in the backward pass: less memory
        skip_tuning=placeholder(tuple),  # (low, high): factors of the long skips
        freeu=placeholder(tuple),  # four factors
        routing=d(first=placeholder(int)),  # blocks first to depth - first train on a token in four
    )
    _lock(nnet, "mixer").update(differences)
    return nnet


def uvit_nnet(**differences):
    """The nnet section of the U-ViT baseline; libs.model.UViT says more about the keywords."""
    sizes = ("input_size", "in_channels", "dim", "depth", "heads")
    nnet = d(
        name="uvit", pretrained_path=placeholder(str), patch_size=2, num_classes=0, mlp_ratio=4,
        qkv_bias=False, mlp_time_embed=False, final_conv=True, activation_checkpointing=False,
        **{name: placeholder(int) for name in sizes},
    )  # fmt: skip
    _lock(nnet).update(differences)
    return nnet


NNETS = {"dim": dim_nnet, "uvit": uvit_nnet}  # by nnet.name


def _make_train():
    return d(
        mode="uncond",  # or cond: with labels
        n_steps=500_000,
        batch_size=128,  # global, over all processes and accumulation steps
        mixed_precision=placeholder(str),  # no, fp16, bf16; without it, accelerate launch's
        fp8=False,  # DiM's large matrix products in fp8; needs bf16 or fp16, and Hopper or newer
        routed_share=0.9,  # of n_steps, from the first: steps that route; then all tokens
        cuda_graphs=False,  # on a GPU, one process or DDP: for small networks, bound by Python
        ema_rate=0.9999,
        ema_rates=placeholder(tuple),  # of further averages
        ema_lengths=placeholder(tuple),  # sigma_rel of power-function averages, 0.001 to 0.28
        num_workers=8,  # processes that read data, of each training process; 0 for none
        max_bad_steps=10,  # non-finite steps in a row that end the run
        log_interval=10,
        eval_interval=5000,  # steps between grids of samples
        grid_samples=100,  # images of a grid, ten a row; 0 for no grid
        save_interval=50_000,  # steps between checkpoints, each with its FID
        keep_last=placeholder(int),  # checkpoints that stay; without it, all
        fid_samples=10_000,  # images for FID in training; 0 for none
        metrics="training",  # as sample.metrics
        tensorboard=False,
        wandb=False,  # offline unless WANDB_MODE says otherwise
    )


def _make_sample():
    return d(
        algorithm="dpm_solver",  # see libs.diffusion.samplers
        sample_steps=50,
        n_samples=50_000,  # images of an evaluation, 2 or more
        mini_batch_size=500,  # images at once, per process
        cfg=False,  # classifier-free guidance
        scale=0.0,  # cond + scale * (cond - uncond); elsewhere written 1 + scale
        guidance=placeholder(str),  # of libs.diffusion.GUIDANCE; else classifier_free
        guidance_interval=placeholder(tuple),  # (from, to) in process time, 0 to 1
        internal_scale=0.0,  # out + scale * (out - inner) with the head of config.loss.internal
        internal_interval=placeholder(tuple),  # as guidance_interval
        reuse=placeholder(int),  # inner blocks run in every n-th network call; without it, in all
        reuse_from=placeholder(int),  # the first inner block; without it, depth // 3
        labels="random",  # or balanced
        vis_label=placeholder(int),  # the one class of all images
        fp8=False,  # as train.fp8
        cuda_graphs=True,  # on a GPU: replay the network's kernels, for some memory
        path=placeholder(str),  # folder that keeps the PNG files
        adm_npz=placeholder(str),  # file of all images for ADM's evaluation suite
        features="inception",  # of libs.evaluate.FEATURES, or none: pictures without figures
        fid_weights_path=placeholder(str),  # the feature network's file, else its usual one
        dinov2_path=placeholder(str),  # DINOv2's, for the metrics fd_dinov2 and mmd_dinov2
        metrics="standard",  # METRICS and GROUPS of libs.evaluate.metrics, with commas between
        repeats=1,  # evaluations by as many seeds: mean and spread
    )


def get_config():
    """The base of every config."""
    config = d()
    config.seed = 1234
    config.pred = "noise_pred"  # what the network predicts, of process.predictions
    config.z_shape = placeholder(tuple)  # (C, H, W) of a latent; pixels have none
    config.gradient_accumulation_steps = 1
    config.max_grad_norm = placeholder(float)  # without it, gradients are not clipped

    config.ug_m = placeholder(int)  # upsampling guidance: factor, 2 or more; without it, off
    config.ug_theta = 1.0  # its strength
    config.ug_eta = 0.3  # it acts in process times from (1 - ug_eta) ug_T on
    config.ug_T = 1.0

    config.dataset = d(
        name=placeholder(str),  # of datasets.DATASETS
        path=placeholder(str),
        resolution=placeholder(int),  # side of the images in pixels
        random_flip=False,
        cfg=False,  # drop labels in training, for classifier-free guidance
        p_uncond=0.1,  # share of the labels that are dropped
        fid_stats=placeholder(str),  # file of scripts/compute_fid_stats.py
    )

    config.autoencoder = d(
        # U-ViT's autoencoder_kl_ema.pth, another LDM file, or a diffusers folder
        pretrained_path=placeholder(str),
        # Of the latents that the network sees; without them, the autoencoder's own, which are
        # 0.18215 alone for a single file.
        scale_factor=placeholder(float),
        shift_factor=placeholder(float),
        latents_mean=placeholder(tuple),  # a value a channel, as latents_std
        latents_std=placeholder(tuple),
        tiling=False,  # pictures beyond 512 px in tiles that overlap: less memory, slightly other
    )

    # Of sde.PROCESSES; without it discrete where there is a z_shape, else vpsde. Further keys:
    # vpsde: beta_min=0.1, beta_max=20.0
    # flow, flow_from_discrete: times="uniform" or "logit_normal", mean=0.0 and std=1.0 of its
    #   logit, shift=1.0; a higher shift means more noise in training and sampling
    config.process = d(name=placeholder(str))
    config.nnet = d()  # dim_nnet() or uvit_nnet()
    # Terms of libs.train.losses by name: a weight, or a section with weight, else 1, and keywords:
    # mse, direction: none
    # internal: block=8, after which the head stands
    # repa: block=8, features="classifier" or "dinov2", path="<its file>", kind="repa" or "irepa"
    config.loss = d(mse=1.0)
    # adamw, or muon: the matrices of the blocks by Muon; betas and eps are AdamW's
    config.optimizer = d(name="adamw", lr=0.0002, weight_decay=0.03, betas=(0.99, 0.999), eps=1e-8)
    # Linear from 0, then constant; or cosine; or warmup_stable_decay, to 0 over the last fifth.
    config.lr_scheduler = d(name="warmup_constant", warmup_steps=2500)
    config.train = _make_train()
    config.sample = _make_sample()
    return _lock(config, "process", "loss")


def use_flow(config, *, block):
    """`config` with flow matching, a head after `block` and AdamW as in arXiv 2501.01423."""
    config.pred, config.max_grad_norm = "velocity_pred", 1.0
    config.process.update(name="flow", times="logit_normal")
    config.loss.internal = d(weight=0.5, block=block)
    config.optimizer.update(betas=(0.9, 0.95), weight_decay=0.0, eps=1e-8)
    config.sample.algorithm = "adams_bashforth"
    return config
