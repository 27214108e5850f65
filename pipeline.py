"""Networks of this repository with the interface of diffusers' DiTPipeline: docs/diffusers.md. A
folder of scripts/export_diffusers.py holds weights and JSON that names the classes below, no code.
"""

import torch
from diffusers import ConfigMixin, DiTPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.image_processor import VaeImageProcessor

from configs import common
from libs.data import Autoencoder, LatentCodec, PixelCodec
from libs.diffusion import image_generators
from libs.evaluate import ImageSampler
from libs.model import add_heads, build_model
from sde import make_process
from utils import make_tuples

KEYS = ("pred", "process", "sample", "ug_m", "ug_theta", "ug_eta", "ug_T")  # of a config
PATHS = ("path", "adm_npz", "fid_weights_path", "dinov2_path")  # of its section sample


class DiMTransformer(ModelMixin, ConfigMixin):
    """`network` of libs.model, by config.nnet and the sections of config.loss that it has heads of.
    Weights stay float32, whatever torch_dtype says: autocast is config.train.mixed_precision's.
    """

    _keep_in_fp32_modules = ["network"]

    @register_to_config
    def __init__(self, nnet, loss):
        super().__init__()
        self.network = build_model(make_tuples(nnet))
        add_heads(self.network, loss, training=False)


class DiMPipeline(DiTPipeline):
    """Pictures of classes; `vae` is None for a network of pixels. settings: process, sampler and
    guidance, by keys of a config; libs.diffusion integrates, so that `scheduler` is None.
    """

    _optional_components = ["vae", "scheduler"]
    model_cpu_offload_seq = None  # the network is called without the hooks of offloading

    def __init__(self, transformer, vae=None, scheduler=None, id2label=None, settings=None):
        super().__init__(transformer, vae, scheduler, id2label)
        self.register_to_config(id2label=id2label, settings=settings)

    @classmethod
    def from_parts(cls, config, model, codec, id2label=None):
        """The pipeline of a resolved config and its parts."""
        whole, vae = config.to_dict(), None
        whole["nnet"]["pretrained_path"] = None
        loss = {name: whole["loss"][name] for name in getattr(model, "heads", ())}
        transformer = DiMTransformer(whole["nnet"], loss)
        transformer.network.load_state_dict(model.state_dict())
        if not isinstance(codec, PixelCodec):
            vae, values = codec.autoencoder.network, codec.scaling._asdict()
            values["scaling_factor"] = values.pop("scale_factor")
            vae.register_to_config(force_upcast=codec.autoencoder.force_upcast, **values)
        whole["sample"].update(dict.fromkeys(PATHS))
        settings = {key: whole[key] for key in KEYS}
        settings["train"] = {key: whole["train"][key] for key in ("mode", "mixed_precision")}
        return cls(transformer, vae, id2label=id2label, settings=settings)

    def _make_image_sampler(self, steps, guidance_scale):
        config, network = common.get_config(), self.transformer.network.eval()
        config.update(make_tuples(self.config.settings))
        config.sample.sample_steps = steps or config.sample.sample_steps
        if guidance_scale is not None:
            config.sample.update(cfg=True, scale=guidance_scale - 1.0)
        vae, codec = self.vae and Autoencoder(self.vae), PixelCodec()
        if vae:
            codec = LatentCodec(vae, scaling=vae.scaling, downsample=vae.downsample)
        return ImageSampler(config, network, make_process(**config.process), codec, seed=0)

    @torch.no_grad()
    def __call__(
        self, class_labels=None, guidance_scale=None, generator=None, num_inference_steps=None,
        output_type="pil", return_dict=True, callback_on_step_end=None,
    ):  # fmt: skip
        """ImagePipelineOutput, or without return_dict a tuple, of an image for each class.

        class_labels: numbers; None without classes: as many images as generators, or one.
        guidance_scale: w of uncond + w (cond - uncond), 1 for none; num_inference_steps: of the
            sampler; both as exported by default.
        generator: a list of one for each image, on the CPU, or one that seeds them.
        output_type: pil, np or pt. callback_on_step_end(pipe, step, timestep, {"latents": the x_0
            that the step predicts}), whose result is not read.
        """
        labels = None if class_labels is None else torch.as_tensor(class_labels).reshape(-1)
        if not isinstance(generator, list):
            options = dict(generator=generator, device=generator.device if generator else None)
            seed = torch.randint(2**63 - 1, (), **options).item()
            generator = image_generators(seed, 1 if labels is None else len(labels))
        with self._make_image_sampler(num_inference_steps, guidance_scale) as image_sampler:

            def on_call(i, n, t, x_0):
                timestep = image_sampler.process.model_time(t).item()
                callback_on_step_end(self, i - 1, timestep, {"latents": x_0})

            given = on_call if callback_on_step_end else None, generator
            images = image_sampler(range(len(generator)), labels, *given)
        images = VaeImageProcessor(do_normalize=False).postprocess(images, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
