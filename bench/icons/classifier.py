"""A small judge of style: flat or shaded, from texture and colour, whatever the picture shows."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

EPOCHS, BATCH, LEARNING_RATE = 12, 64, 3e-3


class StyleClassifier(nn.Module):
    """Three convolutions, averaged over the picture, so that it sees surfaces and edges but no layout."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 64)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(narrow, wide, 3, 2, padding=1), nn.GroupNorm(4, wide), nn.ReLU())
                for narrow, wide in pairwise(widths)
            )
        )
        self.head = nn.Linear(widths[-1], 1)

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> logits [B]; above 0: the winner's style."""
        pixels = images.float() / 127.5 - 1
        return self.head(self.layers(pixels).mean(dim=(2, 3))).squeeze(1)


def train_classifier(winners: Tensor, losers: Tensor, seed: int = 0, epochs: int = EPOCHS) -> StyleClassifier:
    """Fit to uint8 [N, 3, H, W] of each style, mirrored at random; equal seeds give equal classifiers."""
    images = torch.cat([winners, losers])
    labels = torch.cat([torch.ones(len(winners)), torch.zeros(len(losers))])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StyleClassifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
        steps = epochs * -(-len(images) // BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
        for _ in range(epochs):
            for chosen in torch.randperm(len(images)).split(BATCH):
                batch = images[chosen]
                mirrored = torch.rand(len(batch)) < 0.5
                batch[mirrored] = batch[mirrored].flip(-1)
                optimizer.zero_grad()
                binary_cross_entropy_with_logits(model(batch), labels[chosen]).backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@torch.no_grad()
def in_winners_style(model: StyleClassifier, images: Tensor) -> Tensor:
    """bool [N]: which of uint8 [N, 3, H, W] are nearer to the winner's style than to the loser's."""
    return torch.cat([model(part) > 0 for part in images.split(256)])
