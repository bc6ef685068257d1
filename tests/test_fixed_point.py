"""Windows of steps solved at once, against the steps one after another."""

from __future__ import annotations

import pytest
import torch

from diffusers_ext.pipelines._fixed_point import RULES, FixedPointWindow


def chain(length, dtype=torch.float64, step=0.1):
    """Nonlinear contracting and rotating maps of three pictures of five numbers."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(length, 5, 5, generator=generator, dtype=torch.float64).to(dtype) / 5**0.5

    def apply(j, x):
        return x + step * torch.tanh(x @ weights[j])

    return apply, torch.randn(3, 5, generator=generator, dtype=torch.float64).to(dtype)


def sequence(apply, x, length):
    states = [x]
    for j in range(length):
        states.append(apply(j, states[-1]))
    return torch.stack(states)


def solve(apply, x, length, parallel, tolerance=0.0, variances=None, rule="picard"):
    """`(states after each step, number of rounds, begin after each round)`."""
    variances = torch.ones(length) if variances is None else variances
    window, done, begins = FixedPointWindow(x, length, parallel, tolerance, variances, rule), [], []
    while window.begin < length:
        steps = range(window.begin, window.end)
        assert len(window.states) == len(steps) + 1
        done.append(window.advance(torch.stack([apply(j, window.states[j - steps[0]]) for j in steps])))
        begins.append(window.begin)
    assert window.begin == window.end == length and window.rounds == len(done)
    return torch.cat(done), window.rounds, begins


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("parallel", [1, 2, 7, 20, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_at_tolerance_0_every_state_is_that_of_the_sequence_bit_by_bit(rule, parallel, dtype):
    apply, x = chain(20, dtype)
    states, rounds, _ = solve(apply, x, 20, parallel, rule=rule)
    assert torch.equal(states, sequence(apply, x, 20)[1:])
    assert rounds <= 20
    assert rounds == 20 if parallel == 1 else True


def test_a_round_is_the_sum_of_the_steps_since_the_window_began():
    apply, x = chain(6)
    window = FixedPointWindow(x, 6, 4, 0.0, torch.ones(6))
    guesses = window.states.clone()
    assert torch.equal(guesses, x.expand(5, 3, 5))
    for _ in range(2):
        old = window.states
        results = torch.stack([apply(window.begin + i, old[i]) for i in range(window.end - window.begin)])
        expected = old[0] + (results - old[:-1]).cumsum(0)
        begin, done = window.begin, window.advance(results)
        corrected = torch.cat([done, window.states[1 : 1 + len(results) - len(done)]])
        torch.testing.assert_close(corrected, expected, rtol=0, atol=1e-14)
        assert window.begin == begin + len(done)


def test_picard_needs_fewer_rounds_than_jacobi_on_small_steps():
    apply, x = chain(40, step=0.02)
    rounds = {rule: solve(apply, x, 40, 10, 1e-3, rule=rule)[1] for rule in RULES}
    assert rounds["picard"] < rounds["jacobi"] <= 40


def test_steps_that_ignore_their_state_take_one_round_more_than_windows():
    """By jacobi: results are right in the first round, and the guesses are found so in the second."""
    apply, x = (lambda j, x: torch.full_like(x, float(j))), torch.zeros(2, 3)
    states, rounds, _ = solve(apply, x, 8, 8, rule="jacobi")
    assert rounds == 2 and states[:, 0, 0].tolist() == list(range(8))


def test_a_state_passes_where_its_mean_square_change_is_within_the_bound_in_every_sample():
    window = FixedPointWindow(torch.zeros(2, 4), 5, 4, 0.5, torch.tensor([9.0, 1.0, 4.0, 1.0, 9.0]), rule="jacobi")
    results = torch.zeros(4, 2, 4)
    results[0, 1] = 0.5  # mean square 0.25 at state 1: exactly its bound
    results[1, 0] = 0.9  # 0.81 at state 2, of 1
    results[2, 1, 0] = 1.1  # 0.3 at state 3, of 0.25
    done = window.advance(results)
    assert window.begin == 3 and torch.equal(done, results[:3])
    assert torch.equal(window.states, torch.stack([results[2], results[3], results[3]]))


def test_the_first_step_counts_whatever_its_change_and_the_last_state_never_does():
    window = FixedPointWindow(torch.zeros(1, 1), 9, 3, 0.0, torch.zeros(9), rule="jacobi")
    window.advance(torch.tensor([[[7.0]], [[0.0]], [[0.0]]]))
    assert window.begin == 1
    window.states = torch.tensor([[[7.0]], [[0.0]], [[0.0]], [[5.0]]])
    window.advance(torch.tensor([[[0.0]], [[0.0]], [[8.0]]]))
    assert window.begin == 4 and window.states.flatten().tolist() == [8.0] * 4


def test_what_is_not_finite_passes_one_state_a_round():
    apply, x = (lambda j, x: x * float("nan")), torch.zeros(1, 2)
    assert solve(apply, x, 5, 3, 1.0)[1] == 5


def test_restart_goes_on_from_another_state():
    apply, x = chain(10)
    window = FixedPointWindow(x, 10, 5, 1e9, torch.ones(10))
    window.advance(torch.stack([apply(j, window.states[j]) for j in range(5)]))
    assert window.begin == 5
    window.restart(3, x)
    assert window.begin == 3 and window.end == 8 and torch.equal(window.states, x.expand(6, 3, 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0, "variances": torch.ones(0)}, "`length` is 0"),
        ({"parallel": 0}, "`parallel` is 0"),
        ({"tolerance": -0.1}, "`tolerance` is -0.1"),
        ({"tolerance": float("nan")}, "`tolerance` is nan"),
        ({"variances": torch.ones(3)}, "`variances` has the shape"),
        ({"rule": "newton"}, "`rule` is 'newton'; allowed are picard, jacobi"),
    ],
)
def test_bad_arguments(changes, message):
    given = {"length": 4, "parallel": 2, "tolerance": 0.1, "variances": torch.ones(4), **changes}
    with pytest.raises(ValueError, match=message):
        FixedPointWindow(torch.zeros(1, 2), **given)


def test_results_must_be_those_of_the_window():
    with pytest.raises(ValueError, match="`results` has 2 states; the window has 3 steps"):
        FixedPointWindow(torch.zeros(1, 2), 4, 3, 0.1, torch.ones(4)).advance(torch.zeros(2, 1, 2))
