"""Every setting of a training run: its type, default, meaning and range.

The TOML loader, the command line overrides and `diffpref train --help` all read these classes, so a setting
is described once. Sections of the TOML file are the nested classes; `objective` is checked against the
parameters of the objective it names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    bounds: str = "",
    choices: tuple[str, ...] = (),
    multiple_of: int = 1,
    word: str = "",
) -> Any:
    """A field with its description; required without a default.

    bounds: an interval such as "[0, 1)". word: a text that is allowed in place of a number, such as "auto".
    """
    metadata = {"help": help, "bounds": bounds, "choices": choices, "multiple_of": multiple_of, "word": word}
    return field(default=default, metadata=metadata)


def section(kind: type, help: str) -> Any:
    """A nested table; required when one of its own keys is, otherwise all defaults."""
    try:
        kind()
    except TypeError:
        return field(metadata={"help": help})
    return field(default_factory=kind, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    base: str = option(
        help="model to align and to compare with: a diffusers pipeline folder, a hub id (org/name), or "
        "tiny:model, the small model that ships with diffpref; its kind is read from model_index.json"
    )
    family: str = option(
        "auto",
        choices=("auto", "sd", "sdxl"),
        help="kind of model the recipe is meant for: another kind is refused before it is loaded; auto: any",
    )
    revision: str = option("", help="branch, tag or commit of a hub id; empty: the hub's default")
    variant: str = option("", help="weight file variant, such as fp16; empty: the plain files")
    vae: str = option(
        "",
        help="another VAE of the same latents, such as one that is safe in fp16: a folder or a hub id; "
        "empty: the model's own",
    )
    vae_precision: str = option(
        "fp32",
        choices=("fp32", "bf16", "fp16"),
        help="precision of the VAE while images are encoded; SDXL's own VAE overflows in fp16",
    )
    attention: str = option(
        "sdpa",
        choices=("sdpa", "xformers"),
        help="attention of policy and reference: torch's own, or xformers (pip install 'diffpref[xformers]')",
    )
    gradient_checkpointing: bool = option(
        False, help="recompute activations in the backward pass: less memory, 1.25 to 1.7 times the time"
    )


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    type: str = option(
        "none",
        choices=("none", "lora", "dora"),
        help="none trains all weights of the UNet, lora a small addition to them, dora a LoRA of their "
        "directions with magnitudes of its own",
    )
    rank: int = option(16, bounds="[1, inf)", help="rank of the LoRA matrices")
    alpha: float = option(
        16.0, bounds="(0, inf)", help="LoRA strength: the addition is scaled by alpha / rank"
    )
    target_modules: tuple[str, ...] = option(
        ("to_q", "to_k", "to_v", "to_out.0"),
        help="layers of the UNet that LoRA adds to, by the end of their names",
    )


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    kind: str = option(
        "auto",
        choices=("auto", "copy", "adapter", "cached"),
        help="where the reference's errors come from: a frozen copy of the base, the policy with "
        "its adapters switched off, or a cache of errors on fixed draws; auto: adapter where there is one, "
        "else copy",
    )
    draws: int = option(
        4,
        bounds="[1, inf)",
        help="cached: fixed draws of timestep, noise, latent, flip and dropout per pair; epoch e uses draw "
        "e modulo this",
    )


@dataclass(frozen=True, kw_only=True)
class ColumnsConfig:
    caption: str = option("caption", help="prompt of the pair, used when captions are shared")
    image_0: str = option("jpg_0", help="bytes of the first image")
    image_1: str = option("jpg_1", help="bytes of the second image")
    label_0: str = option("label_0", help="preference for the first image: 1 won, 0 lost, 0.5 tie")
    caption_0: str = option("caption_0", help="caption of the first image, used when captions are dual")
    caption_1: str = option("caption_1", help="caption of the second image, used when captions are dual")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    pairs: str = option(
        help="preference pairs: a Parquet file, a folder of them, a glob, or tiny:pairs/train.parquet"
    )
    validation: str = option("", help="held-out pairs, in the same forms; empty: none")
    max_pairs: int = option(
        0, bounds="[0, inf)", help="train on the first so many usable pairs; 0: on all of them"
    )
    captions: str = option(
        "shared",
        choices=("shared", "dual"),
        help="shared: one prompt for both images; dual: a caption for each image (with dpo this is DCPO)",
    )
    resolution: int = option(
        512,
        bounds="[8, inf)",
        multiple_of=8,
        help="side of the square training images, in pixels; with buckets, root of their area",
    )
    aspect: str = option(
        "square",
        choices=("square", "buckets"),
        help="square: the images' squares; buckets: the nearest of a set of rectangles of equal area, the "
        "same for both images of a pair",
    )
    crop: str = option(
        "center",
        choices=("center", "random"),
        help="part of the resized image to keep; random: another one at each visit, without a latent cache",
    )
    flip: str = option(
        "none",
        choices=("none", "shared", "separate"),
        help="mirror images half of the time; shared: both of a pair or none, separate: each by itself",
    )
    cache_latents: bool = option(
        True, help="encode each image once, before training; false: at every visit, which needs no disk"
    )
    max_bad_share: float = option(
        0.01,
        bounds="[0, 1]",
        help="share of unreadable pairs that is replaced by others before the run stops instead",
    )
    prompt_dropout: float = option(
        0.0, bounds="[0, 1)", help="share of pairs trained with an empty prompt, for classifier-free guidance"
    )
    resample_latents: bool = option(
        True, help="draw a new latent from the VAE's distribution at each visit; false: always take its mean"
    )
    latent_precision: str = option(
        "fp32",
        choices=("fp32", "fp16"),
        help="of cached latents on the disk; fp16 halves them, with a relative error of 0.0005",
    )
    cache_dir: str = option("", help="folder of the latent and text cache; empty: OUTPUT/cache")
    workers: int = option(
        0, bounds="[0, inf)", help="processes that decode images while the cache is built; 0: none"
    )
    columns: ColumnsConfig = section(ColumnsConfig, "names of the Parquet columns")


@dataclass(frozen=True)
class ObjectiveConfig:
    """An objective's name and all its parameters, those left at their defaults included."""

    name: str = option("dpo", help="what to minimise; its parameters are further keys of this section")
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    steps: int = option(1000, bounds="[1, inf)", help="optimizer steps")
    batch_size: int = option(16, bounds="[1, inf)", help="pairs per optimizer step, over all processes")
    micro_batch: int | str = option(
        0,
        bounds="[0, inf)",
        word="auto",
        help="pairs in one forward pass of a process, gradients add up over them; 0: batch_size / processes; "
        "auto: the most that fit into memory",
    )
    optimizer: str = option(
        "adamw",
        choices=("adamw", "adamw8bit", "adafactor"),
        help="adamw, adamw8bit with a quarter of its memory (pip install bitsandbytes), or adafactor with "
        "next to none",
    )
    learning_rate: float = option(
        1e-5, bounds="(0, 1]", help="peak learning rate: absolute, never scaled by anything"
    )
    schedule: str = option(
        "constant",
        choices=("constant", "linear", "cosine"),
        help="learning rate after warm-up; linear and cosine end at 0",
    )
    warmup_steps: int = option(
        0, bounds="[0, inf)", help="steps over which the learning rate rises from 0 to its peak"
    )
    adam_beta1: float = option(0.9, bounds="[0, 1)", help="AdamW: decay of the gradient's mean")
    adam_beta2: float = option(0.999, bounds="[0, 1)", help="AdamW: decay of the gradient's mean square")
    adam_epsilon: float = option(1e-8, bounds="(0, inf)", help="AdamW: added to the denominator")
    weight_decay: float = option(0.01, bounds="[0, inf)", help="AdamW: decoupled weight decay")
    max_grad_norm: float = option(
        1.0, bounds="[0, inf)", help="gradient norm above which gradients are scaled down; 0: off"
    )
    mixed_precision: str = option(
        "no",
        choices=("no", "fp16", "bf16"),
        help="precision inside the networks; weights, errors and losses stay fp32",
    )
    tf32: bool = option(
        False, help="fp32 matrix products in TensorFloat-32 on CUDA: faster, 10 bits of mantissa"
    )
    channels_last: bool = option(False, help="keep the UNet's weights and images channels last, on CUDA")
    compile: bool = option(
        False, help="compile the UNet's blocks with torch.compile, on CUDA; the first steps take minutes"
    )
    ema_decay: float = option(
        0.0,
        bounds="[0, 1)",
        help="decay of the moving average of the weights, which is what gets saved then; 0: off",
    )
    min_timestep: int = option(0, bounds="[0, inf)", help="smallest noise timestep to train on")
    max_timestep: int = option(999, bounds="[0, inf)", help="largest noise timestep to train on")
    threads: int = option(
        0,
        bounds="[0, inf)",
        help="CPU threads of each process, at most OMP_NUM_THREADS where that is set; 0: as torch chooses",
    )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = option(500, bounds="[0, inf)", help="steps between checkpoints; 0: only at the end")
    keep: int = option(2, bounds="[1, inf)", help="newest checkpoints to keep")
    resume: str = option(
        "auto",
        choices=("auto", "never"),
        help="auto continues the run that the output folder holds; never wants a folder without a run",
    )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = option(10, bounds="[1, inf)", help="steps between rows of metrics.jsonl")
    tensorboard: bool = option(True, help="write tensorboard events into the output folder")
    wandb: bool = option(False, help="log to Weights & Biases (pip install 'diffpref[wandb]')")
    wandb_project: str = option("diffpref", help="Weights & Biases project")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    every: int = option(
        0, bounds="[0, inf)", help="steps between image grids, reference beside policy; 0: only at the end"
    )
    prompts: tuple[str, ...] = option(
        (), help="prompts of the grid; empty: the first captions of the (held-out) pairs"
    )
    count: int = option(8, bounds="[0, inf)", help="captions to take where no prompts are given; 0: no grids")
    seed: int = option(0, bounds="[0, inf)", help="seed of the grid's first image, the next ones count up")
    scheduler: str = option(
        "ddim", choices=("ddim", "euler", "dpmsolver++", "pndm"), help="sampler of the grid"
    )
    steps: int = option(20, bounds="[1, 1000]", help="denoising steps of an image")
    guidance: float = option(7.5, bounds="[1, inf)", help="classifier-free guidance scale; 1: none")
    evaluators: tuple[str, ...] = option(
        (), help="evaluators that score each grid's images; their means go to metrics.jsonl"
    )


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    every: int = option(
        0, bounds="[0, inf)", help="steps between measurements on data.validation; 0: only at the end"
    )
    pairs: int = option(256, bounds="[1, inf)", help="held-out pairs to measure on, from the first")
    draws: int = option(4, bounds="[1, inf)", help="fixed timestep and noise draws per held-out pair")
    patience: int = option(
        0,
        bounds="[0, inf)",
        help="stop early after this many measurements without a better one and export the best weights; "
        "0: never",
    )
    monitor: str = option(
        "pair_accuracy",
        choices=("pair_accuracy", "margin", "loss"),
        help="the held-out value that patience watches",
    )


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    push_to_hub: str = option(
        "", help="hub repository (org/name) to upload the finished model to; empty: none"
    )
    private: bool = option(True, help="make that repository private when it does not exist yet")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    output: str = option("runs/train", help="run folder: checkpoints, metrics, samples and the trained model")
    seed: int = option(0, bounds="[0, 4294967295]", help="seed of all randomness in training")
    model: ModelConfig = section(ModelConfig, "the model to align")
    adapter: AdapterConfig = section(AdapterConfig, "full fine-tuning or LoRA")
    reference: ReferenceConfig = section(ReferenceConfig, "what preference is measured against")
    data: DataConfig = section(DataConfig, "preference pairs")
    objective: ObjectiveConfig = section(ObjectiveConfig, "what to minimise")
    train: LoopConfig = section(LoopConfig, "the optimizer's loop")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "saving and resuming")
    log: LogConfig = section(LogConfig, "metrics")
    sampling: SamplingConfig = section(SamplingConfig, "image grids during training")
    validation: ValidationConfig = section(ValidationConfig, "measurements on held-out pairs, early stop")
    export: ExportConfig = section(ExportConfig, "what becomes of the trained model")
