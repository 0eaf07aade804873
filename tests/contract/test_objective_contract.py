"""What every objective keeps. New members of OBJECTIVES are tested as they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from diffpref.objectives import OBJECTIVES, MaPO, ObjectiveOutput, PairErrors

B = 6
VARIANTS = [pytest.param(kind(), id=name) for name, kind in OBJECTIVES.items()]
VARIANTS.append(pytest.param(MaPO(form="code"), id="mapo-code"))

every_objective = pytest.mark.parametrize("objective", VARIANTS)


def make_errors(seed: int = 0, reference: bool = True, size: int = B) -> PairErrors:
    """Errors of the usual size (about 0.1) and, for the reference, close to the policy's."""
    generator = torch.Generator().manual_seed(seed)
    w = (0.05 + 0.2 * torch.rand(size, generator=generator)).requires_grad_()
    loser = (0.05 + 0.2 * torch.rand(size, generator=generator)).requires_grad_()
    if not reference:
        return PairErrors(w, loser)
    shift = 1e-3 * torch.randn(2, size, generator=generator)
    return PairErrors(w, loser, w.detach() + shift[0], loser.detach() + shift[1])


def reindexed(errors: PairErrors, index: torch.Tensor) -> PairErrors:
    tensors = (errors.policy_w, errors.policy_l, errors.ref_w, errors.ref_l)
    return PairErrors(*(values[index] for values in tensors))


@every_objective
def test_is_a_frozen_dataclass_that_declares_its_need_of_a_reference(objective):
    assert dataclasses.is_dataclass(objective)
    assert type(objective).__dataclass_params__.frozen
    assert isinstance(type(objective).needs_reference, bool)
    assert "needs_reference" not in {field.name for field in dataclasses.fields(objective)}


@every_objective
def test_loss_and_metrics_are_float32_per_pair_and_metrics_are_detached(objective):
    out = objective(make_errors())
    assert isinstance(out, ObjectiveOutput)
    assert out.loss.shape == (B,)
    assert out.loss.dtype == torch.float32
    assert out.loss.requires_grad
    for name, values in out.metrics.items():
        assert values.shape == (B,), name
        assert values.dtype == torch.float32, name
        assert not values.requires_grad, name
        assert values.isfinite().all(), name


@every_objective
def test_common_metrics_are_there_with_a_reference(objective):
    metrics = objective(make_errors()).metrics
    expected = {"winner_error", "loser_error", "winner_gain", "loser_gain", "margin", "implicit_accuracy"}
    assert expected <= set(metrics)
    assert torch.equal(metrics["margin"], metrics["winner_gain"] - metrics["loser_gain"])


@every_objective
def test_a_missing_reference_is_fine_or_an_error_as_declared(objective):
    errors = make_errors(reference=False)
    if objective.needs_reference:
        with pytest.raises(ValueError, match="reference"):
            objective(errors)
    else:
        metrics = objective(errors).metrics
        assert not {"winner_gain", "loser_gain", "margin"} & set(metrics)


@every_objective
def test_a_reference_changes_no_loss_of_an_objective_that_needs_none(objective):
    if not objective.needs_reference:
        errors = make_errors()
        alone = objective(PairErrors(errors.policy_w, errors.policy_l))
        assert torch.equal(objective(errors).loss, alone.loss)


@every_objective
def test_autocast_does_not_lower_the_precision(objective):
    errors = make_errors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective(errors)
    assert inside.loss.dtype == torch.float32
    assert torch.equal(inside.loss, objective(errors).loss)


@every_objective
def test_each_pair_is_independent_of_its_batch_mates(objective):
    errors = make_errors()
    together = objective(errors)
    for i in range(B):
        alone = objective(reindexed(errors, torch.tensor([i])))
        torch.testing.assert_close(alone.loss[0], together.loss[i], rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(together.loss[2], errors.policy_w)
    assert (grad != 0).nonzero().flatten().tolist() == [2]


@every_objective
def test_a_permuted_batch_gives_permuted_losses_and_metrics(objective):
    errors, order = make_errors(), torch.tensor([3, 0, 5, 1, 4, 2])
    straight, permuted = objective(errors), objective(reindexed(errors, order))
    torch.testing.assert_close(permuted.loss, straight.loss[order], rtol=1e-6, atol=0)
    for name, values in permuted.metrics.items():
        torch.testing.assert_close(values, straight.metrics[name][order], rtol=1e-6, atol=1e-9)


@every_objective
def test_better_winners_and_worse_losers_never_raise_the_loss(objective):
    """Signs by finite differences, which do not trust autograd."""
    errors, step = make_errors(), 2e-3
    base = objective(errors).loss
    better = dataclasses.replace(errors, policy_w=errors.policy_w - step)
    worse = dataclasses.replace(errors, policy_l=errors.policy_l + step)
    assert (objective(better).loss < base).all()
    assert (objective(worse).loss <= base).all()


@every_objective
def test_gradients_agree_with_finite_differences(objective):
    errors, step = make_errors(), 1e-3
    base = objective(errors)
    slopes = torch.autograd.grad(base.loss.sum(), (errors.policy_w, errors.policy_l), allow_unused=True)
    for name, slope in zip(("policy_w", "policy_l"), slopes, strict=True):
        values = getattr(errors, name)
        up = objective(dataclasses.replace(errors, **{name: values + step})).loss
        down = objective(dataclasses.replace(errors, **{name: values - step})).loss
        difference = (up - down) / (2 * step)
        exact = torch.zeros(B) if slope is None else slope
        torch.testing.assert_close(exact, difference, rtol=0.1, atol=2e-3)


@every_objective
def test_training_on_free_errors_prefers_the_winner(objective):
    """A few hundred steps on the errors themselves: the winner's ends below the loser's."""
    w, loser = torch.full((4,), 0.2, requires_grad=True), torch.full((4,), 0.2, requires_grad=True)
    optimizer = torch.optim.SGD([w, loser], lr=1e-4)
    for _ in range(300):
        out = objective(PairErrors(w, loser, torch.full((4,), 0.2), torch.full((4,), 0.2)))
        optimizer.zero_grad()
        out.loss.mean().backward()
        optimizer.step()
    assert (w < loser).all()
    assert (w < 0.2).all()
