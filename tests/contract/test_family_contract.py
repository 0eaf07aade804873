"""What every family must do, checked against plainly written diffusers and torch calls."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffpref.config import AdapterConfig, DataConfig, LoopConfig, ModelConfig, TrainConfig
from diffpref.data.cache import build_cache
from diffpref.data.images import as_tensor, decode_image, to_pixels
from diffpref.data.pairs import open_pairs
from diffpref.data.sampler import pair_generator
from diffpref.errors import UserError
from diffpref.families import FAMILIES, find_model, load_family
from diffpref.families.architectures import ARCHITECTURES
from diffpref.families.miniature import stable_diffusion, write_miniature
from diffpref.training.batches import BatchBuilder
from diffpref.training.pair_errors import pair_errors
from diffpref.training.policy import prepare_unet
from diffpref.training.precision import cast_frozen
from diffpref.training.reference import AdaptersOff, FrozenCopy
from tests.miniatures import rows, write_pairs

SIDE = 64
SIZES = ((96, 80), (80, 96), (64, 64), (70, 150))  # (height, width)
MODELS = ("sd15", "sd21", "sdxl", "predicts the sample")


def test_every_family_is_among_the_models():
    assert {ARCHITECTURES[name].pipeline for name in MODELS[:3]} == FAMILIES.keys()


@dataclass(frozen=True)
class Model:
    """A miniature on disk, and the same read by diffusers alone."""

    folder: Path
    plain: Any
    schedule: Any

    @property
    def is_xl(self) -> bool:
        return isinstance(self.plain, StableDiffusionXLPipeline)


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    if request.param in ARCHITECTURES:
        write_miniature(folder, request.param)
    else:
        stable_diffusion(folder, prediction_type="sample")
    plain = DiffusionPipeline.from_pretrained(folder)
    return Model(folder, plain, DDPMScheduler.from_pretrained(folder, subfolder="scheduler"))


def setting(tmp_path, folder, captions="shared", **data):
    """A family, a cache of six pairs of odd sizes, and the config that ties them."""
    table = rows(6, sizes=SIZES)
    path = write_pairs(tmp_path / "pairs.parquet", table)
    config = TrainConfig(
        seed=5,
        model=ModelConfig(base=str(folder)),
        data=DataConfig(pairs=str(path), resolution=SIDE, captions=captions, **data),
        train=LoopConfig(min_timestep=100, max_timestep=900),
    )
    family = load_family(config.model)
    cache = build_cache(open_pairs(path, captions=captions), family, config.data, tmp_path / "cache", False)
    return table, config, family, BatchBuilder(family, cache, config, torch.device("cpu")), cache


def crop_offset(height: int, width: int) -> tuple[int, int]:
    """Centre crop of an image whose shorter side became 64."""
    scale = SIDE / min(height, width)
    return (round(height * scale) - SIDE) // 2, (round(width * scale) - SIDE) // 2


@torch.no_grad()
def plain_error(model, row, image, caption, draw, noise, time):
    """Encode, sample the posterior, add noise, predict, target, error: diffusers and torch alone."""
    pipeline = model.plain
    picture = decode_image(row[f"jpg_{image}"])
    posterior = pipeline.vae.encode(as_tensor([to_pixels(picture, (SIDE, SIDE))])).latent_dist
    latents = (posterior.mean + posterior.std * draw) * pipeline.vae.config.scaling_factor
    noisy = model.schedule.add_noise(latents, noise, time)
    if model.is_xl:
        text, _, pooled, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False)
        sizes = (picture.height, picture.width, *crop_offset(picture.height, picture.width), SIDE, SIDE)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([sizes])}
        prediction = pipeline.unet(noisy, time, encoder_hidden_states=text, added_cond_kwargs=added).sample
    else:
        text = pipeline.encode_prompt(caption, "cpu", 1, False)[0]
        prediction = pipeline.unet(noisy, time, encoder_hidden_states=text).sample
    target = {
        "epsilon": noise,
        "v_prediction": model.schedule.get_velocity(latents, noise, time),
        "sample": latents,
    }[model.schedule.config.prediction_type]
    return ((prediction - target) ** 2).mean().item()


@pytest.mark.parametrize("captions", ["shared", "dual"])
def test_a_step_equals_the_plainly_written_one(tmp_path, model, captions):
    table, _, family, batches, cache = setting(tmp_path, model.folder, captions)
    step, pairs = 3, [4, 1]
    ours = pair_errors(
        family, batches.train(step, pairs), family.unet, FrozenCopy(family.unet), contextlib.nullcontext
    )
    for position, number in enumerate(pairs):
        row, pair_id = table[number], cache.pair_ids[number]
        winner = 0 if row["label_0"] == 1 else 1
        noise = torch.randn(4, 8, 8, generator=pair_generator(5, "noise", step, pair_id))[None]
        time = torch.randint(100, 901, (), generator=pair_generator(5, "timestep", step, pair_id))[None]
        draws = torch.randn(2, 4, 8, 8, generator=pair_generator(5, "latent", step, pair_id))
        for side, image in enumerate((winner, 1 - winner)):
            caption = row["caption"] if captions == "shared" else row[f"caption_{image}"]
            expected = plain_error(model, row, image, caption, draws[side], noise, time)
            policy, reference = (ours.policy_w, ours.ref_w) if side == 0 else (ours.policy_l, ours.ref_l)
            assert policy[position].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)
            assert reference[position].item() == policy[position].item()


def test_latents_that_are_not_cached_give_the_same_errors(tmp_path, model):
    results = []
    for cached in (True, False):
        _, _, family, batches, _ = setting(
            tmp_path / str(cached), model.folder, cache_latents=cached, flip="separate"
        )
        errors = pair_errors(family, batches.train(2, [0, 3, 5]), family.unet, None, contextlib.nullcontext)
        results.append(torch.stack([errors.policy_w, errors.policy_l]).detach())
    assert torch.allclose(*results, rtol=1e-5, atol=1e-6)


def test_draws_depend_on_step_and_pair_alone(tmp_path, model):
    _, _, _, batches, _ = setting(tmp_path, model.folder)
    together, alone = batches.train(7, [0, 3, 5]), batches.train(7, [3])
    for name in ("noise", "latents"):
        whole, single = getattr(together, name), getattr(alone, name)
        assert torch.equal(whole[[1, 4]], single)
    assert together.timesteps[1] == alone.timesteps[0]
    assert not torch.equal(batches.train(8, [3]).noise, alone.noise)
    assert torch.equal(alone.noise[0], alone.noise[1])  # winner and loser share it
    assert alone.timesteps[0] == alone.timesteps[1]
    assert not torch.equal(together.noise[0], together.noise[1])


def test_dropped_prompts_are_those_of_unconditional_images_for_winner_and_loser_together(tmp_path, model):
    _, _, _, batches, _ = setting(tmp_path, model.folder, "dual", prompt_dropout=0.5)
    if model.is_xl:
        empty = model.plain.encode_prompt("red", do_classifier_free_guidance=True)[1][0]
    else:
        empty = model.plain.encode_prompt("red", "cpu", 1, True)[1][0]
    dropped = 0
    for step in range(20):
        text = batches.train(step, [0, 1, 2]).conditioning["prompt_embeds"]
        for pair in range(3):
            is_empty = [torch.allclose(text[side], empty, atol=1e-5) for side in (pair, pair + 3)]
            assert is_empty[0] == is_empty[1]
            dropped += is_empty[0]
    assert 15 <= dropped <= 45  # 30 expected of 60, standard deviation 3.9


def reference_of(unet, adapter, half):
    """As `Stepper` makes it."""
    if half is not None:
        cast_frozen(unet, half)
    return FrozenCopy(unet, half) if adapter == "none" else AdaptersOff(unet)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_policy_equal_to_reference_gives_exactly_equal_errors(tmp_path, model, precision, adapter):
    _, config, family, batches, _ = setting(tmp_path, model.folder)
    prepare_unet(family.unet, replace(config, adapter=AdapterConfig(type=adapter, rank=2)))
    held = reference_of(family.unet, adapter, precision)

    def autocast():
        return torch.autocast("cpu", precision) if precision else contextlib.nullcontext()

    errors = pair_errors(family, batches.train(1, [0, 1, 2, 3, 4, 5]), family.unet, held, autocast)
    assert errors.policy_w.requires_grad
    assert torch.equal(errors.policy_w, errors.ref_w)
    assert torch.equal(errors.policy_l, errors.ref_l)
    errors.policy_w.sum().backward()
    trained = [parameter for parameter in family.unet.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)


class Kernels(TorchDispatchMode):
    """The operators that compute something, in order, with shape, strides and type of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        is_view = any(value.alias_info is not None for value in operator._schema.returns)
        if not is_view:
            tensors = [value for value in args if isinstance(value, torch.Tensor)]
            layout = [(tuple(value.shape), value.stride(), value.dtype) for value in tensors]
            self.seen.append((str(operator), *layout))
        return operator(*args, **(kwargs or {}))


