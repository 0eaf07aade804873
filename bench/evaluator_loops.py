"""The published ways to score images, one after another, as plain loops.

Each does what its repository shows, for an image and a prompt at a time, and forgets both. Decoding of files,
progress bars, data loaders' processes and the loading of weights are left out. They run the very networks of
the evaluators that they are compared with, so that only the work and its order differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffpref.evaluators.geneval.grammar import Claim, parse_prompt
from diffpref.evaluators.geneval.words import COLORS
from diffpref.evaluators.texts import clean

Pair = tuple[Image.Image, Image.Image, str]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def singles(pairs: Sequence[Pair]) -> list[tuple[Image.Image, str]]:
    """Images with their prompts, pair by pair."""
    return [(image, pair[2]) for pair in pairs for image in pair[:2]]


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255


def normalized(
    values: torch.Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> torch.Tensor:
    return (values - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def openai_pixels(image: Image.Image, side: int = 224) -> torch.Tensor:
    """OpenAI's transform, which Hessel's, the aesthetic predictor's and ImageReward's code all repeat."""
    scale = side / min(image.size)
    width, height = (int(edge * scale) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return normalized(to_tensor(image.crop((left, top, left + side, top + side))))


class HFClip:
    """transformers' CLIPModel, on its device in its dtype, as the loops call it."""

    def __init__(self, model: Any, tokenizer: Any, device: str, dtype: torch.dtype) -> None:
        self.model, self.tokenizer, self.processor = model, tokenizer, CLIPImageProcessorPil()
        self.device, self.dtype = device, dtype

    def processed(self, images: list[Any]) -> torch.Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device, self.dtype)

    def tokens(self, texts: str | list[str], **options: Any) -> Any:
        return self.tokenizer(texts, return_tensors="pt", **options).to(self.device)

    def full_length(self, texts: list[str]) -> Any:
        """Tokens as OpenAI's and open_clip's tokenizers give them: 77 of every text."""
        return self.tokens(
            [clean(text) for text in texts], padding="max_length", truncation=True, max_length=77
        )

    def image_vectors(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=pixels.to(self.device, self.dtype)).pooler_output

    def text_vectors(self, tokens: Any) -> torch.Tensor:
        return self.model.get_text_features(**tokens).pooler_output


class PickScoreLoop(HFClip):
    """The model card's function: two images and a prompt, softmax left out."""

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        scores = []
        for first, second, text in pairs:
            images = self.image_vectors(self.processed([first, second]))
            words = self.text_vectors(self.tokens(text, padding=True, truncation=True, max_length=77))
            images, words = (x / x.norm(dim=-1, keepdim=True) for x in (images, words))
            scores += (self.model.logit_scale.exp() * (words @ images.T))[0].tolist()
        return np.array(scores)


class CosineLoop(HFClip):
    """The usage on the card of OpenAI's CLIP: the whole model on a text and an image; its logit unscaled."""

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        scores = []
        for image, text in singles(pairs):
            tokens = self.tokens(text, padding=True, truncation=True)
            output = self.model(**tokens, pixel_values=self.processed([image]))
            scores.append((output.logits_per_image / self.model.logit_scale.exp()).item())
        return np.array(scores)


class HesselLoop(HFClip):
    """``get_clip_score`` of Hessel et al. on one image and its caption, on OpenAI's 77 tokens."""

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        scores = []
        for image, text in singles(pairs):
            words = self.text_vectors(self.full_length(["A photo depicts " + text])).float().cpu().numpy()
            vector = self.image_vectors(openai_pixels(image)[None]).float().cpu().numpy()
            vector, words = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (vector, words))
            scores.append(2.5 * np.clip(np.sum(vector * words, axis=1), 0, None).item())
        return np.array(scores)


class TorchmetricsLoop(HFClip):
    """``CLIPScore.update`` on an image, as a tensor of bytes, and its caption; what it adds to the sum."""

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        scores = []
        for image, text in singles(pairs):
            pixels = self.processed([torch.from_numpy(np.array(image)).permute(2, 0, 1)])
            tokens = {name: ids[..., :77] for name, ids in self.tokens([text], padding=True).items()}
            vectors = self.image_vectors(pixels), self.text_vectors(tokens)
            vector, words = (x / x.norm(p=2, dim=-1, keepdim=True) for x in vectors)
            scores.append((100 * (vector * words).sum(-1)).item())
        return np.array(scores)


