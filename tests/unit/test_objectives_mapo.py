"""MaPO: both published forms by hand, and phi where the plain expression fails in fp32."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffpref.errors import UserError
from diffpref.objectives import MaPO, PairErrors
from diffpref.objectives.mapo import log_phi

DEMANDING = [0.0, 1e-12, 1e-3, 0.3, 0.4999, 0.5, 1.0, 10.0, 88.0, 1e3]


def phi(x: float) -> float:
    """x / (e^x - 1) in double precision."""
    return 1.0 if x == 0 else x * math.exp(-x) / -math.expm1(-x)


def run(form: str, w: float, loser: float, **parameters):
    pair = torch.tensor([w], requires_grad=True), torch.tensor([loser], requires_grad=True)
    out = MaPO(form=form, **parameters)(PairErrors(*pair))
    out.loss.sum().backward()
    return out, pair[0].grad.item(), pair[1].grad.item()


def test_phi_is_right_everywhere_and_its_slope_at_zero_is_minus_one_half():
    x = torch.tensor(DEMANDING, requires_grad=True)
    value = log_phi(x).exp()
    value.sum().backward()
    # 1e-6 of the value, and at phi = e^-84 the rounding of the exponent itself
    assert value.tolist() == pytest.approx([phi(v) for v in DEMANDING], rel=1e-5, abs=1e-37)
    slopes = x.grad.tolist()
    assert slopes[:2] == [-0.5, -0.5]
    for v, slope in zip(DEMANDING[2:], slopes[2:], strict=True):
        # (e^x - 1 - x e^x) / (e^x - 1)^2, multiplied through by e^-2x (eq. 14 of the preprint prints another
        # numerator). Near 0 its digits cancel in double precision: the series -1/2 + x/6 serves there.
        exact = math.exp(-v) * (1 - math.exp(-v) - v) / math.expm1(-v) ** 2 if v > 0.01 else -0.5 + v / 6
        assert slope == pytest.approx(exact, rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("form", ["paper", "code"])
@pytest.mark.parametrize("w", DEMANDING)
@pytest.mark.parametrize("loser", DEMANDING)
def test_loss_and_gradients_are_finite_at_any_error(form, w, loser):
    out, grad_w, grad_l = run(form, w, loser)
    assert out.loss.isfinite().all()
    assert math.isfinite(grad_w)
    assert math.isfinite(grad_l)


def test_paper_form_by_hand():
    # phi(0.1)^8 = 0.9508332^8 = 0.6680896, phi(0.2)^8 = 0.9033311^8 = 0.4433796
    # logit 0.2247099, -log sigmoid = 0.5870908; loss = 0.1 + 0.5870908 / 8
    out, _, _ = run("paper", 0.1, 0.2, beta=8)
    assert out.loss.item() == pytest.approx(0.1733864, rel=1e-6)
    logit = phi(0.1) ** 8 - phi(0.2) ** 8
    assert out.metrics["saturation"].item() == pytest.approx(1 / (1 + math.exp(logit)), rel=1e-6)


def test_code_form_by_hand():
    # phi(0.05) - phi(0.055) = 0.97520832 - 0.97275207 = 0.00245625; times 1000 = 2.45625
    # -log sigmoid(2.45625) = 0.08227614; loss = 0.1 + 0.1 * 0.08227614
    out, _, _ = run("code", 0.1, 0.11)
    assert out.loss.item() == pytest.approx(0.1082276, rel=1e-6)
    assert MaPO(form="code") == MaPO(form="code", beta=0.1, scale=0.5, timesteps=1000)


def test_the_default_is_the_papers_form_with_beta_8():
    assert MaPO() == MaPO(form="paper", beta=8.0)


def test_code_form_keeps_its_digits_near_zero():
    # At 1e-4 the plain fp32 expression is off by about 12 in the logit.
    out, _, _ = run("code", 1e-4, 3e-4)
    logit = 1000 * (phi(0.5e-4) - phi(1.5e-4))
    assert out.metrics["saturation"].item() == pytest.approx(1 / (1 + math.exp(logit)), rel=1e-5)


def test_larger_beta_of_the_paper_form_means_less_margin_and_more_fine_tuning():
    pulls = [-run("paper", 0.2, 0.2, beta=beta)[2] for beta in (1, 8, 64)]
    assert pulls[0] > pulls[1] > pulls[2] > 0


@given(w=st.floats(0, 100, width=32), loser=st.floats(0, 100, width=32), beta=st.floats(1, 1024))
def test_paper_form_never_trades_the_winner_for_the_margin(w, loser, beta):
    _, grad_w, grad_l = run("paper", w, loser, beta=beta)
    assert grad_w >= 1 - 1e-6
    assert -0.5 - 1e-6 <= grad_l <= 0


@pytest.mark.parametrize("form", ["paper", "code"])
def test_own_accuracy_without_a_reference_and_the_margins_with_one(form):
    w, loser = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.2, 0.2, 0.2])
    alone = MaPO(form=form)(PairErrors(w, loser)).metrics
    assert alone["implicit_accuracy"].tolist() == [1.0, 0.5, 0.0]
    assert "margin" not in alone
    beside = MaPO(form=form)(PairErrors(w, loser, torch.full((3,), 0.05), torch.full((3,), 0.5))).metrics
    assert beside["margin"].tolist() == pytest.approx([-0.35, -0.45, -0.55])
    assert beside["implicit_accuracy"].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"form": "release"}, "form"),
        ({"beta": 0.0}, "beta"),
        ({"beta": math.nan}, "beta"),
        ({"form": "code", "scale": -0.5}, "scale"),
        ({"form": "code", "timesteps": 0}, "timesteps"),
        ({"form": "paper", "scale": 0.5}, "scale"),
        ({"timesteps": 1000}, "timesteps"),
    ],
)
def test_a_bad_parameter_or_one_without_effect_is_named(parameters, named):
    with pytest.raises(UserError, match=rf"objective\.{named}"):
        MaPO(**parameters)


def test_resolved_parameters_make_the_same_objective():
    for form in ("paper", "code"):
        made = MaPO(form=form)
        assert MaPO(**dataclasses.asdict(made)) == made
