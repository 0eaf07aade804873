"""UNet and text encoder of the small model, trained together to predict the noise of cached latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffpref.tiny.bank import example, pixels
from diffpref.tiny.progress import load_progress, save_progress
from diffpref.tiny.team import Team

CYCLES = (2_400, 4_000)
"""Steps of each cosine cycle of the learning rate, with a warm restart between them (arXiv 1608.03983)."""
STEPS = sum(CYCLES)
BATCH = 48
LEARNING_RATE = 1e-3
WARMUP = 200
EMA_DECAY = 0.999
CAPTION_DROPOUT = 0.1
EXAMPLES = 16_000
SNAPSHOT_EVERY = 200
SEED = 23
WIDTH = 96


def noise_schedule() -> DDPMScheduler:
    """Stable Diffusion's: 1000 steps, scaled-linear betas from 0.00085 to 0.012, epsilon prediction."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        steps_offset=1,
    )


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=WIDTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    encoded = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    return encoded.input_ids


@torch.no_grad()
def build_bank(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, say: Callable[[str], None]
) -> dict[str, torch.Tensor]:
    """Latent means and deviations [N, 4, 8, 8], caption tokens [N, 2, 77] of all examples; kept on disk."""
    path = work / "bank.safetensors"
    if path.exists():
        return load_file(path)
    means, deviations, tokens = [], [], []
    for start in range(0, EXAMPLES, 100):
        chunk = [example(SEED, k) for k in range(start, start + 100)]
        posterior = vae.encode(torch.from_numpy(pixels([e.image for e in chunk]))).latent_dist
        means.append(posterior.mean)
        deviations.append(posterior.std)
        tokens.append(tokenize(tokenizer, [c for e in chunk for c in e.captions]).reshape(len(chunk), 2, 77))
        if (start + 100) % 2000 == 0:
            say(f"bank {start + 100}/{EXAMPLES}")
    bank = {
        "mean": torch.cat(means).contiguous(),
        "std": torch.cat(deviations).contiguous(),
        "tokens": torch.cat(tokens).to(torch.int32),
    }
    staged = path.with_suffix(".staged")
    save_file(bank, staged)
    staged.replace(path)
    return bank


def _cycle(step: int) -> tuple[int, int]:
    """The cycle that `step` is in, and its number within that cycle."""
    cycle = 0
    while step >= CYCLES[cycle]:
        step -= CYCLES[cycle]
        cycle += 1
    return cycle, step


def _rate(step: int) -> float:
    cycle, within = _cycle(step)
    warm = min(1.0, (within + 1) / WARMUP)
    return LEARNING_RATE * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * within / CYCLES[cycle])))


def _timesteps(step: int, rng: torch.Generator) -> torch.Tensor:
    """Uniform in the first cycle; then the larger of two draws: the facts are decided at the noisy end."""
    draws = torch.randint(1000, (1 if _cycle(step)[0] == 0 else 2, BATCH), generator=rng)
    return draws.amax(dim=0)


def _update_average(average: nn.Module, module: nn.Module, step: int) -> None:
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    with torch.no_grad():
        for slow, fast in zip(average.parameters(), module.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)


def _draw(
    bank: dict[str, torch.Tensor], scale: float, empty: torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, noise, timesteps and tokens of one step's whole batch: a function of the step alone."""
    rng = torch.Generator().manual_seed(SEED * 1_000_003 + step)
    rows = torch.randint(len(bank["mean"]), (BATCH,), generator=rng)
    which = torch.randint(2, (BATCH,), generator=rng)
    mean, std = bank["mean"][rows], bank["std"][rows]
    latents = (mean + std * torch.randn(mean.shape, generator=rng)) * scale
    tokens = bank["tokens"][rows, which].long()
    dropped = torch.rand(BATCH, generator=rng) < CAPTION_DROPOUT
    tokens = torch.where(dropped[:, None], empty, tokens)
    noise = torch.randn(mean.shape, generator=rng)
    return latents, noise, _timesteps(step, rng), tokens


def snapshot_path(work: Path, step: int) -> Path:
    return work / "snapshots" / f"step-{step:05d}.safetensors"


def _save_snapshot(work: Path, step: int, average: nn.Module) -> None:
    path = snapshot_path(work, step)
    path.parent.mkdir(exist_ok=True)
    staged = path.with_suffix(".staged")
    save_file({k: v.clone().contiguous() for k, v in average.state_dict().items()}, staged)
    staged.replace(path)


def load_snapshot(
    work: Path, step: int, tokenizer: CLIPTokenizer
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Averaged weights as they were after `step` steps."""
    pair = nn.ModuleDict({"unet": build_unet(), "text": build_text_encoder(tokenizer)})
    pair.load_state_dict(load_file(snapshot_path(work, step)))
    pair.eval().requires_grad_(False)
    return pair["unet"], pair["text"]  # type: ignore[return-value]


def train_denoiser(
    work: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, say: Callable[[str], None]
) -> None:
    """Trains (or finishes training); snapshots of the averaged weights appear under `work / "snapshots"`."""
    team = Team.join()
    if team.leads:
        build_bank(work, vae, tokenizer, say)
    team.wait()
    bank = build_bank(work, vae, tokenizer, say)
    torch.manual_seed(SEED)
    live = nn.ModuleDict({"unet": build_unet(), "text": build_text_encoder(tokenizer)})
    average = deepcopy(live).requires_grad_(False)
    optimizer = torch.optim.AdamW(live.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.01)
    notes = load_progress(work / "denoiser", {"live": live, "average": average}, optimizer)
    schedule, empty = noise_schedule(), tokenize(tokenizer, [""])[0]
    recent = 0.0
    for step in range(notes["step"] if notes else 0, STEPS):
        optimizer.param_groups[0]["lr"] = _rate(step)
        batch = _draw(bank, vae.config.scaling_factor, empty, step)
        latents, noise, timesteps, tokens = (part[team.rank :: team.world] for part in batch)
        noisy = schedule.add_noise(latents, noise, timesteps)
        output = live["unet"](noisy, timesteps, live["text"](tokens)[0]).sample
        loss = F.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        team.average_gradients(live.parameters())
        torch.nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        optimizer.step()
        _update_average(average, live, step)
        recent += loss.item() / 50
        if (step + 1) % 50 == 0:
            if team.leads:
                say(f"denoiser step {step + 1}/{STEPS} loss {recent:.4f}")
            recent = 0.0
        if team.leads and (step + 1) % SNAPSHOT_EVERY == 0:
            _save_snapshot(work, step + 1, average)
        if team.leads and (step + 1) % SNAPSHOT_EVERY == 0:
            save_progress(work / "denoiser", step + 1, {"live": live, "average": average}, optimizer, {})
    team.wait()