class AestheticLoop(HFClip):
    """``simple_inference.py``: OpenAI's CLIP, a vector normalised in numpy, the linear layers."""

    def __init__(self, head: Any, model: Any, tokenizer: Any, device: str, dtype: torch.dtype) -> None:
        super().__init__(model, tokenizer, device, dtype)
        self.head = head

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        scores = []
        for image, _ in singles(pairs):
            vector = self.image_vectors(openai_pixels(image)[None]).float().cpu().numpy()
            vector = vector / np.linalg.norm(vector, axis=-1, keepdims=True)
            scores.append(self.head["layers"](torch.from_numpy(vector)).item())
        return np.array(scores)


class HPSLoop:
    """The package's ``score`` for one image at a time, prompt included; its reload of weights left out."""

    def __init__(self, network: Any, device: str, dtype: torch.dtype) -> None:
        import open_clip
        from torchvision.transforms import functional

        self.model, self.device, self.dtype = network, device, dtype
        self.tokenize, self.functional = open_clip.tokenize, functional

    def transform(self, image: Image.Image, side: int = 224) -> torch.Tensor:
        f = self.functional
        values = f.to_tensor(image)
        scale = side / max(values.shape[1:])
        height, width = (round(edge * scale) for edge in values.shape[1:])
        values = f.resize(values, [height, width], f.InterpolationMode.BICUBIC)
        left, top = (side - width) // 2, (side - height) // 2
        values = f.pad(values, [left, top, side - width - left, side - height - top])
        return f.normalize(values, MEAN, STD)

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        scores = []
        for image, text in singles(pairs):
            pixels = self.transform(image)[None].to(self.device, self.dtype)
            vector, words, _ = self.model(pixels, self.tokenize([text]).to(self.device))
            scores.append(torch.diagonal(vector @ words.T).item())
        return np.array(scores)


class ImageRewardLoop:
    """The package's ``score`` of a prompt and an image."""

    def __init__(self, network: Any, tokenizer: Any, device: str, dtype: torch.dtype) -> None:
        self.network, self.tokenizer, self.device, self.dtype = network, tokenizer, device, dtype

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        scores = []
        for image, text in singles(pairs):
            tokens = self.tokenizer(
                text, padding="max_length", truncation=True, max_length=35, return_tensors="pt"
            ).to(self.device)
            pixels = openai_pixels(image)[None].to(self.device, self.dtype)
            features = self.network.vision(pixel_values=pixels).last_hidden_state
            hidden = self.network.text(
                input_ids=tokens.input_ids,
                attention_mask=tokens.attention_mask,
                encoder_hidden_states=features,
                encoder_attention_mask=torch.ones(features.shape[:-1], dtype=torch.long, device=self.device),
                is_decoder=False,
            ).last_hidden_state[:, 0]
            reward = hidden.float()
            for layer in self.network.mlp.values():
                reward = layer(reward)
            scores.append((reward.item() - 0.16717362830052426) / 1.0333394966054072)
        return np.array(scores)


