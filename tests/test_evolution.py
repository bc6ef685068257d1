"""The evolutionary search that AutoDiffusion and S^3 share."""

from __future__ import annotations

import itertools
import json
import math

import pytest

from diffusers_ext.evolution import Evolution, Stage


class Subsets:
    """Sorted lists of `k` of the numbers below `n`."""

    def __init__(self, n: int = 60, k: int = 4) -> None:
        self.n, self.k = n, k

    def random(self, rng):
        return sorted(rng.sample(range(self.n), self.k))

    def mutate(self, candidate, rng, rate):
        kept = [number for number in candidate if rng.random() >= rate]
        return self._filled(kept, rng)

    def cross(self, one, other, rng):
        return self._filled([rng.choice(pair) for pair in zip(one, other, strict=True)], rng)

    def _filled(self, kept, rng):
        kept = set(kept)
        while len(kept) < self.k:
            kept.add(rng.randrange(self.n))
        return sorted(kept)


GOAL = [3, 17, 31, 50]


def distance(candidate) -> float:
    return float(sum((a - b) ** 2 for a, b in zip(candidate, GOAL, strict=True)))


class Counted:
    """The distance, with a note of each call; breaks off at call number `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.seen: list[list[int]] = []
        self.stop = stop

    def __call__(self, candidate):
        if len(self.seen) == self.stop:
            raise KeyboardInterrupt
        self.seen.append(candidate)
        return distance(candidate)


def evolution(evaluate=distance, epochs=6, **options):
    return Evolution([Stage(Subsets(), epochs)], evaluate, **{"population": 12, "parents": 4, **options})


def test_it_finds_what_random_search_does_not():
    wide = [Stage(Subsets(400), 20)]
    found = [Evolution(wide, distance, population=20, seed=seed).run().score for seed in range(3)]
    chance = [
        Evolution(wide, distance, population=20, mutations=0, crossovers=0, seed=seed).run().score for seed in range(3)
    ]
    assert sorted(found)[1] < 0.1 * sorted(chance)[1]


def test_a_seed_decides_everything():
    one, same, other = (evolution(seed=seed).run() for seed in (1, 1, 2))
    assert one == same and one.evaluated != other.evaluated


def test_nothing_is_evaluated_twice_and_the_incumbent_never_rises():
    counted = Counted()
    result = evolution(counted, seed=3).run()
    assert (
        len({json.dumps(candidate) for candidate in counted.seen}) == len(counted.seen) == len(result.evaluated) == 84
    )
    assert [candidate for candidate, _ in result.evaluated] == counted.seen
    assert all(score == distance(candidate) for candidate, score in result.evaluated)
    assert all(later <= earlier for earlier, later in itertools.pairwise(result.incumbents))
    assert result.incumbents[-1] == result.score == distance(result.best) == min(map(distance, counted.seen))


def test_equal_candidates_are_one_whatever_their_keys_order():
    class Dicts(Subsets):
        """The same dict, in two orders."""

        def random(self, rng):
            items = [("a", rng.randrange(3)), ("b", 1)]
            rng.shuffle(items)
            return dict(items)

        def mutate(self, candidate, rng, rate):
            return self.random(rng)

        def cross(self, one, other, rng):
            return self.random(rng)

    seen = []
    result = Evolution([Stage(Dicts(), 3)], lambda c: seen.append(c) or c["a"], population=5, parents=2).run()
    assert len(seen) == 3 and result.best == {"a": 0, "b": 1}, "a space that is used up ends the search"


@pytest.mark.parametrize("stop", [0, 1, 11, 12, 30])
def test_a_search_that_was_broken_off_goes_on_as_if_it_had_not(stop, tmp_path):
    file = tmp_path / "search.json"
    whole = evolution(seed=5).run()
    first = Counted(stop)
    with pytest.raises(KeyboardInterrupt):
        evolution(first, seed=5).run(file)
    second = Counted()
    assert evolution(second, seed=5).run(file) == whole
    assert len(first.seen) == stop and first.seen + second.seen == [candidate for candidate, _ in whole.evaluated]
    third = Counted()
    assert evolution(third, seed=5).run(file) == whole and third.seen == []
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]


def test_a_longer_search_goes_on_from_a_shorter_one(tmp_path):
    evolution(seed=5, epochs=2).run(tmp_path / "search.json")
    counted = Counted()
    assert evolution(counted, seed=5, epochs=6).run(tmp_path / "search.json") == evolution(seed=5, epochs=6).run()
    assert len(counted.seen) == 4 * 12


def test_a_file_of_other_scores_is_refused(tmp_path):
    file = tmp_path / "search.json"
    evolution(identity={"steps": 4}).run(file)
    with pytest.raises(ValueError, match=r"`file` is .* of another search: {.steps.: 4}"):
        evolution(identity={"steps": 5}).run(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="no search wrote that"):
        evolution().run(file)


def test_the_first_candidates_come_first_and_make_the_rest():
    counted = Counted()
    first = [[0, 1, 2, 3], [0, 1, 2, 3], [5, 6, 7, 8]]
    evolution(counted, epochs=0, first=first, first_rate=0.25).run()
    assert counted.seen[:2] == [[0, 1, 2, 3], [5, 6, 7, 8]] and len(counted.seen) == 12
    near = [max(len({*c} & {*f}) for f in first) for c in counted.seen[6:]]
    assert sorted(near)[-3] >= 2, "the second half are mutations of them"


def test_stages_follow_each_other():
    wide, fine = Subsets(), Subsets()
    fine.random = lambda rng: [0, 0, 0, rng.randrange(50)]
    fine.mutate = lambda candidate, rng, rate: sorted([*candidate[:3], rng.randrange(60)])
    counted = Counted()
    Evolution([Stage(wide, 1), Stage(fine, 2)], counted, population=10, parents=1, crossovers=0.0, mutations=1.0).run()
    best = min(counted.seen[:20], key=distance)
    assert all(len({*candidate} & {*best}) >= 2 for candidate in counted.seen[20:30])


def test_what_is_not_finite_is_worse_than_all_that_is(tmp_path):
    def evaluate(candidate):
        return distance(candidate) if candidate[0] % 2 else math.nan

    file = tmp_path / "search.json"
    result = evolution(evaluate, seed=2).run(file)
    assert math.isfinite(result.score) and result.best[0] % 2 == 1
    assert evolution(distance, seed=2).run(file) == result, "the file keeps them"


def test_a_ranking_chooses_from_a_larger_pool():
    asked = []

    def rank(evaluated, pool):
        asked.append((len(evaluated), len(pool)))
        return sorted(range(len(pool)), key=lambda i: distance(pool[i]))

    guided = evolution(rank=rank, pool=10, seed=1, epochs=3).run()
    assert asked == [(12, 120), (24, 120), (36, 120)]
    assert len(guided.evaluated) == 48 and guided.score < evolution(seed=1, epochs=3).run().score


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"population": 0}, "`population` is 0"),
        ({"parents": True}, "`parents` is True"),
        ({"pool": 1.5}, "`pool` is 1.5"),
        ({"rate": 2}, "`rate` is 2"),
        ({"mutations": 0.8, "crossovers": 0.3}, "together at most 1"),
        ({"epochs": -1}, "`stages` is"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        evolution(**options)
