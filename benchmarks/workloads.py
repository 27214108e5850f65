"""What bench_model.py and profile_step.py run: networks by name and resolution, one training step,
one forward pass, solver steps, and the matrix products in them.

Nothing here measures. Everything takes the device, so that the tests run tiny networks on the CPU.
"""

import torch
from torch import nn

from configs import (
    cifar10_S_DiM,
    imagenet256_H_DiM,
    imagenet256_L_DiM,
    imagenet256_uvit_huge,
    imagenet512_H_DiM_ft,
)
from libs.diffusion import guidance
from libs.diffusion.samplers import sample
from libs.model.build import build_model
from libs.model.dim import EXTRA_TOKENS, PRESETS, DiM
from libs.model.uvit import UViT
from libs.runtime.cuda_graphs import CudaCapture, GraphedTraining
from libs.runtime.launch import Precision
from libs.train.loop import make_optimizer
from sde import VPSDE, DiscreteSchedule, denoising_loss, eps_from_model
from utils import UserError

PIXEL_SPACE = 32  # up to this resolution the network sees pixels (CIFAR-10), above it latents
MAX_NORM = 1.0
GUIDANCE_SCALE = 0.4


class Unavailable(Exception):
    """A case that cannot run here; says why."""


# ---------------------------------------- networks


class DiT(nn.Module):
    """diffusers' DiT-XL/2 (Peebles and Xie, arXiv 2212.09748) with DiM's interface: of its 8 output
    channels the 4 of the noise.
    """

    SIZE = dict(num_layers=28, num_attention_heads=16, attention_head_dim=72)

    def __init__(self, side, num_classes=1000, **size):
        from diffusers import DiTTransformer2DModel

        super().__init__()
        self.num_classes, self.side = num_classes, side
        self.network = DiTTransformer2DModel(
            sample_size=side, patch_size=2, in_channels=4, out_channels=8,
            num_embeds_ada_norm=num_classes, **(size or self.SIZE),
        )  # fmt: skip

    def forward(self, x, t, y):
        return self.network(x, t, y, return_dict=False)[0][:, :4]


def dim_section(size, pixels):
    """The nnet section of DiM-S, -L or -H: the shipped configs', at this resolution."""
    if pixels <= PIXEL_SPACE:
        nnet = cifar10_S_DiM.get_config().nnet
        nnet.update(PRESETS[size])
        return nnet
    if pixels < 512:
        nnet = imagenet256_H_DiM.get_config().nnet
    else:
        nnet = imagenet512_H_DiM_ft.get_config().nnet  # pad_layout 'rho_pad'
    nnet.update(PRESETS[size])
    nnet.input_size = pixels // 8
    return nnet


def uvit_section(pixels):
    """The nnet section of U-ViT-H, without its activation checkpointing, which costs time."""
    nnet = imagenet256_uvit_huge.get_config().nnet
    nnet.input_size, nnet.activation_checkpointing = pixels // 8, False
    return nnet


NETWORKS = {
    "DiM-S": lambda pixels: build_model(dim_section("S", pixels)),
    "DiM-L": lambda pixels: build_model(dim_section("L", pixels)),
    "DiM-H": lambda pixels: build_model(dim_section("H", pixels)),
    "U-ViT-H": lambda pixels: build_model(uvit_section(pixels)),
    "DiT-XL/2": lambda pixels: DiT(pixels // 8),
}


def input_shape(pixels):
    """(C, H, W) of what the network sees."""
    return (3, pixels, pixels) if pixels <= PIXEL_SPACE else (4, pixels // 8, pixels // 8)


def process_for(pixels):
    return VPSDE() if pixels <= PIXEL_SPACE else DiscreteSchedule()


def make_network(model, pixels, device, precision):
    """The network of this name on the device, its random weights drawn there.

    Raises:
        Unavailable: it has no products in this precision.
    """
    with torch.device(device):
        network = NETWORKS[model](pixels)
    if precision == "fp8":
        use_fp8(network, model, device)
    return network


def use_fp8(network, model, device):
    """fp8 products in the blocks of a DiM; the rest stays as under bf16."""
    if not hasattr(network, "use_fp8"):
        raise Unavailable(f"{model} has no fp8 products")
    try:
        network.use_fp8(device)
    except UserError as error:
        raise Unavailable(str(error)) from error


def autocast_of(precision, device):
    """Precision of the steps: fp8 is bf16 around fp8 products."""
    return Precision("bf16" if precision == "fp8" else precision, torch.device(device))


@torch.no_grad()
def round_matrices(network, dtype):
    """Weights of matrix products and convolutions in `dtype`, as sampling keeps them: autocast then
    has nothing to cast. Embeddings, biases, norms and A_log stay in float32."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.data = module.weight.data.to(dtype)


# ---------------------------------------- work


def random_inputs(network, pixels, batch, device):
    """x (B, C, H, W) standard normal, t (B,) network times, y (B,) labels."""
    x = torch.randn(batch, *input_shape(pixels), device=device)
    t = torch.rand(batch, device=device) * 999
    return x, t, torch.randint(network.num_classes, (batch,), device=device)


def training_step(network, pixels, batch, device, precision, compiled=False, graph=False):
    """A function that makes one optimizer step on random data that lies on the device: forward,
    loss, backward, clipping, fused AdamW over float32 weights; no EMA, no checkpointing. graph: the
    network's part as with train.cuda_graphs."""
    precision, process = autocast_of(precision, device), process_for(pixels)
    optimizer = make_optimizer(imagenet256_L_DiM.get_config(), network.train())
    x, _, y = random_inputs(network, pixels, batch, device)
    call = torch.compile(network) if compiled else network
    if graph:
        call = GraphedTraining(network, CudaCapture(x.device).both_ways)

    def step():
        optimizer.zero_grad(set_to_none=True)
        t = process.time_from_uniform(torch.rand(batch, device=device))
        with precision.autocast():
            losses = denoising_loss(
                call, process, x, y, pred="noise_pred", t=t, eps=torch.randn_like(x)
            )
        loss = losses.mean()
        precision.scaler.scale(loss).backward()
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), MAX_NORM)
        precision.scaler.step(optimizer)
        precision.scaler.update()
        return loss

    return step