class GenEvalLoop:
    """``evaluate_images.py`` on an image at a time: detections of a class by numpy, colours of crops by CLIP.

    The detector's input and output steps are those of MMDetection's Mask2Former: the shorter edge 800, all
    masks enlarged at once. `seen` holds what was found in each image: numbers by class, colours by class.
    """

    def __init__(self, detector: Any, clip: HFClip) -> None:
        self.model, self.clip, self.device = detector, clip, clip.device
        self.names = self.model.config.id2label
        self.classifiers: dict[str, torch.Tensor] = {}
        self.seen: list[tuple[dict[str, int], dict[str, str]]] = []

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Pair]) -> np.ndarray:
        self.classifiers, self.seen = {}, []
        return np.array([self.evaluate(image, parse_prompt(text)) for image, text in singles(pairs)])

    def evaluate(self, image: Image.Image, claim: Claim) -> float:
        boxes, masks = self.inference(image)
        threshold, objects = 0.9 if claim.kind == "counting" else 0.3, {}
        for label, name in self.names.items():
            confidence = boxes[label][:, 4]
            order = np.argsort(confidence)[::-1]
            order = order[confidence[order] > threshold][:16]
            if len(order):
                objects[name] = [(boxes[label][i], masks[label][i]) for i in order]
        colors: dict[str, str] = {}
        correct = True
        for number, thing in enumerate(claim.things):
            found = objects.get(thing.name, [])
            if len(found) < thing.count or (claim.kind == "counting" and len(found) > thing.count):
                correct = False
                continue
            if thing.color:
                colors[thing.name] = self.color(image, *found[0], thing.name)
                correct &= colors[thing.name] == thing.color
            if claim.relation and number == 1 and claim.things[0].name in objects:
                first = objects[claim.things[0].name][0][0]
                correct &= claim.relation in relations(first, found[0][0])
        self.seen.append(({name: len(found) for name, found in objects.items()}, colors))
        return float(correct)

    def inference(self, image: Image.Image) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """By class: boxes [N, 5] with confidences, masks [N, height, width]."""
        scale = min(800 / min(image.size), 1333 / max(image.size))
        width, height = (int(edge * scale + 0.5) for edge in image.size)
        pixels = to_tensor(image.resize((width, height), Image.Resampling.BILINEAR))
        pixels = normalized(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        pixels = torch.nn.functional.pad(pixels, (0, -width % 32, 0, -height % 32))[None].to(self.device)
        output = self.model(pixel_values=pixels)
        masks = interpolate(output.masks_queries_logits, pixels.shape[2:], mode="bilinear")
        masks = interpolate(masks[..., :height, :width], image.size[::-1], mode="bilinear")[0]
        classes = output.class_queries_logits[0].softmax(-1)[:, :-1]
        best, places = classes.flatten().topk(100)
        labels, masks = places % classes.shape[1], masks[places // classes.shape[1]]
        inside = masks > 0
        mean = (masks.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
        confidence, filled = (best * mean).cpu().numpy(), inside.cpu().numpy()
        rows = np.array([(*box(mask), sure) for mask, sure in zip(filled, confidence, strict=True)])
        own = {label: (labels == label).cpu().numpy() for label in self.names}
        return {label: rows[which] for label, which in own.items()}, {
            label: filled[which] for label, which in own.items()
        }

    def color(self, image: Image.Image, place: np.ndarray, mask: np.ndarray, name: str) -> str:
        if name not in self.classifiers:
            self.classifiers[name] = torch.stack([self.sentences(color, name) for color in COLORS], 1)
        alone = Image.composite(image, Image.new("RGB", image.size, "#999"), Image.fromarray(mask))
        vector = self.clip.image_vectors(openai_pixels(alone.crop(tuple(place[:4])))[None])
        vector = vector / vector.norm(dim=-1, keepdim=True)
        return COLORS[int((100 * vector @ self.classifiers[name]).argmax())]

    def sentences(self, color: str, name: str) -> torch.Tensor:
        """The direction [width] of a colour's sentences; a pass for every colour."""
        texts = [f"a photo of a {color} {name}", f"a photo of a {color}-colored {name}"]
        vectors = self.clip.text_vectors(self.clip.full_length([*texts, f"a photo of a {color} object"]))
        mean = (vectors / vectors.norm(dim=-1, keepdim=True)).mean(0)
        return mean / mean.norm()


def box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is true; zeros where nothing is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


def relations(a: np.ndarray, b: np.ndarray) -> set[str]:
    """GenEval's relative position of two boxes, with its margin of a tenth of both their sizes."""
    centre_a, centre_b = (a[:2] + a[2:4]) / 2, (b[:2] + b[2:4]) / 2
    size = (a[2:4] - a[:2]) + (b[2:4] - b[:2])
    offset = centre_a - centre_b
    beyond = np.maximum(np.abs(offset) - 0.1 * size, 0) * np.sign(offset)
    if np.all(np.abs(beyond) < 1e-3):
        return set()
    x, y = beyond / np.linalg.norm(offset)
    held = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, true in held.items() if true}
