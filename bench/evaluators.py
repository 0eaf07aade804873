"""Evaluators against the published per-pair loops, on random weights of real shapes.

    python bench/evaluators.py --size B-32                        # a few minutes on one core
    python bench/evaluators.py --size H-14 --device cuda --dtype bf16 --pairs 256 --batch 64

Each reference loop does what its repository shows, one pair of images and a prompt at a time: prepare, embed,
compare. Ours gets the same lists at once. Both take turns in one process, caches emptied before every turn.

`distinct`: every image and prompt is new. `repeated`: four images of a prompt, all six pairs of them, as
preference accuracy and best-of-n comparisons have it. HPS needs torchvision and is left out without it.

On a GPU the share of the measured matmul rate that the image tower reaches is printed too.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from counting import flops_of
from PIL import Image

from diffpref.evaluators import EVALUATORS, Evaluator, Runtime
from diffpref.torchvision_ops import mend_torchvision

mend_torchvision()  # transformers imports torchvision where it is

from transformers import CLIPConfig, CLIPModel, CLIPTokenizer  # noqa: E402
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # noqa: E402

from diffpref.evaluators.clip import DTYPES  # noqa: E402
from diffpref.families.miniature import clip_tokenizer  # noqa: E402

Pair = tuple[Image.Image, Image.Image, str]


@dataclass(frozen=True)
class Size:
    """Widths, layers and heads of the towers (text, image), and the side of a patch."""

    widths: tuple[int, int]
    layers: tuple[int, int]
    heads: tuple[int, int]
    patch: int
    projection: int


SIZES = {
    "small": Size((64, 64), (2, 2), (2, 2), 32, 32),
    "B-32": Size((512, 768), (12, 12), (8, 12), 32, 512),
    "L-14": Size((768, 1024), (12, 24), (12, 16), 14, 768),
    "H-14": Size((1024, 1280), (24, 32), (16, 16), 14, 1024),
}
WORDS = (
    "red fox",
    "old harbour",
    "lanterns",
    "heavy snow",
    "a blue heron",
    "painted in oil",
    "at dawn",
    "4k",
)


def write_clip(folder: Path, size: Size) -> Path:
    towers = [
        {"hidden_size": w, "intermediate_size": 4 * w, "num_hidden_layers": n, "num_attention_heads": h}
        for w, n, h in zip(size.widths, size.layers, size.heads, strict=True)
    ]
    config = CLIPConfig(
        text_config=towers[0] | {"vocab_size": 49_408, "eos_token_id": 2},
        vision_config=towers[1] | {"patch_size": size.patch, "image_size": 224},
        projection_dim=size.projection,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


def picture(seed: int, side: int) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def distinct(count: int, side: int) -> list[Pair]:
    return [(picture(2 * i, side), picture(2 * i + 1, side), prompt(i)) for i in range(count)]


def repeated(count: int, side: int) -> list[Pair]:
    pairs = []
    for group in range(-(-count // 6)):
        images = [picture(4 * group + i, side) for i in range(4)]
        pairs += [(a, b, prompt(group)) for a, b in itertools.combinations(images, 2)]
    return pairs[:count]


def prompt(number: int) -> str:
    chosen = np.random.default_rng(number).choice(WORDS, size=3 + number % 6)
    return f"{number} {' '.join(chosen)}"


def ours(evaluator: Evaluator, pairs: list[Pair], batch: int) -> None:
    images = [image for pair in pairs for image in pair[:2]]
    prompts = [pair[2] for pair in pairs for _ in range(2)]
    evaluator.clip.network.known.clear()  # type: ignore[attr-defined]
    for start in range(0, len(images), batch):
        evaluator.score(images[start : start + batch], prompts[start : start + batch])


class PickScoreLoop:
    """The snippet of the model card: processor, two images, one prompt, softmax left out."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype) -> None:
        self.model = CLIPModel.from_pretrained(folder).eval().to(device, dtype)
        self.tokenizer, self.processor = CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil()
        self.device, self.dtype = device, dtype

    def __call__(self, pairs: list[Pair]) -> None:
        for first, second, text in pairs:
            pixels = self.processor(images=[first, second], return_tensors="pt")["pixel_values"]
            tokens = self.tokenizer(text, padding=True, truncation=True, max_length=77, return_tensors="pt")
            with torch.no_grad():
                images = self.model.get_image_features(
                    pixel_values=pixels.to(self.device, self.dtype)
                ).pooler_output
                words = self.model.get_text_features(**tokens.to(self.device)).pooler_output
                images, words = (x / x.norm(dim=-1, keepdim=True) for x in (images, words))
                (self.model.logit_scale.exp() * (words @ images.T)).cpu()


