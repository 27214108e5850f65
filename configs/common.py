"""Every key of a config, with its default; a config file states only its differences.

Sections and keys have the names of the official repository; `nnet` holds the keywords of the
network's constructor. A key without a value is a typed placeholder, so that
`--config.<key>=<value>` can set it.
"""

import ml_collections
from ml_collections import config_dict


def d(**kwargs):
    return ml_collections.ConfigDict(initial_dictionary=kwargs)


def dim_nnet(**differences):
    """The nnet section of a DiM; see libs.model.dim.DiM for the keywords and
    libs.model.dim.PRESETS for the
    published sizes.
    """
    nnet = d(
        name="dim",
        pretrained_path=config_dict.placeholder(str),  # weights to start from
        input_size=config_dict.placeholder(int),
        in_channels=config_dict.placeholder(int),
        patch_size=2,
        dim=config_dict.placeholder(int),
        depth=config_dict.placeholder(int),
        num_classes=config_dict.placeholder(int),
        mamba=d(d_state=16, d_conv=3, expand=2),
        pad_layout="lateral",
        scan_directions=3,
        mlp_time_embed=False,
        drop_path=0.0,
        activation_checkpointing=False,
        skip_tuning=config_dict.placeholder(tuple),
        freeu=config_dict.placeholder(tuple),
    )
    nnet.update(differences)
    return nnet


def uvit_nnet(**differences):
    """The nnet section of the U-ViT baseline; see libs.model.uvit.UViT for the keywords."""
    nnet = d(
        name="uvit",
        pretrained_path=config_dict.placeholder(str),
        input_size=config_dict.placeholder(int),
        in_channels=config_dict.placeholder(int),
        patch_size=2,
        dim=config_dict.placeholder(int),
        depth=config_dict.placeholder(int),
        heads=config_dict.placeholder(int),
        num_classes=0,
        mlp_ratio=4,
        qkv_bias=False,
        mlp_time_embed=False,
        final_conv=True,
        activation_checkpointing=False,
    )
    nnet.update(differences)
    return nnet


def get_config():
    """The base of every config."""
    config = ml_collections.ConfigDict()
    config.seed = 1234
    config.pred = "noise_pred"  # what the network predicts: noise_pred or x0_pred
    config.z_shape = config_dict.placeholder(tuple)  # (C, H, W) of a latent; pixels have none
    config.gradient_accumulation_steps = 1
    config.max_grad_norm = config_dict.placeholder(float)

    config.ug_m = config_dict.placeholder(int)  # upsampling guidance: factor; without it, off
    config.ug_theta = 1.0  # its strength
    config.ug_eta = 0.3  # it acts in process times from (1 - ug_eta) ug_T on
    config.ug_T = 1.0

    config.dataset = d(
        name=config_dict.placeholder(str),
        path=config_dict.placeholder(str),
        resolution=config_dict.placeholder(int),
        random_crop=False,  # of images larger than the resolution; otherwise the centre
        random_flip=False,
        cfg=False,  # drop labels in training, for classifier-free guidance
        p_uncond=0.1,  # how many
        fid_stats=config_dict.placeholder(str),  # file of scripts/compute_fid_stats.py
    )

    config.autoencoder = d(
        pretrained_path=config_dict.placeholder(
            str
        ),  # U-ViT's autoencoder_kl_ema.pth, another LDM file, or a diffusers folder
        scale_factor=0.18215,
    )

    config.optimizer = d(name="adamw", lr=0.0002, weight_decay=0.03, betas=(0.99, 0.999), eps=1e-8)
    config.lr_scheduler = d(
        name="customized",  # linear from 0, then constant; or cosine: times half a cosine
        warmup_steps=2500,
    )

    config.train = d(
        mode="uncond",  # or cond: with labels
        n_steps=500_000,
        batch_size=128,  # global, over all processes and accumulation steps
        mixed_precision=config_dict.placeholder(
            str
        ),  # no, fp16 or bf16; without it, what accelerate launch says
        fp8=False,  # DiM's large matrix products in fp8; needs bf16 or fp16, and Hopper or newer
        cuda_graphs=False,  # on a GPU, one process or DDP: replay the network's kernels; for small
        # networks, which Python launches slower than they run
        ema_rate=0.9999,
        num_workers=8,
        max_bad_steps=10,  # non-finite steps in a row that end the run
        log_interval=10,
        eval_interval=5000,  # a grid of samples
        grid_samples=100,  # images in it, ten a row; 0 for no grid
        save_interval=50_000,  # a checkpoint, and FID
        keep_last=config_dict.placeholder(int),  # how many checkpoints to keep; without it, all
        fid_samples=10_000,  # images for FID in training; 0 for none
        tensorboard=False,
        wandb=False,  # offline unless WANDB_MODE says otherwise
    )

    config.sample = d(
        algorithm="dpm_solver",  # see libs.diffusion.samplers
        sample_steps=50,
        n_samples=50_000,
        mini_batch_size=500,  # per process
        cfg=False,
        scale=0.0,  # cond + scale * (cond - uncond); elsewhere written 1 + scale
        guidance=config_dict.placeholder(str),  # a name in GUIDANCE; else classifier_free
        guidance_interval=config_dict.placeholder(tuple),  # (from, to) in process time, 0 to 1
        labels="random",  # or balanced
        vis_label=config_dict.placeholder(int),  # the one class of all images
        fp8=False,  # as train.fp8
        cuda_graphs=True,  # on a GPU: replay the network's kernels, for some memory
        path=config_dict.placeholder(str),  # folder that keeps the PNG files
        adm_npz=config_dict.placeholder(str),  # file of all images for ADM's evaluation suite
        features="inception",  # or digits_classifier, or none: pictures without figures
        fid_weights_path=config_dict.placeholder(
            str
        ),  # pytorch-fid's weights file; without it, its download
    )
    return config
