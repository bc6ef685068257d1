r"""A small language with all its probabilities, and the exact masked language model of it.

The strings have one length L over a small vocabulary, and their probability is that of a deterministic weighted
automaton, :math:`p(x) \propto \prod_i w(s_i, x_i)\, f(s_L)` with :math:`s_{i+1} = \delta(s_i, x_i)`. What a masked
diffusion model has to learn, :math:`p(x_i | \text{unmasked tokens})` for any set of masks (Sahoo et al. 2024, arXiv
2406.07524; Ou et al. 2024, arXiv 2406.03736, theorem 1), is then known by the forward-backward algorithm (Rabiner 1989),
without a sum over strings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

MAX_STRINGS = 2**20


class EnumerableLanguage:
    """Strings of one length with a known distribution.

        language = EnumerableLanguage.brackets(length=8)
        language.log_prob(language.encode(["(a[b])ab"]))

    Args:
        transitions: weights `(states, symbols, states)`, not negative; state s reading symbol v goes to the one state
            with a positive entry, and cannot read v where there is none.
        final: weights `(states,)` of ending in a state; zero where a string must not end.
        length: number of tokens of every string.
        initial: the state before the first token.
        symbols: one character a symbol, to print strings; None for letters from `a`.

    Attributes:
        num_symbols: size V of the vocabulary; tokens are 0 to V - 1.
        mask_token_id: V, the token after them.

    Raises:
        ValueError: shapes do not fit, a weight is negative, a state and a symbol lead to two states, or no string has
            a positive weight.
    """

    def __init__(
        self,
        transitions: torch.Tensor,
        final: torch.Tensor,
        length: int,
        initial: int = 0,
        symbols: str | None = None,
    ) -> None:
        transitions, final = torch.as_tensor(transitions).double(), torch.as_tensor(final).double()
        if transitions.ndim != 3 or transitions.shape[0] != transitions.shape[2] or not transitions.numel():
            raise ValueError(
                f"`transitions` has shape {tuple(transitions.shape)}; it must be (states, symbols, states)."
            )
        states, size, _ = transitions.shape
        if final.shape != (states,):
            raise ValueError(f"`final` has shape {tuple(final.shape)}; it must be ({states},).")
        for name, value in (("transitions", transitions), ("final", final)):
            if not bool(((value >= 0) & torch.isfinite(value)).all()):
                raise ValueError(f"`{name}` has the weight {float(value.min()):g}; weights are finite, none negative.")
        if int((transitions > 0).sum(2).max()) > 1:
            raise ValueError("`transitions` leads from one state with one symbol to two states; one is allowed.")
        if length < 1 or size**length >= 2**62:
            raise ValueError(
                f"`length` is {length!r} for {size} symbols; it must be positive, with {size}^length < 2^62."
            )
        if not 0 <= initial < states:
            raise ValueError(f"`initial` is {initial!r}; allowed are 0 to {states - 1}.")
        symbols = "".join(chr(ord("a") + index) for index in range(size)) if symbols is None else symbols
        if len(symbols) != size or len(set(symbols)) != size or "_" in symbols:
            raise ValueError(f"`symbols` is {symbols!r}; it must be {size} different characters, none of them '_'.")
        self.transitions, self.final, self.length, self.initial, self.symbols = (
            transitions,
            final,
            length,
            initial,
            symbols,
        )
        self.num_symbols, self.mask_token_id = size, size
        weight, self._next = transitions.max(2)
        self._log_weight = torch.log(weight)  # (S, V); -inf where a symbol cannot be read
        self._edges = transitions.permute(1, 0, 2).reshape(size, states * states)
        self._possible = (transitions > 0).any(1)  # (S, S)
        self._to_end = self._backward(torch.log(transitions.sum(1)).expand(1, length, -1, -1))[:, 0]  # (L + 1, S)
        self._log_total = float(self._to_end[0, initial])
        if self._log_total == -math.inf:
            raise ValueError(f"`transitions` and `final` allow no string of length {length}.")

    # --- languages ---------------------------------------------------------------------------------------------------

    @classmethod
    def markov(cls, start: torch.Tensor, step: torch.Tensor, length: int) -> EnumerableLanguage:
        """A Markov chain: `start` `(V,)` are the weights of the first token, `step[u, v]` those of v after u."""
        start, step = torch.as_tensor(start).double(), torch.as_tensor(step).double()
        size = len(start)
        if start.ndim != 1 or step.shape != (size, size):
            raise ValueError(
                f"`start` has shape {tuple(start.shape)} and `step` {tuple(step.shape)}; they must be (V,) and (V, V)."
            )
        transitions = torch.zeros(size + 1, size, size + 1, dtype=torch.float64)
        read = torch.arange(size)
        transitions[0, read, read + 1] = start
        transitions[1:, read, read + 1] = step
        return cls(transitions, torch.ones(size + 1), length)

    @classmethod
    def brackets(cls, length: int = 8, depth: int = 2, letters: int = 4) -> EnumerableLanguage:
        """Letters between round and square brackets that must close in order: tokens far apart decide one another.

        Which letter is likely depends on the innermost bracket; a letter is as likely as an opening and a closing one
        together. A bracket can be empty.

        Args:
            length: of the strings.
            depth: how deep brackets nest, 1 to 3.
            letters: how many letters there are beside the four brackets, 1 to 12.
        """
        if not 1 <= depth <= 3:
            raise ValueError(f"`depth` is {depth!r}; allowed are 1 to 3.")
        if not 1 <= letters <= 12:
            raise ValueError(f"`letters` is {letters!r}; allowed are 1 to 12.")
        stacks = [""]
        for stack in stacks:
            if len(stack) < depth:
                stacks += [stack + "(", stack + "["]
        transitions = torch.zeros(len(stacks), 4 + letters, len(stacks), dtype=torch.float64)
        share = 0.7 ** torch.arange(letters, dtype=torch.float64)
        share = share / share.sum()
        for state, stack in enumerate(stacks):
            for symbol, bracket in enumerate("(["):
                if len(stack) < depth:
                    transitions[state, symbol, stacks.index(stack + bracket)] = (0.3, 0.2)[symbol]
            if stack:
                transitions[state, 2 + "([".index(stack[-1]), stacks.index(stack[:-1])] = 0.5
            transitions[state, 4:, state] = share.flip(0) if stack.endswith("[") else share
        final = torch.zeros(len(stacks))
        final[0] = 1
        return cls(transitions, final, length, symbols="([)]" + "abcdefghijkl"[:letters])

    # --- strings -----------------------------------------------------------------------------------------------------

    @property
    def num_strings(self) -> int:
        """Number of strings with positive probability."""
        edges = (self.transitions > 0).sum(1).tolist()
        ways = [int(weight > 0) for weight in self.final.tolist()]
        for _ in range(self.length):
            ways = [sum(count * way for count, way in zip(row, ways, strict=True)) for row in edges]
        return ways[self.initial]

    def strings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All strings with positive probability, `(n, length)` in lexicographic order, and their log-probabilities.

        Raises:
            ValueError: there are more than a million.
        """
        if self.num_strings > MAX_STRINGS:
            raise ValueError(f"The language has {self.num_strings} strings; at most {MAX_STRINGS} are enumerated.")
        tokens = torch.zeros(1, 0, dtype=torch.long)
        state, log_weight = torch.tensor([self.initial]), torch.zeros(1, dtype=torch.float64)
        for position in range(self.length):
            total = log_weight[:, None] + self._log_weight[state]  # (n, V)
            following = self._next[state]
            keep = (total + self._to_end[position + 1][following]) > -math.inf
            row, symbol = keep.nonzero(as_tuple=True)
            tokens = torch.cat([tokens[row], symbol[:, None]], 1)
            state, log_weight = following[row, symbol], total[row, symbol]
        return tokens, log_weight + torch.log(self.final[state]) - self._log_total

    def codes(self, tokens: torch.Tensor) -> torch.Tensor:
        """Strings as numbers, `(n,)`: their digits in base V. Lexicographic order is kept; masks are not allowed."""
        tokens = self._checked(tokens)
        if bool((tokens == self.mask_token_id).any()):
            raise ValueError("`tokens` has masks; only complete strings have a code.")
        places = self.num_symbols ** torch.arange(self.length - 1, -1, -1, device=tokens.device)
        return (tokens * places).sum(1)

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Tokens `(n, length)` of texts; `_` is the mask.

        Raises:
            ValueError: a text of another length, or with another character.
        """
        if isinstance(texts, str):
            raise ValueError(f"`texts` is the single string {texts!r}; a list is needed.")
        table = {symbol: index for index, symbol in enumerate(self.symbols + "_")}
        for text in texts:
            if len(text) != self.length or not set(text) <= set(table):
                raise ValueError(
                    f"`texts` has {text!r}; allowed are {self.length} characters of {self.symbols + '_'!r}."
                )
        return torch.tensor([[table[symbol] for symbol in text] for text in texts]).reshape(-1, self.length)

    def decode(self, tokens: torch.Tensor) -> list[str]:
        """Texts of tokens `(n, length)`; the mask is `_`."""
        alphabet = self.symbols + "_"
        return ["".join(alphabet[token] for token in row) for row in self._checked(tokens).tolist()]

    # --- probabilities -----------------------------------------------------------------------------------------------

    def log_prob(self, tokens: torch.Tensor) -> torch.Tensor:
        """Exact log-probabilities in nats, `(n,)`, of strings `(n, length)`; -inf for one outside the language.

        Raises:
            ValueError: another shape, or tokens outside the vocabulary. A mask is allowed, and makes it -inf.
        """
        tokens = self._checked(tokens).cpu()
        masked = tokens == self.mask_token_id
        state = torch.full((len(tokens),), self.initial)
        total = torch.zeros(len(tokens), dtype=torch.float64)
        for symbol in tokens.masked_fill(masked, 0).unbind(1):
            total = total + self._log_weight[state, symbol]
            state = self._next[state, symbol]
        return (total + torch.log(self.final[state]) - self._log_total).masked_fill(masked.any(1), -math.inf)

    def validity(self, tokens: torch.Tensor) -> torch.Tensor:
        """Whether each string has positive probability, bool `(n,)`. Arguments and errors as `log_prob`."""
        return self.log_prob(tokens) > -math.inf

    def entropy(self) -> float:
        r"""Entropy of a string in nats, :math:`\log Z - E[\log w]`, without enumerating."""
        ahead = torch.full((len(self.final),), -math.inf, dtype=torch.float64)
        ahead[self.initial] = 0
        total = self._log_total
        step = torch.log(self.transitions.sum(1))
        for position in range(self.length):
            log_weight = self._log_weight
            share = torch.exp(ahead[:, None] + log_weight + self._to_end[position + 1][self._next] - self._log_total)
            total -= float((share * log_weight.clamp(min=-1e9)).sum())
            ahead = torch.logsumexp(ahead[:, None] + step, 0)
        ends = torch.exp(ahead + torch.log(self.final) - self._log_total)
        return total - float((ends * torch.log(self.final).clamp(min=-1e9)).sum())

    def sample(
        self, n: int, generator: torch.Generator | None = None, log_likelihood: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Independent draws from the language, `(n, length)`.

        Args:
            n: how many.
            generator: on the CPU.
            log_likelihood: `(1, length, V)` or `(n, length, V)`, of what is known about the tokens, from
                `log_likelihood`: the draws are then from the language given that.

        Raises:
            ValueError: `n` is not positive, or nothing in the language fits what is known.
        """
        if n < 1:
            raise ValueError(f"`n` is {n!r}; it must be at least 1.")
        if log_likelihood is None:
            log_likelihood = torch.zeros(1, self.length, self.num_symbols, dtype=torch.float64)
        to_end = self._backward(self._log_steps(log_likelihood)).expand(-1, n, -1)
        if not bool((to_end[0, :, self.initial] > -math.inf).all()):
            raise ValueError("`log_likelihood` leaves no string of the language.")
        state, tokens = torch.full((n,), self.initial), []
        for position in range(self.length):
            ahead = to_end[position + 1].gather(1, self._next[state])
            logits = log_likelihood[:, position] + self._log_weight[state] + ahead
            symbol = torch.multinomial(torch.softmax(logits, 1), 1, generator=generator).squeeze(1)
            tokens.append(symbol)
            state = self._next[state, symbol]
        return torch.stack(tokens, 1)

    def log_likelihood(
        self, tokens: torch.Tensor, alpha: torch.Tensor | float = 1.0, uniform: torch.Tensor | float = 0.0
    ) -> torch.Tensor:
        r"""What noisy tokens say about the clean ones: :math:`\log q(z_i | x_i = v)`, `(n, length, V)`, up to a constant.

        With :math:`q(z | x) = \alpha 1[z = x] + u` for a symbol z, and a mask that says nothing: any mixture of
        masking and uniform noise (von Rütte et al. 2025, arXiv 2503.04482). The defaults are plain masking.

        Args:
            tokens: noisy strings `(n, length)`, the mask included.
            alpha: probability that a token is kept, given that it is not masked; a number or `(n,)`.
            uniform: u, the probability of each symbol by uniform noise; a number or `(n,)`.
        """
        tokens = self._checked(tokens)
        kept, noise = (
            torch.as_tensor(value, dtype=torch.float64, device=tokens.device).reshape(-1, 1, 1)
            for value in (alpha, uniform)
        )
        same = tokens[..., None] == torch.arange(self.num_symbols, device=tokens.device)
        told = torch.log(kept * same + noise)
        return torch.where((tokens == self.mask_token_id)[..., None], 0.0, told)

    def log_context(self, log_likelihood: torch.Tensor) -> torch.Tensor:
        r"""What all other positions say about each: :math:`\log \sum_{x: x_i = v} p(x) \prod_{j \ne i} q(z_j | x_j)`.

        Normalised over v it is the leave-one-out posterior :math:`p(x_i | z_{-i})`; with `log_likelihood` added it is
        :math:`p(x_i | z)`. At a masked position they are the same.

        Args:
            log_likelihood: `(n, length, V)`, as the method of that name gives.

        Returns:
            `float64`, `(n, length, V)`; all -inf where the other positions contradict one another.
        """
        if log_likelihood.ndim != 3 or log_likelihood.shape[1:] != (self.length, self.num_symbols):
            raise ValueError(
                f"`log_likelihood` has shape {tuple(log_likelihood.shape)}; it must be (n, {self.length}, "
                f"{self.num_symbols})."
            )
        steps = self._log_steps(log_likelihood)
        ahead, behind = self._forward(steps)[:-1], self._backward(steps)[1:]
        pairs = (ahead[..., :, None] + behind[..., None, :]).transpose(0, 1)  # (n, L, S, S)
        pairs = pairs.masked_fill(~self._possible.to(pairs.device), -math.inf).flatten(2)
        shift = _finite(pairs.amax(-1, keepdim=True))
        edges = self._edges.to(pairs.device)
        return torch.log(torch.exp(pairs - shift) @ edges.T) + shift - self._log_total

    # --- inside ------------------------------------------------------------------------------------------------------

    def _log_steps(self, log_likelihood: torch.Tensor) -> torch.Tensor:
        """Log-weights of going from state to state at each position, `(n, L, S, S)`."""
        shift = _finite(log_likelihood.amax(-1, keepdim=True))
        edges = self._edges.to(log_likelihood.device)
        steps = torch.log(torch.exp(log_likelihood.double() - shift) @ edges) + shift
        return steps.unflatten(-1, (len(self.final), len(self.final)))

    def _forward(self, steps: torch.Tensor) -> torch.Tensor:
        """`(L + 1, n, S)`: log-weight of reaching a state."""
        state = torch.full((len(steps), len(self.final)), -math.inf, dtype=torch.float64, device=steps.device)
        state[:, self.initial] = 0
        states = [state]
        for step in steps.unbind(1):
            states.append(torch.logsumexp(states[-1][:, :, None] + step, 1))
        return torch.stack(states)

    def _backward(self, steps: torch.Tensor) -> torch.Tensor:
        """`(L + 1, n, S)`: log-weight of all ends from a state."""
        states = [torch.log(self.final.to(steps.device)).expand(len(steps), -1)]
        for step in steps.unbind(1)[::-1]:
            states.append(torch.logsumexp(step + states[-1][:, None, :], 2))
        return torch.stack(states[::-1])

    def _checked(self, tokens: torch.Tensor) -> torch.Tensor:
        if tokens.is_floating_point() or tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise ValueError(
                f"`tokens` is {tokens.dtype} of shape {tuple(tokens.shape)}; it must hold integers, (n, {self.length})."
            )
        if not bool(((tokens >= 0) & (tokens <= self.mask_token_id)).all()):
            raise ValueError(
                f"`tokens` has values from {int(tokens.min())} to {int(tokens.max())}; allowed are 0 to "
                f"{self.mask_token_id}, the mask."
            )
        return tokens.long()


def _finite(shift: torch.Tensor) -> torch.Tensor:
    return torch.where(shift == -math.inf, 0.0, shift)