def prepare_for_sampling(network, device, precision, compiled=False):
    """f(x, t, y) in eval mode under autocast, matrix weights rounded as sampling keeps them."""
    precision = autocast_of(precision, device)
    if precision.dtype:
        round_matrices(network, precision.dtype)
    call = network.eval().requires_grad_(False)
    call = torch.compile(call) if compiled else call

    @torch.no_grad()
    def evaluate(x, t, y):
        with precision.autocast():
            return call(x, t, y)

    return evaluate


def replayed(evaluate, x, t, y):
    """`evaluate` for inputs of these shapes, captured into a CUDA graph: one launch, not thousands.

    What it returns is overwritten by the next call.
    """
    inputs = [tensor.clone() for tensor in (x, t, y)]
    for _ in range(3):  # compiles kernels, makes plans and handles
        evaluate(*inputs)
    replay_graph, output = CudaCapture(x.device)(lambda: evaluate(*inputs))

    def replay(x, t, y):
        for static, new in zip(inputs, (x, t, y), strict=True):
            static.copy_(new)
        replay_graph()
        return output

    return replay


def solver_steps(evaluate, network, pixels, batch, device, steps):
    """A function that makes `steps` steps of DPM-Solver++(2M) on `batch` images, conditional and
    unconditional halves in one batch of 2 `batch`."""
    process = process_for(pixels)
    z, _, y = random_inputs(network, pixels, batch, device)
    predict = eps_from_model(evaluate, process, "noise_pred")
    eps_fn = guidance.classifier_free(predict, y, GUIDANCE_SCALE, network.num_classes)
    return lambda: sample(eps_fn, process, z, algorithm="dpm_solver_pp_2m", steps=steps)


# ---------------------------------------- matrix products


def _dim_products(network, h, w):
    """Multiply-adds an image of a DiM, h x w patches; without scan and depthwise convolutions."""
    d, mixer = network.dim, network.blocks[0].mixer
    channels, states, rank = mixer.channels, mixer.d_state, mixer.dt_rank
    tokens = EXTRA_TOKENS + network.pad + (h + network.pad) * (w + network.pad)
    block = 2 * d * channels + channels * (rank + 2 * states) + rank * channels + channels * d
    patch = 2 * network.patch_size**2 * network.in_channels * d
    conditioning = (network.modulation.FREQUENCIES + d + 3 * d + 2 * d) * d
    skips = network.num_skips * 2 * d * d
    return tokens * (network.depth * block + skips) + h * w * patch + conditioning


def _transformer_products(d, tokens, depth, mlp_ratio):
    """Multiply-adds an image of `depth` transformer blocks: qkv, output, MLP; Q K^T and A V."""
    return depth * tokens * ((4 + 2 * mlp_ratio) * d * d + 2 * tokens * d)


def _uvit_products(network, h, w):
    d, block = network.dim, network.mid_block
    tokens = network.extra_tokens + h * w
    mlp_ratio = block.mlp[0].out_features / d
    blocks = len(network.in_blocks) + 1 + len(network.out_blocks)
    skips = tokens * len(network.out_blocks) * 2 * d * d
    patch = network.patch_size**2 * network.in_channels * d
    ends = (h * w + tokens) * patch
    return _transformer_products(d, tokens, blocks, mlp_ratio) + skips + ends


def _dit_products(network, h, w):
    network = network.network
    d, depth, patch = network.inner_dim, len(network.transformer_blocks), network.patch_size**2
    tokens = h * w
    # diffusers embeds time and label in each block, and once more for the head
    conditioning = (depth + 1) * (256 * d + d * d) + depth * 6 * d * d + 2 * d * d
    ends = tokens * patch * d * (network.config.in_channels + network.out_channels)
    return _transformer_products(d, tokens, depth, 4) + conditioning + ends


def product_flops(network, pixels):
    """FLOPs, 2 a multiply-add, of all matrix products (patch embedding, attention included) in a
    forward pass of one image; a training step has three times as many, since each product's
    backward is two of its size."""
    side = input_shape(pixels)[1]
    count = {DiM: _dim_products, UViT: _uvit_products, DiT: _dit_products}[type(network)]
    patch_size = 2 if isinstance(network, DiT) else network.patch_size
    return int(2 * count(network, side // patch_size, side // patch_size))
