"""Evolutionary search, deterministic and resumable: what AutoDiffusion and S^3 share.

    evolution = Evolution([Stage(space, epochs=10)], evaluate, seed=0, first=[uniform])
    result = evolution.run("search.json")

Candidates are JSON values. A space makes them, and makes equal ones equal as JSON, so that their text is their key: none is
evaluated twice. All draws are of one generator, so a search follows from its seed and the scores. That is also how it
resumes: the file holds the scores, and the search runs again from the beginning with those that it has.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Protocol

from tqdm.auto import tqdm

_SCHEMA = 1
_TRIES = 20  # draws for a new candidate, before the space counts as used up


class Space(Protocol):
    """What candidates there are. All draws are from the `rng` that is given."""

    def random(self, rng: Random) -> Any:
        """Any candidate."""
        ...

    def mutate(self, candidate: Any, rng: Random, rate: float) -> Any:
        """A changed copy; `rate` is the probability of each change."""
        ...

    def cross(self, one: Any, other: Any, rng: Random) -> Any:
        """A candidate of parts of both."""
        ...


# From the candidates with their scores and a pool of new ones to the numbers of the pool, the most promising first.
Rank = Callable[[Sequence[tuple[Any, float]], Sequence[Any]], Sequence[int]]


@dataclass(frozen=True)
class Stage:
    """A part of a search: `epochs` populations of one space. The next stage goes on with the best of this one."""

    space: Space
    epochs: int


@dataclass(frozen=True)
class Evolved:
    """Result of a search.

    Attributes:
        best: the candidate with the lowest score; of several the first.
        score: its score.
        evaluated: all candidates with their scores, in the order of their evaluation.
        incumbents: lowest score after each evaluation, never rising.
    """

    best: Any
    score: float
    evaluated: list[tuple[Any, float]]
    incumbents: list[float]


class Evolution:
    """Search for the candidate with the lowest score.

    The first population is `first`, then random candidates up to half of it, then mutations of `first`. Each later one is
    of mutations and crossovers of the `parents` best of all, and random candidates.

    Args:
        stages: spaces, each with its number of populations after the first one.
        evaluate: score of a candidate, the lower the better. What is not finite counts as worse than all that is.
        seed: of all draws.
        first: candidates to start from.
        population: candidates a population.
        parents: number of the best that are parents.
        mutations, crossovers: share of a population that is made so; the rest is random.
        rate: probability of a change in a mutation.
        first_rate: the same, in the mutations of `first`.
        rank: where given, each population is the most promising of `pool` times as many candidates.
        pool: see `rank`.
        identity: what scores depend on, as JSON; a file of other scores is refused.

    Raises:
        ValueError: an argument has a wrong value.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        evaluate: Callable[[Any], float],
        *,
        seed: int = 0,
        first: Sequence[Any] = (),
        population: int = 50,
        parents: int = 10,
        mutations: float = 0.5,
        crossovers: float = 0.3,
        rate: float = 0.25,
        first_rate: float = 0.1,
        rank: Rank | None = None,
        pool: int = 1,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (("population", population), ("parents", parents), ("pool", pool)):
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` is {value!r}; an integer of at least 1 is needed.")
        for name, share in (
            ("mutations", mutations),
            ("crossovers", crossovers),
            ("rate", rate),
            ("first_rate", first_rate),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"`{name}` is {share!r}; allowed are numbers from 0 to 1.")
        if mutations + crossovers > 1:
            raise ValueError(
                f"`mutations` is {mutations!r} and `crossovers` {crossovers!r}; together at most 1 is allowed."
            )
        if not stages or any(type(stage.epochs) is not int or stage.epochs < 0 for stage in stages):
            raise ValueError(f"`stages` is {list(stages)!r}; one or more are needed, of 0 epochs or more.")
        self.stages, self.evaluate, self.seed, self.first = list(stages), evaluate, seed, list(first)
        self.population, self.parents = population, parents
        self.num_mutations, self.num_crossovers = round(mutations * population), round(crossovers * population)
        self.rate, self.first_rate, self.rank, self.pool = rate, first_rate, rank, pool
        self.identity = json.loads(json.dumps(dict(identity or {})))

    def run(self, file: str | os.PathLike[str] | None = None) -> Evolved:
        """Search, with a progress bar.

        Args:
            file: where scores are kept as they come; a search that was broken off goes on from there. None keeps them in
                memory only.

        Raises:
            ValueError: the file is of another search.
        """
        self._known = self._read(file)
        self._scores: dict[str, float] = {}
        self._file = None if file is None else Path(file)
        rng = Random(self.seed)
        total = self.population * (1 + sum(stage.epochs for stage in self.stages))
        with tqdm(total=total, desc="Search", unit="candidate") as bar:
            self._bar = bar
            self._evaluate_all(self._first_population(rng))
            for stage in self.stages:
                for _ in range(stage.epochs):
                    self._evaluate_all(self._next_population(stage.space, rng))
        evaluated = [(json.loads(key), score) for key, score in self._scores.items()]
        if not evaluated:
            raise ValueError("`stages` and `first` gave no candidate.")
        best, score = min(evaluated, key=lambda pair: pair[1])
        incumbents = [score for _, score in evaluated]
        for i in range(1, len(incumbents)):
            incumbents[i] = min(incumbents[i], incumbents[i - 1])
        return Evolved(best, score, evaluated, incumbents)

    # --- populations -------------------------------------------------------------------------------------------------

    def _first_population(self, rng: Random) -> list[str]:
        space, found = self.stages[0].space, dict.fromkeys(map(_key, self.first))
        self._grow(found, self.population // 2, lambda: space.random(rng))
        if self.first:
            self._grow(found, self.population, lambda: space.mutate(rng.choice(self.first), rng, self.first_rate))
        self._grow(found, self.population, lambda: space.random(rng))
        return list(found)[: max(self.population, len(self.first))]

    def _next_population(self, space: Space, rng: Random) -> list[str]:
        top = [json.loads(key) for key in sorted(self._scores, key=self._scores.__getitem__)[: self.parents]]
        size = self.population * self.pool
        found: dict[str, None] = {}
        mutated = self.num_mutations * self.pool
        self._grow(found, mutated, lambda: space.mutate(rng.choice(top), rng, self.rate))
        crossed = mutated + self.num_crossovers * self.pool
        self._grow(found, crossed, lambda: space.cross(rng.choice(top), rng.choice(top), rng))
        self._grow(found, size, lambda: space.random(rng))
        keys = list(found)
        if self.rank is not None and len(keys) > self.population:
            evaluated = [(json.loads(key), score) for key, score in self._scores.items()]
            order = self.rank(evaluated, [json.loads(key) for key in keys])
            keys = [keys[i] for i in order]
        return keys[: self.population]

    def _grow(self, found: dict[str, None], size: int, draw: Callable[[], Any]) -> None:
        """Add candidates that are new, until there are `size` or too many draws in a row gave none."""
        failed = 0
        while len(found) < size and failed < _TRIES * self.pool:
            key = _key(draw())
            if key in found or key in self._scores:
                failed += 1
            else:
                found[key] = None
                failed = 0

    def _evaluate_all(self, keys: Sequence[str]) -> None:
        for key in keys:
            if key not in self._known:
                score = float(self.evaluate(json.loads(key)))
                self._known[key] = score if math.isfinite(score) else math.inf
                self._write()
            self._scores[key] = self._known[key]
            self._bar.update()
            self._bar.set_postfix(best=f"{min(self._scores.values()):.5g}", refresh=False)

    # --- the file ----------------------------------------------------------------------------------------------------

    def _read(self, file: str | os.PathLike[str] | None) -> dict[str, float]:
        if file is None or not Path(file).exists():
            return {}
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
            schema, identity, scores = content["schema"], content["identity"], content["scores"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`file` is {str(file)!r}, and no search wrote that.") from error
        if schema != _SCHEMA or identity != self.identity:
            raise ValueError(
                f"`file` is {str(file)!r}, of another search: {identity!r}, and this one is {self.identity!r}."
            )
        return {key: math.inf if score is None else float(score) for key, score in scores.items()}

    def _write(self) -> None:
        if self._file is None:
            return
        scores = {key: score if math.isfinite(score) else None for key, score in self._known.items()}
        aside = self._file.with_name(f"{self._file.name}.new")
        content = {"schema": _SCHEMA, "identity": self.identity, "scores": scores}
        aside.write_text(json.dumps(content), encoding="utf-8")
        aside.replace(self._file)


def _key(candidate: Any) -> str:
    return json.dumps(candidate, sort_keys=True, allow_nan=False)