class HPSLoop:
    """The package's `score` for one image at a time, prompt included; its reload of weights left out."""

    def __init__(self, network: Any, device: str, dtype: torch.dtype) -> None:
        import open_clip
        from torchvision.transforms import functional

        self.model, self.device, self.dtype = network, device, dtype
        self.tokenize, self.functional = open_clip.tokenize, functional

    def transform(self, image: Image.Image) -> torch.Tensor:
        f = self.functional
        values = f.to_tensor(image)
        scale = 224 / max(values.shape[1:])
        values = f.resize(values, [round(s * scale) for s in values.shape[1:]], f.InterpolationMode.BICUBIC)
        return f.normalize(values, (0.4814, 0.4578, 0.4082), (0.2686, 0.2613, 0.2757))

    def __call__(self, pairs: list[Pair]) -> None:
        for image, text in ((image, pair[2]) for pair in pairs for image in pair[:2]):
            pixels = self.transform(image)[None].to(self.device, self.dtype)
            with torch.no_grad():
                images, words, _ = self.model(pixels, self.tokenize([text]).to(self.device))
                torch.diagonal(images @ words.T).cpu()


def contenders(
    folder: Path, args: argparse.Namespace
) -> dict[str, tuple[Evaluator, Callable[[list[Pair]], None]]]:
    runtime = Runtime(str(folder), args.device, args.dtype, args.batch)
    dtype = DTYPES[args.dtype]
    found: dict[str, Any] = {
        "pickscore": (EVALUATORS["pickscore"](runtime), PickScoreLoop(folder, args.device, dtype))
    }
    try:
        from diffpref.evaluators.open_clip_models import import_open_clip

        open_clip = import_open_clip()
    except Exception as error:
        print(f"hps is left out: {str(error).splitlines()[0]}")
        return found
    if args.size in ("B-32", "L-14", "H-14"):
        (folder / "hps").mkdir()
        config = open_clip.get_model_config(f"ViT-{args.size}")
        write_open_clip(open_clip, config, folder / "hps")
        evaluator = EVALUATORS["hps-v2"](Runtime(str(folder / "hps"), args.device, args.dtype, args.batch))
        network = evaluator.clip.network.encode_images.__self__  # type: ignore[attr-defined]
        found["hps-v2"] = (evaluator, HPSLoop(network, args.device, dtype))
    return found


def write_open_clip(open_clip: Any, config: dict[str, Any], folder: Path) -> None:
    import json

    from safetensors.torch import save_file

    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "HPS_v2_compressed.safetensors")


def seconds(call: Callable[[], None], device: str) -> float:
    """Of the CPU where it computes, of the wall where a GPU does."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    started = clock()
    call()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return clock() - started


def matmul_share(evaluator: Any, args: argparse.Namespace) -> str:
    """What the image tower reaches of the rate of one large product of the same dtype."""
    network, dtype = evaluator.clip.network, DTYPES[args.dtype]
    pixels = torch.randn(args.batch, 3, 224, 224, device=args.device, dtype=dtype)
    a = torch.randn(8192, 8192, device=args.device, dtype=dtype)
    with torch.inference_mode():
        flops = flops_of(lambda: network.encode_images(pixels[:1])) * args.batch
        rates = []
        for call, work in ((lambda: a @ a, 2 * 8192**3), (lambda: network.encode_images(pixels), flops)):
            for _ in range(3):
                call()
            times = [seconds(call, args.device) for _ in range(10)]
            rates.append(work / float(np.median(times)))
    return f"{rates[1] / 1e12:.1f} of {rates[0] / 1e12:.1f} TFLOP/s: {rates[1] / rates[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="B-32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--side", type=int, default=512, help="of the images, in pixels")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    unit = "wall" if args.device.startswith("cuda") else "CPU"
    print(
        f"ViT-{args.size}, {args.device}, {args.dtype}, {torch.get_num_threads()} threads, batch {args.batch}"
    )
    print(f"| evaluator | pairs | pairs a {unit} second | the published loop | ratio |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        found = contenders(write_clip(Path(folder), SIZES[args.size]), args)
        for name, (evaluator, loop) in found.items():
            for kind in (distinct, repeated):
                pairs = kind(args.pairs, args.side)
                ours(evaluator, pairs[:2], args.batch)
                loop(pairs[:2])
                times = np.array(
                    [
                        [
                            seconds(lambda: ours(evaluator, pairs, args.batch), args.device),  # noqa: B023
                            seconds(lambda: loop(pairs), args.device),  # noqa: B023
                        ]
                        for _ in range(args.rounds)
                    ]
                )
                fast, slow = np.median(times, axis=0)
                ratio = float(np.median(times[:, 1] / times[:, 0]))
                print(
                    f"| {name} | {kind.__name__} | {len(pairs) / fast:.2f} | {len(pairs) / slow:.2f} "
                    f"| {ratio:.2f} |",
                    flush=True,
                )
            if args.device.startswith("cuda"):
                print(f"{name}: share of the matmul rate: {matmul_share(evaluator, args)}", flush=True)


if __name__ == "__main__":
    main()
