"""Do the evaluators give the numbers that their authors printed? For whoever has the weights.

    python bench/published_scores.py                            # needs openai/clip-vit-base-patch16
    python bench/published_scores.py --clipscore-repo DIR     # a checkout of github.com/jmhessel/clipscore

Weights come from the Hugging Face cache or the hub. Exits with 1 when a number is off.

Checked: torchmetrics' documented example (a random image drawn from a seed) and the example of CLIPScore's
README (its two photographs and captions). PickScore, HPS v2 and the aesthetic predictor publish no score of
an image that can be had, so there is nothing to compare with; tests/parity holds them to their code instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from PIL import Image

from diffpref.data.images import decode_image
from diffpref.errors import UserError
from diffpref.evaluators import EVALUATORS, Runtime


def torchmetrics_example() -> tuple[float, float, float]:
    """Our score, the documented one (torchmetrics.multimodal.CLIPScore), the tolerance."""
    values = torch.randint(255, (3, 224, 224), generator=torch.manual_seed(42))
    image = Image.fromarray(values.permute(1, 2, 0).to(torch.uint8).numpy())
    metric = EVALUATORS["clipscore-torchmetrics"](Runtime("openai/clip-vit-base-patch16"))
    return float(metric.score([image], ["a photo of a cat"])[0]), 24.4255, 0.002


def clipscore_example(repository: Path, captions: str, published: float) -> tuple[float, float, float]:
    """Our mean, the README's (computed in fp16 on a GPU, hence the tolerance)."""
    texts = json.loads((repository / "example" / captions).read_text(encoding="utf-8"))
    images = []
    for name in texts:
        files = sorted((repository / "example" / "images").glob(f"{name}.*"))
        if not files:
            raise UserError(f"{repository}/example/images holds no {name}", fix="give a complete checkout")
        images.append(decode_image(files[0].read_bytes()))
    scores = EVALUATORS["clipscore-jmhessel"](Runtime()).score(images, list(texts.values()))
    return float(scores.mean()), published, 0.002


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clipscore-repo", type=Path, metavar="DIR")
    args = parser.parse_args()
    checks = {"clipscore-torchmetrics, documented example": torchmetrics_example}
    if args.clipscore_repo:
        for captions, published in (("good_captions.json", 0.8584), ("bad_captions.json", 0.7153)):
            checks[f"clipscore-jmhessel, {captions}"] = lambda c=captions, p=published: clipscore_example(
                args.clipscore_repo, c, p
            )
    wrong = 0
    for name, check in checks.items():
        try:
            found, published, tolerance = check()
        except UserError as error:
            print(f"{name}: not checked\n{error}")
            return 2
        good = abs(found - published) <= tolerance
        wrong += not good
        print(f"{name}: {found:.4f}, published {published:.4f}: {'equal' if good else 'DIFFERENT'}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
