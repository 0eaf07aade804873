"""Objects in an image by Mask2Former, with the input and output steps of the published evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from diffpref.errors import UserError
from diffpref.evaluators.checkpoints import weights_hash
from diffpref.evaluators.geneval.rules import THRESHOLD, Detection
from diffpref.evaluators.geneval.words import NAMES, from_detector
from diffpref.transfer import to_device

PUBLISHED = "facebook/mask2former-swin-small-coco-instance"
SHORT_EDGE, LONG_EDGE, DIVISOR = 800, 1333, 32
"""Input size of both the published evaluation and the checkpoint's training code. The image processor that
comes with the checkpoint squeezes every image to 384 x 384 instead, which loses small objects."""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_DETECTIONS = 100


class Detector:
    """COCO's 80 kinds of things in one image at a time, so that no image is padded to another's size.

    Always in fp32: its deformable attention samples at positions that bf16 cannot tell apart, and gave NaN.
    """

    def __init__(self, model: Any, device: torch.device, weights: str = "") -> None:
        """weights: what fingerprints say of the model's values; "" for their hash.

        Raises UserError when the model's labels are not COCO's 80 things.
        """
        self.names = {int(index): from_detector(label) for index, label in model.config.id2label.items()}
        lacking = [name for name in NAMES if name not in self.names.values()]
        if lacking:
            raise UserError(
                "the detector of geneval does not know all of COCO's classes",
                why=f"its labels lack {len(lacking)} of 80: {', '.join(lacking[:5])}",
                fix=f"use an instance segmentation checkpoint of COCO, such as {PUBLISHED}",
            )
        self.weights = weights or weights_hash(model)
        self.model: Any = model.to(device).eval()
        self.device = device

    def detect(self, image: Image.Image) -> list[Detection]:
        """Detections above the lowest threshold in use, as the model orders them.

        Raises UserError when the weights give no finite output, which would look like an empty image.
        """
        pixels, size = prepare(image)
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with torch.inference_mode(), exact:
            outputs = self.model(pixel_values=to_device(pixels, self.device))
            classes, masks = outputs.class_queries_logits[0], outputs.masks_queries_logits[0]
            if not bool(classes.isfinite().all() & masks.isfinite().all()):  # waits once
                raise UserError(
                    "the detector of geneval gives no finite output", why="its weights are damaged"
                )
            padded = (pixels.shape[2], pixels.shape[3])
            return self.detections(classes, masks, padded, size, (image.height, image.width))

    def detections(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        padded: tuple[int, int],
        resized: tuple[int, int],
        original: tuple[int, int],
    ) -> list[Detection]:
        """Raw outputs of one image to objects.

        A query may give several classes; the 100 best pairs of query and class are candidates. Its mask is
        enlarged to the network's input, the padding cut off, and resized to the image before it is
        thresholded at probability one half. Score: probability of the class times the mean probability
        within the mask.

        Args:
            class_logits: [queries, classes + 1], the last one being "nothing".
            mask_logits: [queries, h, w].
            padded, resized, original: (height, width) of the network's input, of the image in it, and of the
                image itself.
        """
        probabilities = class_logits.softmax(-1)[:, :-1]
        classes = probabilities.shape[1]
        best, places = probabilities.flatten().topk(min(MAX_DETECTIONS, probabilities.numel()))
        likely: list[tuple[str, float, Tensor]] = []
        fills: list[Tensor] = []
        for probability, place in zip(best.tolist(), places.tolist(), strict=True):
            name = self.names.get(place % classes)
            if name is None or probability <= THRESHOLD:  # the mask can only lower it
                continue
            mask = mask_logits[place // classes][None, None]
            mask = functional.interpolate(mask, padded, mode="bilinear", align_corners=False)
            mask = functional.interpolate(
                mask[..., : resized[0], : resized[1]], original, mode="bilinear", align_corners=False
            )[0, 0]
            inside = mask > 0
            likely.append((name, probability, inside))
            fills.append((mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6))
        means = torch.stack(fills).tolist() if fills else []  # of all objects at once: one wait
        kept = [
            (name, score, inside)
            for (name, probability, inside), mean in zip(likely, means, strict=True)
            if (score := probability * mean) > THRESHOLD
        ]
        if not kept:
            return []
        masks = torch.stack([inside for _, _, inside in kept]).cpu().numpy()
        return [
            Detection(name, score, _box(mask), mask)
            for (name, score, _), mask in zip(kept, masks, strict=True)
        ]


def prepare(image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """Network input [1, 3, H, W], and (height, width) of the image in it, which lies at the top left.

    The shorter edge becomes 800 pixels unless the longer would exceed 1333; H and W are filled up with zeros
    to multiples of 32.
    """
    width, height = image.size
    scale = min(SHORT_EDGE / min(width, height), LONG_EDGE / max(width, height))
    new = max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
    resized = image.convert("RGB").resize(new[::-1], Image.Resampling.BILINEAR)
    values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).to(torch.float32).div_(255)
    mean, std = (torch.tensor(channels)[:, None, None] for channels in (MEAN, STD))
    pixels = values.sub_(mean).div_(std)[None]
    lacking = [-side % DIVISOR for side in new]
    return functional.pad(pixels, (0, lacking[1], 0, lacking[0])), new


def _box(mask: np.ndarray[Any, np.dtype[np.bool_]]) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
