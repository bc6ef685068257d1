r"""A sequence of steps as one system of equations, solved for a window of them at a time.

A sampler computes :math:`x_{j+1} = f_j(x_j)` for j = 0, 1, ... one after another. Here all :math:`f_j` of a window are
evaluated at once, at guesses of their states, and the guesses are corrected by what came out, until they stop changing.
Since each round settles at least the first step of the window, the result is that of the sequence after at most as many
rounds as there are steps, whatever the guesses were.
"""

from __future__ import annotations

import torch

RULES = ("picard", "jacobi")


class FixedPointWindow:
    r"""A window [b, e) that moves along a sequence of states.

    Each round, the caller evaluates :math:`y_j = f_j(x_j)` at `states[:-1]`, that is for j = b to e - 1, and hands the
    results to `advance`, which

    - corrects the guesses. "jacobi": :math:`x_{j+1} \leftarrow y_j`. "picard": :math:`x_{j+1} \leftarrow x_b +
      \sum_{i=b}^{j} (y_i - x_i)`, which passes changes of early states on to all later ones at once, and suits steps that are
      small;
    - moves b to the first state that is no step's result yet: past the first, and past each further one whose mean square
      change is at most `tolerance**2 * variances[j]` in every sample of the batch;
    - opens new places at the end, with the last state as the guess.

    The sums are arranged so that a step whose state did not change gives its result as it is, bit by bit: at tolerance 0 the
    states are those of the sequence, up to what evaluating several at once changes in `f`.

    Args:
        start: x_0, `(batch, ...)`.
        length: number of steps.
        parallel: largest number of steps in the window.
        tolerance: 0 lets only states through that did not change at all.
        variances: `(length,)`; scale of the change at each state, such as the variance of the noise there.
        rule: "picard" or "jacobi".

    Attributes:
        states: x_b to x_e, `(e - b + 1, batch, ...)`; the first is final.
        begin: b; all steps before it are done.
        rounds: how often `advance` was called.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        start: torch.Tensor,
        length: int,
        parallel: int,
        tolerance: float,
        variances: torch.Tensor,
        rule: str = "picard",
    ) -> None:
        if length < 1:
            raise ValueError(f"`length` is {length!r}; at least one step is needed.")
        if parallel < 1:
            raise ValueError(f"`parallel` is {parallel!r}; at least one step must be in the window.")
        if not 0 <= tolerance < float("inf"):
            raise ValueError(f"`tolerance` is {tolerance!r}; it must be 0 or a positive number.")
        if tuple(variances.shape) != (length,):
            raise ValueError(f"`variances` has the shape {tuple(variances.shape)}; `length` is {length}.")
        if rule not in RULES:
            raise ValueError(f"`rule` is {rule!r}; allowed are {', '.join(RULES)}.")
        self.length, self.parallel, self.rule = length, parallel, rule
        self.bounds = tolerance**2 * variances
        self.rounds = 0
        self.restart(0, start)

    @property
    def end(self) -> int:
        """e; `begin` where all is done."""
        return min(self.begin + self.parallel, self.length)

    def restart(self, begin: int, state: torch.Tensor) -> None:
        """Go on from the state at `begin`, which is also the guess of those after it."""
        self.begin = begin
        self.states = self._extended(state[None])

    def advance(self, results: torch.Tensor) -> torch.Tensor:
        """Take the results of the window's steps, and move it.

        Args:
            results: y_b to y_{e-1}, `(e - b, batch, ...)`.

        Returns:
            The states after the steps that are done now, `(number of steps, batch, ...)`.

        Raises:
            ValueError: they are not as many as the window has steps.
        """
        if len(results) != self.end - self.begin:
            raise ValueError(f"`results` has {len(results)} states; the window has {self.end - self.begin} steps.")
        guesses = self.states[1:]
        wide = torch.promote_types(results.dtype, torch.float32)
        new = results
        if self.rule == "picard" and len(results) > 1:
            drift = (results[:-1].to(wide) - guesses[:-1].to(wide)).cumsum(0)
            new = torch.cat([results[:1], (results[1:].to(wide) + drift).to(results.dtype)])
        # The last state of the window is the input of no step yet, so that its change says nothing.
        change = (new[:-1].to(wide) - guesses[:-1].to(wide)).flatten(2).square().mean(2).amax(1)
        settled = change <= self.bounds[self.begin + 1 : self.end].to(change)
        done = 1 + int(settled.long().cumprod(0).sum())
        self.begin += done
        self.rounds += 1
        self.states = self._extended(new[done - 1 :])
        return new[:done]

    def _extended(self, states: torch.Tensor) -> torch.Tensor:
        missing = self.end - self.begin + 1 - len(states)
        return torch.cat([states, states[-1:].expand(missing, *states.shape[1:])]) if missing > 0 else states
