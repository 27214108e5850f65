"""The FID Inception: pool3, logits and spatial features by one forward pass."""

from pathlib import Path
from unittest import mock

import torch

from libs.files import hash_file, read_torch
from utils import UserError

# As in the published file's name, pt_inception-2015-12-05-6726825d.pth.
INCEPTION_SHA256_PREFIX = "6726825d"


def _find_inception_weights():
    """The file in torch hub's cache (under TORCH_HOME), downloaded from pytorch-fid if absent."""
    from pytorch_fid.inception import FID_WEIGHTS_URL

    path = Path(torch.hub.get_dir(), "checkpoints", FID_WEIGHTS_URL.rsplit("/", 1)[-1])
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(FID_WEIGHTS_URL, str(path), INCEPTION_SHA256_PREFIX)
        return path
    except Exception as error:  # of the network, the disk or the hash
        raise UserError(
            f"the FID network's weights could not be downloaded ({error}): put {path.name} into "
            f"{path.parent}, or give sample.fid_weights_path (--weights of compute_fid_stats.py)"
        ) from error


class InceptionFeatures:
    """Features of the FID Inception, as pytorch-fid computes them (on a GPU by TF32 convolutions);
    UserError for weights other than the published ones. path None: torch hub's cache or a download.
    """

    kind, dim, options = "inception_v3_fid", 2048, {}
    kinds = {"logits": 1008, "spatial": 17 * 17 * 7}  # beside pool3

    def __init__(self, path=None, device="cpu"):
        from pytorch_fid import inception

        path = path or _find_inception_weights()
        self.sha256, self.device = hash_file(path), torch.device(device)
        digest = self.sha256[:8]
        if digest != INCEPTION_SHA256_PREFIX:
            expected = f"with {digest}, expected {INCEPTION_SHA256_PREFIX}"
            raise UserError(f"{path} has not pytorch-fid's weights: its sha256 starts {expected}")
        self.name, weights = f"{self.kind}-{digest}", read_torch(path)
        # pytorch-fid downloads in its constructor: it is handed the checked weights instead.
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: weights):
            self.network = inception.InceptionV3(**self.options).eval().to(device)
        if self.device.type == "cuda":  # the layout of the tensor cores
            self.network.to(memory_format=torch.channels_last)
        self.class_weights = weights["fc.weight"].to(device)
        # TensorFlow's mixed_6 is torchvision's Mixed_6d, and mixed_6/conv its first branch.
        self.network.blocks[2][6].branch1x1.register_forward_hook(self._store_spatial)

    def _store_spatial(self, module, inputs, output):
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def _prepare(self, images):
        return images

    @torch.inference_mode()
    def extract(self, images):
        """images float32 (B, 3, H, W) in [0, 1] -> float32: pool3 as `features` (B, 2048); `logits`
        (B, 1008) without bias, for the Inception score; `spatial` (B, 2023), as ADM's evaluator.
        """
        pool3 = self.network(self._prepare(images.to(self.device, torch.float32)))[0].flatten(1)
        logits = pool3 @ self.class_weights.T
        return {"features": pool3, "logits": logits, "spatial": self._spatial}

    def __call__(self, images):
        """images float32 (B, 3, H, W) in [0, 1], any size -> pool3, float32 (B, 2048)."""
        return self.extract(images)["features"]


class TensorFlowInceptionFeatures(InceptionFeatures):
    """The same weights behind the resizing and scaling of the published TensorFlow graph, as in
    ADM's evaluator and torch-fidelity, by which the statistics of ADM and JiT are made.
    """

    kind = "inception_v3_fid_tf"
    options = dict(resize_input=False, normalize_input=False)

    def _interpolate(self, side):
        """float32 (299, side): row i is at i side / 299 of the old pixels, not at their centres."""
        place = torch.arange(299, dtype=torch.float64, device=self.device) * side / 299
        distance = place.clamp(max=side - 1)[:, None] - torch.arange(side, device=self.device)
        return (1 - distance.abs()).clamp(min=0).float()

    def _prepare(self, images):
        rows, columns = map(self._interpolate, images.shape[2:])
        return (rows @ (255 * images).round() @ columns.T - 128) / 128