class Logged(nn.Module):
    """A network whose forward passes are written down."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.kernels = network, Kernels()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self.kernels:
            return self.network(*args, **kwargs)


class LoggedReference:
    def __init__(self, held: FrozenCopy | AdaptersOff) -> None:
        self._held = held
        self.kernels: list[tuple[Any, ...]] = []

    def errors(self, batch, measure):
        def logged(network: nn.Module):
            wrapped = Logged(network)
            found = measure(wrapped)
            self.kernels = wrapped.kernels.seen
            return found

        return self._held.errors(batch, logged)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_policy_and_reference_run_the_same_kernels(tmp_path, model, precision, adapter):
    """Two kernels for one product round alike on some CPUs and not on others: equal results here say nothing
    about a margin of 0 there. An adapter adds operators of its own between those of the reference."""
    _, config, family, batches, _ = setting(tmp_path, model.folder)
    prepare_unet(family.unet, replace(config, adapter=AdapterConfig(type=adapter, rank=2)))
    policy = Logged(family.unet)
    held = LoggedReference(reference_of(family.unet, adapter, precision))

    def autocast():
        return torch.autocast("cpu", precision) if precision else contextlib.nullcontext()

    pair_errors(family, batches.train(1, [0, 1, 2]), policy, held, autocast)
    assert sum("mm" in name for name, *_ in held.kernels) > 20
    if adapter == "none":
        casts = [name for name, *_ in policy.kernels.seen].count("aten._to_copy.default")
        fewer = [name for name, *_ in held.kernels].count("aten._to_copy.default")
        assert without_casts(policy.kernels.seen) == without_casts(held.kernels)
        assert casts - fewer == (weights_of_products(family.unet) if precision else 0)  # cast once, before
    else:
        remaining = iter(policy.kernels.seen)
        assert [kernel for kernel in held.kernels if kernel not in remaining] == []  # in this order


def without_casts(kernels):
    return [kernel for kernel in kernels if kernel[0] != "aten._to_copy.default"]


def weights_of_products(unet):
    layers = [module for module in unet.modules() if type(module) in (nn.Linear, nn.Conv2d)]
    return sum(len(list(layer.parameters())) for layer in layers)


@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_weights_cast_once_give_the_errors_and_gradients_of_weights_cast_at_every_use(
    tmp_path, model, adapter
):
    """And take half of the memory, but for norms, and for what a DoRA divides by norms of."""

    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    found = []
    for half in (None, torch.bfloat16):
        _, config, family, batches, _ = setting(tmp_path, model.folder)
        prepare_unet(family.unet, replace(config, adapter=AdapterConfig(type=adapter, rank=2)))
        for name, parameter in family.unet.named_parameters():
            if "lora_B" in name:  # at zero an adapter would have no part in the errors
                parameter.data.fill_(0.01)
        held = reference_of(family.unet, adapter, half)
        errors = pair_errors(family, batches.train(1, [0, 1, 2]), family.unet, held, autocast)
        (errors.policy_w - 0.5 * errors.policy_l).sum().backward()
        gradients = {n: p.grad for n, p in family.unet.named_parameters() if p.grad is not None}
        found.append((errors, gradients))
        network = held.unet if adapter == "none" else family.unet
        if half is not None:
            assert all(p.dtype == torch.float32 for p in family.unet.parameters() if p.requires_grad)
            kept = {"none": 0, "lora": 0, "dora": 8}[adapter]  # SD miniatures have eight or more targets
            layers = [m for m in network.modules() if type(m) in (nn.Linear, nn.Conv2d)]
            fp32 = [m for m in layers if m.weight.dtype == torch.float32 and not m.weight.requires_grad]
            assert (len(fp32) >= kept) if kept else fp32 == []
            assert len(fp32) < len(layers) / 2
    (errors, gradients), (cast, cast_gradients) = found
    for name in ("policy_w", "policy_l", "ref_w", "ref_l"):
        assert torch.equal(getattr(errors, name), getattr(cast, name)), name
    assert gradients.keys() == cast_gradients.keys()
    assert all(torch.equal(gradients[name], cast_gradients[name]) for name in gradients)


def test_dropout_in_the_networks_is_off(tmp_path):
    _, config, family, batches, _ = setting(tmp_path, stable_diffusion(tmp_path / "model", dropout=0.3))
    prepare_unet(family.unet, config)
    errors = pair_errors(
        family, batches.train(1, [0, 1]), family.unet, FrozenCopy(family.unet), contextlib.nullcontext
    )
    assert torch.equal(errors.policy_w, errors.ref_w)


def draw(pipeline, **options):
    """What the weights draw. torch picks kernels by requires_grad, which loading sets and merging clears."""
    pipeline.unet.requires_grad_(False)
    return pipeline(
        "red", generator=torch.Generator().manual_seed(0), num_inference_steps=2, height=SIDE, width=SIDE,
        output_type="np", **options,
    ).images  # fmt: skip


def test_saved_pipeline_has_the_given_unet_and_draws_what_ours_draws(tmp_path, model):
    family = load_family(ModelConfig(base=str(model.folder)))
    with torch.no_grad():
        next(family.unet.parameters()).add_(0.1)
    family.save(family.unet, tmp_path / "saved")
    plain = DiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert type(plain) is type(model.plain)
    assert (draw(family.pipeline(family.unet)) == draw(plain)).all()
    assert abs(draw(plain) - draw(model.plain)).max() > 0


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_saved_adapters_act_as_trained_and_survive_a_round_trip(tmp_path, model, adapter):
    """load_lora_weights of the matching pipeline, then fused into the weights and back out again."""
    family = load_family(ModelConfig(base=str(model.folder)))
    config = TrainConfig(
        model=ModelConfig(base=str(model.folder)),
        data=DataConfig(pairs="none"),
        adapter=AdapterConfig(type=adapter, rank=3, alpha=12.0),
    )
    base = draw(family.pipeline(family.unet))
    prepare_unet(family.unet, config)
    with torch.no_grad():
        for name, parameter in family.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    trained = draw(family.pipeline(family.unet))
    family.save_lora(family.unet, tmp_path / "first")
    pipeline = DiffusionPipeline.from_pretrained(model.folder)
    pipeline.load_lora_weights(tmp_path / "first")
    loaded = draw(pipeline)
    assert abs(loaded - base).max() > 1e-3
    assert (loaded == trained).all()
    family.save_lora(pipeline.unet, tmp_path / "second", adapter=pipeline.get_active_adapters()[0])
    again = DiffusionPipeline.from_pretrained(model.folder)
    again.load_lora_weights(tmp_path / "second")
    assert (draw(again) == loaded).all()
    again.fuse_lora()
    again.unload_lora_weights()
    merged = draw(again)
    assert abs(merged - loaded).max() < 1e-4  # W x + B A x against (W + B A) x
    again.save_pretrained(tmp_path / "merged")
    assert (draw(DiffusionPipeline.from_pretrained(tmp_path / "merged")) == merged).all()


def test_fingerprints_know_values_not_places(tmp_path, model):
    family = load_family(ModelConfig(base=str(model.folder)))
    first = family.fingerprint()
    family.encode_prompts(["red"])
    family.release_text()
    family.codec.release()
    family.save(family.unet, tmp_path / "copy")
    assert load_family(ModelConfig(base=str(tmp_path / "copy"))).fingerprint() == first
    with torch.no_grad():
        next(family.unet.parameters()).add_(0.1)
    family.save(family.unet, tmp_path / "changed")
    changed = load_family(ModelConfig(base=str(tmp_path / "changed"))).fingerprint()
    assert {name for name in first if first[name] != changed[name]} == {"unet"}


def test_weights_stored_in_half_precision_are_trained_in_full(tmp_path, model):
    DiffusionPipeline.from_pretrained(model.folder, dtype=torch.float16).save_pretrained(tmp_path / "half")
    family = load_family(ModelConfig(base=str(tmp_path / "half")))
    texts = [family.text_encoder] if hasattr(family, "text_encoder") else family.text_encoders
    for module in (family.unet, family.codec.module, *texts):
        assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_captions_are_measured_before_they_are_cut(model):
    family = load_family(ModelConfig(base=str(model.folder)))
    lengths = family.caption_tokens(["", "red blue", "q . " * 100])
    assert lengths == [2, 4, 202]
    assert family.max_tokens == 77
    assert family.encode_prompts(["q . " * 100])["prompt_embeds"].shape[:2] == (1, 77)


def test_another_pipeline_class_is_refused_with_the_known_ones(tmp_path):
    folder = stable_diffusion(tmp_path / "model")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"StableDiffusionPipeline"', '"FluxPipeline"'))
    with pytest.raises(UserError, match=r"FluxPipeline(.|\n)*StableDiffusionPipeline"):
        load_family(ModelConfig(base=str(folder)))


def test_a_recipe_for_another_family_is_refused_before_anything_is_loaded(tmp_path):
    folder = stable_diffusion(tmp_path / "model")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(UserError, match=r'model.family is "sdxl", but .* is a StableDiffusionPipeline'):
        find_model(ModelConfig(base=str(folder), family="sdxl"))


def test_a_vae_of_other_latents_is_refused_and_one_of_the_same_is_used(tmp_path, model):
    """An SDXL VAE has SD's channels and another scale: its latents would train nonsense."""
    other = write_miniature(tmp_path / "other", "sd15" if model.is_xl else "sdxl")
    with pytest.raises(UserError, match="scaling factor"):
        load_family(ModelConfig(base=str(model.folder), vae=str(other)))
    same = write_miniature(tmp_path / "same", "sdxl", seed=3) if model.is_xl else None
    if same is not None:
        for place in (same, same / "vae"):  # a whole pipeline, or the VAE alone
            family = load_family(ModelConfig(base=str(model.folder), vae=str(place)))
            theirs = next(DiffusionPipeline.from_pretrained(same).vae.parameters())
            assert torch.equal(next(family.codec.module.parameters()), theirs)
