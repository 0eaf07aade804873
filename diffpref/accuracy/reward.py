"""The implicit reward of an aligned diffusion model: how much better than its reference it denoises an image.

Up to the strength beta and a term of the prompt alone, the reward that preference training maximises is
``log p_policy(image | caption) - log p_reference(image | caption)`` (Diffusion-DPO, arXiv 2311.12908, eq. 6
to 14), of which the difference of denoising errors, reference minus policy, is the estimate that training
uses.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffpref.accuracy.pairs import LabelledPairs
from diffpref.config import ModelConfig
from diffpref.data.images import ImageError, PixelSample, as_tensor, decode_image, to_pixels
from diffpref.errors import UserError
from diffpref.families import Family, load_family
from diffpref.families.loading import weights_hash
from diffpref.objectives.base import PairErrors
from diffpref.pipelines import DTYPES, base_and_lora, load_pipeline
from diffpref.training.batches import VALIDATION, Batch, draw_noise
from diffpref.training.pair_errors import pair_errors


@dataclass(frozen=True)
class RewardOptions:
    """draws: timesteps and noises per pair, both images sharing them; their rewards are averaged. low,
    high: timesteps, both included; high -1 is the last. resolution: side of the square images; 0: the
    model's own."""

    draws: int = 8
    seed: int = 0
    low: int = 0
    high: int = -1
    resolution: int = 0
    device: str = "cpu"
    dtype: str = "fp32"


