"""An estimate as text: a line for each item, with what it is."""

from __future__ import annotations

from diffpref.estimate import GIB, Estimate
from diffpref.training.micro_batch import HEADROOM

TERA = 1e12
NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "average": "moving average",
    "reference": "reference",
    "vae": "VAE",
    "constant": "copies of weights",
    "activations": "activations",
    "overlap": "never at once",
}
OPTIMIZERS = {
    "adamw": "adamw: two fp32 moments of each trained value",
    "adamw8bit": "adamw8bit: two moments of 8 bits, a scale for each 256, small tensors in fp32",
    "adafactor": "adafactor: means of squared gradients over the last two dimensions of each tensor",
}
PHASES = {
    "encode": "VAE encoder",
    "reference": "reference, forward",
    "forward": "policy, forward",
    "backward": "policy, backward",
}


def describe(found: Estimate) -> str:
    """Memory and FLOPs, aligned; the biggest item is marked."""
    return "\n\n".join([_head(found), _memory(found), _disk(found), _compute(found), _verdict(found)])


def _head(found: Estimate) -> str:
    config = found.config
    trained = f"{found.trained / 1e6:,.1f}M trained"
    adapter = (
        "all weights"
        if config.adapter.type == "none"
        else f"{config.adapter.type}, rank {config.adapter.rank}"
    )
    return (
        f"{config.model.base} ({found.kind}), {config.data.resolution} px, {config.objective.name}\n"
        f"{found.parameters / 1e6:,.1f}M parameters, {trained} ({adapter})\n"
        f"{config.train.batch_size} pairs a step in micro-batches of {found.micro_batch}{_over(found)}"
    )


def _over(found: Estimate) -> str:
    return f", on {found.hardware.gpus} GPUs" if found.hardware.gpus > 1 else ""


def _disk(found: Estimate) -> str:
    keep, disk = found.config.checkpoint.keep, found.disk
    decimals = 2 if disk["checkpoints"] >= GIB else 4
    notes = {
        "checkpoints": f"{keep} kept (checkpoint.keep) and one being written: trained weights, state",
        "model": "the UNet, fp32; VAE and text encoders come on top"
        if found.config.adapter.type == "none"
        else "the adapters, fp32",
    }
    lines = [f"{'disk':<20} {'GiB':>9}"]
    lines += [f"  {name:<18} {disk[name] / GIB:>9,.{decimals}f}   {note}" for name, note in notes.items()]
    if disk["latents"]:
        lines.append(
            f"  {'cache, 1,000 pairs':<18} {1000 * disk['latents'] / GIB:>9,.{decimals}f}   latents at "
            f"{found.config.data.resolution} px; text comes on top, once for each different caption"
        )
    return "\n".join(lines)


def _memory(found: Estimate) -> str:
    notes = _notes(found)
    decimals = 2 if found.peak >= GIB else 4
    biggest = max(found.memory.values())
    lines = [f"{'memory at the peak':<20} {'GiB':>9}"]
    for item, count in found.memory.items():
        if not count and item in ("average", "vae", "constant", "overlap"):
            continue
        mark = "  <- the biggest" if count == biggest else ""
        lines.append(f"  {NAMES[item]:<18} {count / GIB:>9,.{decimals}f}   {notes[item]}{mark}")
    note = "tensors only; CUDA itself, its workspaces and fragmentation come on top"
    return "\n".join([*lines, f"  {'total':<18} {found.peak / GIB:>9,.{decimals}f}   {note}"])


def _notes(found: Estimate) -> dict[str, str]:
    """What each item is, in this run."""
    config = found.config
    half = config.train.mixed_precision
    per_pair = f"{found.bytes_per_pair / 2**20:,.0f} MiB a pair"
    checkpointing = ", recomputed by gradient checkpointing" if config.model.gradient_checkpointing else ""
    return {
        "weights": _weights_note(found),
        "gradients": f"of the {found.trained / 1e6:,.1f}M trained parameters, fp32",
        "optimizer": OPTIMIZERS[config.train.optimizer],
        "average": "of the trained weights, fp32 (train.ema_decay)",
        "reference": _reference_note(found),
        "vae": "encodes images at every visit (data.cache_latents = false), fp32",
        "constant": f"{half} copies that autocast makes"
        if half != "no"
        else "temporary, the same for any number of pairs",
        "activations": f"{found.micro_batch} x {per_pair}{checkpointing}",
        "overlap": "gradients come as activations go",
    }


def _weights_note(found: Estimate) -> str:
    half = found.config.train.mixed_precision
    if found.config.adapter.type == "none" or half == "no":
        return "the UNet, fp32 master weights" if found.config.adapter.type == "none" else "the UNet, fp32"
    return f"the UNet, frozen, what mixed precision casts kept in {half}; the adapters, fp32"


def _reference_note(found: Estimate) -> str:
    config = found.config
    if found.memory["reference"]:
        half = config.train.mixed_precision
        kept = "fp32" if half == "no" else half
        return f'a frozen {kept} copy of the UNet; none with a LoRA or reference.kind = "cached"'
    if config.reference.kind == "cached":
        return "none: its errors are cached before the run, for 2 forward passes a pair and draw"
    if found.flops["reference"]:
        return "none: the UNet with its adapters switched off"
    return f"none: {config.objective.name} has no reference"


def _compute(found: Estimate) -> str:
    batch = found.config.train.batch_size
    flops = {name: count for name, count in found.flops.items() if count} | {
        "total": sum(found.flops.values())
    }
    decimals = 3 if flops["total"] >= TERA / 10 else 6
    lines = [f"{'compute':<20} {'TFLOP/pair':>13} {'TFLOP/step':>13}"]
    for name, count in flops.items():
        pair, step = (f"{value / TERA:>13,.{decimals}f}" for value in (count, count * batch))
        lines.append(f"  {PHASES.get(name, name):<18} {pair} {step}")
    return "\n".join(lines)


def _verdict(found: Estimate) -> str:
    return f"{_hours(found)}\n{_room(found)}"


def _hours(found: Estimate) -> str:
    steps, hardware = found.config.train.steps, found.hardware
    if found.hours is None:
        return f"--tflops RATE of the GPU's maker says how many hours {steps:,} steps take"
    return (
        f"{steps:,} steps take about {found.hours:,.1f} hours at {hardware.share:.0%} of {hardware.tflops:g} "
        f"TFLOP/s{_over(found)}: the share is an assumption"
    )


def _room(found: Estimate) -> str:
    if found.limit is None:
        auto = found.config.train.micro_batch == "auto"
        size = "; figures are for one pair at a time" if auto else ""
        return f"--gpu-memory GIB says whether it fits, and the largest micro-batch that does{size}"
    room = f"{found.limit / GIB:g} GiB, of which {HEADROOM:.0%} are used"
    if not found.largest:
        return (
            f"does NOT fit into {room}, not even one pair at a time\n"
            "what helps: model.gradient_checkpointing, a LoRA, a smaller train.optimizer, "
            'reference.kind = "cached", a lower data.resolution'
        )
    largest = f"the largest micro-batch that does is {found.largest}"
    return f"{'fits' if found.fits else 'does NOT fit'} into {room}; {largest}"
