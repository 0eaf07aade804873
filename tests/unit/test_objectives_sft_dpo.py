"""SFT and Diffusion-DPO: numbers by hand, and the traps that public trainers fell into."""

from __future__ import annotations

import math

import pytest
import torch

from diffpref.errors import UserError
from diffpref.objectives import DPO, SFT, PairErrors


def errors(policy_w, policy_l, ref_w=None, ref_l=None) -> PairErrors:
    tensors = [None if x is None else torch.tensor(x) for x in (policy_w, policy_l, ref_w, ref_l)]
    return PairErrors(*tensors)


def test_sft_loss_is_the_winners_error_alone():
    out = SFT()(errors([0.3, 0.1], [0.2, 0.9]))
    assert out.loss.tolist() == pytest.approx([0.3, 0.1])
    assert set(out.metrics) == {"winner_error", "loser_error"}


def test_sft_reports_the_margin_when_a_reference_is_there():
    out = SFT()(errors([0.3], [0.2], [0.4], [0.25]))
    assert out.metrics["winner_gain"].item() == pytest.approx(0.1)
    assert out.metrics["loser_gain"].item() == pytest.approx(0.05)
    assert out.metrics["margin"].item() == pytest.approx(0.05)
    assert out.metrics["implicit_accuracy"].item() == 1


def test_dpo_by_hand_with_beta_halved():
    # h = (0.5 - 0.4) - (0.5 - 0.55) = 0.15; m = 10 / 2 * 0.15 = 0.75; -log sigmoid(0.75) = log(1 + e^-0.75)
    out = DPO(beta=10)(errors([0.4], [0.55], [0.5], [0.5]))
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(-0.75)), rel=1e-6)
    assert out.metrics["margin"].item() == pytest.approx(0.15, rel=1e-5)
    assert out.metrics["winner_gain"].item() == pytest.approx(0.10, rel=1e-5)
    assert out.metrics["loser_gain"].item() == pytest.approx(-0.05, rel=1e-5)
    assert out.metrics["saturation"].item() == pytest.approx(1 - 1 / (1 + math.exp(-0.75)), rel=1e-5)


def test_dpo_gradient_is_half_beta_times_saturation():
    w, loser = torch.tensor([0.4], requires_grad=True), torch.tensor([0.55], requires_grad=True)
    out = DPO(beta=10)(PairErrors(w, loser, torch.tensor([0.5]), torch.tensor([0.5])))
    out.loss.sum().backward()
    expected = 5 * (1 - 1 / (1 + math.exp(-0.75)))
    assert w.grad.item() == pytest.approx(expected, rel=1e-5)
    assert loser.grad.item() == pytest.approx(-expected, rel=1e-5)


def test_dpo_starts_at_margin_exactly_zero_and_log_2():
    w, loser = torch.rand(64), torch.rand(64)
    out = DPO(beta=5000)(PairErrors(w, loser, w.clone(), loser.clone()))
    assert (out.metrics["margin"] == 0).all()
    assert (out.metrics["implicit_accuracy"] == 0.5).all()
    assert (out.metrics["saturation"] == 0.5).all()
    assert torch.equal(out.loss, torch.full((64,), math.log(2)))


def test_dpo_takes_logsigmoid_before_the_mean():
    # Margins of +-0.1 cancel in their mean, which would give log 2; the mean of the losses is larger.
    out = DPO(beta=40)(errors([0.4, 0.6], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]))
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(2))) / 2
    assert out.loss.shape == (2,)
    assert out.loss.mean().item() == pytest.approx(expected, rel=1e-5)


def test_dpo_stays_finite_at_absurd_margins():
    w = torch.tensor([0.0, 1e4], requires_grad=True)
    loser = torch.tensor([1e4, 0.0], requires_grad=True)
    out = DPO(beta=5000)(PairErrors(w, loser, torch.zeros(2), torch.zeros(2)))
    out.loss.sum().backward()
    assert out.loss.isfinite().all()
    assert w.grad.isfinite().all()
    assert w.grad.tolist() == pytest.approx([0, 2500])


def test_dpo_without_a_reference_says_so():
    with pytest.raises(ValueError, match="ref_w"):
        DPO()(errors([0.1], [0.2]))


def test_reference_gets_no_gradient():
    ref = torch.tensor([0.5], requires_grad=True)
    w = torch.tensor([0.4], requires_grad=True)
    DPO()(PairErrors(w, torch.tensor([0.5]), ref, torch.tensor([0.5]))).loss.sum().backward()
    assert ref.grad is None
    assert w.grad is not None


@pytest.mark.parametrize("beta", [0, -1.0, math.nan, math.inf, True, "2000"])
def test_a_bad_beta_is_named(beta):
    with pytest.raises(UserError, match=r"objective\.beta"):
        DPO(beta=beta)


def test_accuracy_counts_ties_one_half():
    out = DPO(beta=1)(errors([0.5, 0.25, 0.75], [0.5, 0.5, 0.5], [0.5] * 3, [0.5] * 3))
    assert out.metrics["implicit_accuracy"].tolist() == [0.5, 1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_errors_of_another_precision_are_refused(dtype):
    with pytest.raises(ValueError, match="float32"):
        PairErrors(torch.zeros(2, dtype=dtype), torch.zeros(2, dtype=dtype))


@pytest.mark.parametrize("shapes", [((), ()), ((2, 1), (2, 1)), ((2,), (3,)), ((2, 4, 8, 8), (2, 4, 8, 8))])
def test_errors_of_another_shape_are_refused(shapes):
    with pytest.raises(ValueError, match="shape"):
        PairErrors(*(torch.zeros(shape) for shape in shapes))


def test_half_a_reference_is_refused():
    with pytest.raises(ValueError, match="both"):
        PairErrors(torch.zeros(2), torch.zeros(2), torch.zeros(2), None)