class ImplicitReward:
    """Policy and reference side by side. Draw k of a pair is that of training's validation with that seed."""

    def __init__(self, model: ModelConfig, reference: ModelConfig, options: RewardOptions) -> None:
        """Raises UserError: no such model, two that differ in more than the denoiser, unfit options."""
        self.options = options
        base, lora = base_and_lora(reference)
        self.family: Family = load_family(base)
        self._reference = load_pipeline(reference).pipeline.unet if lora else self.family.unet
        self._policy, policy_prints = _policy(model, base, self.family)
        self.fingerprint: dict[str, Any] = {
            **{f"reference_{name}": value for name, value in self.family.fingerprint().items()},
            **{f"policy_{name}": value for name, value in policy_prints.items()},
            "reference_lora": weights_hash([self._reference]) if lora else "",
            **asdict(options),
        }
        steps = self.family.schedule.num_timesteps
        self.high = options.high if options.high >= 0 else steps - 1
        if not 0 <= options.low <= self.high < steps:
            raise UserError(
                f"timesteps {options.low} to {self.high} are not the model's", why=f"it has 0 to {steps - 1}"
            )
        settings: Any = self.family.unet.config
        own = int(settings.sample_size) * self.family.codec.factor
        self.resolution = options.resolution or own
        if self.resolution % self.family.side_multiple:
            raise UserError(
                f"--resolution {self.resolution} does not fit the model",
                fix=f"use a multiple of {self.family.side_multiple}",
            )
        self._device = torch.device(options.device)
        self.family.to(self._device)
        for unet in (self._policy, self._reference):
            unet.requires_grad_(False).eval().to(self._device)

    @torch.no_grad()
    def rewards(self, pairs: LabelledPairs, chosen: list[int]) -> list[tuple[float, float] | str]:
        """Rewards of image 0 and image 1 of each chosen pair, or what is wrong with one of its images."""
        found: dict[int, tuple[float, float] | str] = {}
        samples: dict[int, list[PixelSample]] = {}
        for pair in chosen:
            try:
                decoded = [decode_image(pairs.image(pair, side)) for side in (0, 1)]
                samples[pair] = [to_pixels(image, (self.resolution, self.resolution)) for image in decoded]
            except ImageError as error:
                found[pair] = error.reason
        if samples:
            good = list(samples)
            sums = self._gains(pairs, good, [samples[pair] for pair in good])
            means = [(first, second) for first, second in (sums / self.options.draws).tolist()]
            found |= dict(zip(good, means, strict=True))
        return [found[pair] for pair in chosen]

    def _gains(
        self, pairs: LabelledPairs, chosen: list[int], samples: list[list[PixelSample]]
    ) -> np.ndarray[Any, Any]:
        """float64 [pairs, 2]: reference minus policy error of both images, summed over the draws."""
        sides = [[pair[side] for pair in samples] for side in (0, 1)]
        flat = [sample for side in sides for sample in side]  # all images 0, then all images 1
        mean, _ = self.family.codec.encode(as_tensor(flat))
        self.family.codec.check_finite(mean)
        latents = self.family.codec.scale(mean.to(self._device))
        captions = [pairs.texts[pair][side] for side in (0, 1) for pair in chosen]
        conditioning = self._conditioning(captions, flat)
        total = np.zeros((len(chosen), 2))
        for draw in range(self.options.draws):
            batch = self._batch(pairs, chosen, draw, latents, conditioning)
            reference, policy = self._errors(batch, self._reference), self._errors(batch, self._policy)
            gains = torch.stack(
                [reference.policy_w - policy.policy_w, reference.policy_l - policy.policy_l], dim=1
            )
            total += gains.double().cpu().numpy()
        if not np.isfinite(total).all():
            raise UserError("the model's errors are not finite", fix="try --dtype fp32")
        return total

    def _conditioning(self, captions: list[str], samples: list[PixelSample]) -> dict[str, Tensor]:
        distinct = list(dict.fromkeys(captions))
        places = torch.tensor([distinct.index(caption) for caption in captions])
        text = self.family.encode_prompts(distinct)
        sizes = self.family.size_conditioning(
            torch.tensor([sample.original_size for sample in samples]),
            torch.tensor([sample.crop for sample in samples]),
            torch.tensor([(self.resolution, self.resolution)] * len(samples)),
        )
        chosen = {name: value[places.to(value.device)] for name, value in text.items()} | sizes
        return {name: value.to(self._device) for name, value in chosen.items()}

    def _batch(
        self,
        pairs: LabelledPairs,
        chosen: list[int],
        draw: int,
        latents: Tensor,
        conditioning: dict[str, Tensor],
    ) -> Batch:
        keys = [(draw, pairs.pair_id(pair)) for pair in chosen]
        noise, timesteps = draw_noise(
            self.options.seed, VALIDATION, keys, latents.shape[1:], (self.options.low, self.high)
        )
        return Batch(
            pairs=chosen,
            draws=[draw] * len(chosen),
            latents=latents,
            noise=noise.to(self._device).repeat(2, 1, 1, 1),
            timesteps=timesteps.to(self._device).repeat(2),
            conditioning=conditioning,
        )

    def _errors(self, batch: Batch, unet: nn.Module) -> PairErrors:
        return pair_errors(self.family, batch, unet, None, self._autocast)

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        dtype = DTYPES[self.options.dtype]
        return torch.autocast(self._device.type, dtype, enabled=dtype != torch.float32)


def _policy(model: ModelConfig, base: ModelConfig, family: Family) -> tuple[nn.Module, dict[str, str]]:
    """The denoiser of `model`, and what identifies it; its VAE, text encoder and schedule must be the
    family's."""
    own_base, lora = base_and_lora(model)
    own = family if own_base == base else load_family(own_base)
    mine, theirs = own.fingerprint(), family.fingerprint()
    differing = [name for name in ("vae", "text", "config") if mine[name] != theirs[name]]
    if differing:
        names = {"vae": "VAE", "text": "text encoder", "config": "noise schedule or UNet's settings"}
        raise UserError(
            f"{model.base} and its reference differ in more than their weights of the UNet",
            why=f"another {' and another '.join(names[name] for name in differing)}",
            fix="give the model that training started from as --reference",
        )
    if lora is None:
        return own.unet, mine
    unet = load_pipeline(model).pipeline.unet
    return unet, {**mine, "unet": weights_hash([unet])}
