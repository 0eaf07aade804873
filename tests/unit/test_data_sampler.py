"""The order of pairs and their random numbers depend on (seed, step, pair) and on nothing else."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffpref.data.sampler import PairSampler, pair_generator
from diffpref.errors import UserError
from diffpref.seeds import pair_seed


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 60), batch=st.integers(1, 25), seed=st.integers(0, 2**32))
def test_every_pair_comes_once_an_epoch_and_none_is_left_out(n, batch, seed):
    sampler = PairSampler(n, batch, seed)
    drawn = torch.cat([sampler.indices(step) for step in range(-(-3 * n // batch))])
    for epoch in range(3):
        assert sorted(drawn[epoch * n : (epoch + 1) * n].tolist()) == list(range(n))


def test_a_batch_may_cross_an_epochs_end_and_exceed_the_table():
    batch = PairSampler(3, 7, seed=0).indices(0)
    assert batch.shape == (7,)
    assert batch.dtype == torch.int64
    assert sorted(batch[:3].tolist()) == sorted(batch[3:6].tolist()) == [0, 1, 2]


def test_steps_can_be_asked_for_in_any_order_and_again():
    forward = [PairSampler(50, 8, 1).indices(step).tolist() for step in range(20)]
    sampler = PairSampler(50, 8, 1)
    sampler.indices(3).zero_()  # a caller's change must not reach the sampler
    assert [sampler.indices(step).tolist() for step in reversed(range(20))] == forward[::-1]


def test_seeds_and_epochs_give_other_orders():
    first = PairSampler(100, 100, 0)
    assert first.indices(0).tolist() != first.indices(1).tolist()
    assert first.indices(0).tolist() != PairSampler(100, 100, 1).indices(0).tolist()


def test_epoch_counts_pairs_seen():
    assert [PairSampler(10, 4, 0).epoch(step) for step in (0, 5)] == [0.0, 2.0]


def test_global_random_state_is_neither_used_nor_changed():
    state = torch.get_rng_state()
    first = PairSampler(1000, 10, 7).indices(0)
    torch.manual_seed(99)
    assert torch.equal(first, PairSampler(1000, 10, 7).indices(0))
    torch.set_rng_state(state)
    pair_generator(0, "noise", 0, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_no_pairs_is_the_users_error_and_a_negative_step_ours():
    with pytest.raises(UserError, match="no pairs"):
        PairSampler(0, 4, 0)
    with pytest.raises(UserError, match="batch_size"):
        PairSampler(4, 0, 0)
    with pytest.raises(ValueError, match="step"):
        PairSampler(4, 4, 0).indices(-1)


def test_pair_seeds_are_the_same_in_every_process():
    program = "from diffpref.seeds import pair_seed; print(pair_seed(1, 'noise', 2, 3))"
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(other.stdout) == pair_seed(1, "noise", 2, 3)
    assert 0 <= pair_seed(1, "noise", 2, 3) < 2**64


def test_changing_any_part_changes_the_numbers():
    parts = [
        (0, "noise", 0, 0),
        (1, "noise", 0, 0),
        (0, "latent", 0, 0),
        (0, "noise", 1, 0),
        (0, "noise", 0, 1),
    ]
    draws = [tuple(torch.randn(4, generator=pair_generator(*part)).tolist()) for part in parts]
    assert len(set(draws)) == len(parts)
    assert pair_seed(0, "noise", 1, 11) != pair_seed(0, "noise", 11, 1)


def test_seeds_of_a_large_run_differ_in_the_bits_that_torch_uses():
    """torch's CPU generator takes the low 32 bits: of 2,000 seeds hardly two may agree in them."""
    low = {pair_seed(0, "noise", step, pair) % 2**32 for step in range(20) for pair in range(100)}
    assert len(low) >= 1999


def test_noise_is_standard_normal_and_uncorrelated_between_pairs():
    noise = torch.stack([torch.randn(256, generator=pair_generator(0, "noise", 5, i)) for i in range(400)])
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std().item() - 1) < 0.01
    neighbours = (noise[1:] * noise[:-1]).mean().item()
    assert abs(neighbours) < 4 / noise.numel() ** 0.5
