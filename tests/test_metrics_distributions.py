"""Fréchet and kernel distance: closed forms, bias, intervals that cover, and torchmetrics as a second opinion."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_ext.metrics import distance_difference, distributions, frechet_distance, kernel_distance


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def normal(*shape: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def covariance(d: int, generator: torch.Generator) -> torch.Tensor:
    factor = normal(d, d, generator=generator)
    return factor @ factor.T / d + 0.1 * torch.eye(d)


def sample_with(mean: torch.Tensor, cov: torch.Tensor, n: int, generator: torch.Generator) -> torch.Tensor:
    """`n` rows whose own mean and covariance are exactly these."""
    rows = normal(n, len(mean), generator=generator)
    orthogonal = torch.linalg.qr(rows - rows.mean(0)).Q * math.sqrt(n - 1)
    return mean + orthogonal @ torch.linalg.cholesky(cov).T


def root(matrix: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).sqrt() @ vectors.T


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """The value alone."""
    return frechet_distance(a, b, resamples=2).value


def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
    return kernel_distance(a, b, resamples=2).value


def mean_kernel(mean_a: torch.Tensor, mean_b: torch.Tensor) -> float:
    """Mean of `(x . y / d + 1)^3` for independent `x ~ N(mean_a, I)` and `y ~ N(mean_b, I)`.

    By the cumulants of `x . y`, which are the sums of those of the products of coordinates.
    """
    d, product = len(mean_a), mean_a * mean_b
    square = (1 + mean_a**2) * (1 + mean_b**2)
    cube = (mean_a**3 + 3 * mean_a) * (mean_b**3 + 3 * mean_b)
    mean, variance = product.sum(), (square - product**2).sum()
    third = (cube - 3 * square * product + 2 * product**3).sum()
    moments = mean / d, (variance + mean**2) / d**2, (third + 3 * variance * mean + mean**3) / d**3
    return float(1 + 3 * moments[0] + 3 * moments[1] + moments[2])


def squared_mmd(mean_a: torch.Tensor, mean_b: torch.Tensor) -> float:
    return mean_kernel(mean_a, mean_a) + mean_kernel(mean_b, mean_b) - 2 * mean_kernel(mean_a, mean_b)


class TestFrechetValue:
    def test_diagonal_covariances(self, generator):
        mean_a, mean_b = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.0, 1.0, 0.5]).double()
        sd_a, sd_b = torch.tensor([1.0, 2.0, 0.3]).double(), torch.tensor([0.5, 2.0, 3.0]).double()
        a = sample_with(mean_a, torch.diag(sd_a**2), 50, generator)
        b = sample_with(mean_b, torch.diag(sd_b**2), 31, generator)
        expected = ((mean_a - mean_b) ** 2).sum() + ((sd_a - sd_b) ** 2).sum()
        assert frechet(a, b) == pytest.approx(float(expected), rel=1e-12)

    def test_two_dimensions(self, generator):
        """There the trace of the root is known: its square is tr(AB) + 2 sqrt(det(AB))."""
        a, b = covariance(2, generator), covariance(2, generator)
        assert not torch.allclose(a @ b, b @ a)
        zero = torch.zeros(2, dtype=torch.float64)
        trace = ((a @ b).trace() + 2 * (a @ b).det().sqrt()).sqrt()
        expected = a.trace() + b.trace() - 2 * trace
        found = frechet(sample_with(zero, a, 20, generator), sample_with(zero, b, 30, generator))
        assert found == pytest.approx(float(expected), rel=1e-11)

    @settings(max_examples=25, deadline=None)
    @given(d=st.integers(1, 12), seed=st.integers(0, 2**31), extra=st.integers(1, 40))
    def test_any_covariances_by_the_symmetric_root(self, d, seed, extra):
        generator = torch.Generator().manual_seed(seed)
        cov_a, cov_b = covariance(d, generator), covariance(d, generator)
        mean_a, mean_b = normal(d, generator=generator), normal(d, generator=generator)
        a = sample_with(mean_a, cov_a, max(d + extra, 4), generator)
        b = sample_with(mean_b, cov_b, max(d + 2, 4), generator)
        middle = root(root(cov_a) @ cov_b @ root(cov_a)).trace()
        expected = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * middle
        assert frechet(a, b) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)
        assert frechet(b, a) == pytest.approx(float(expected), rel=1e-9, abs=1e-9)

    @pytest.mark.parametrize("n", [6, 40, 300])
    def test_a_set_from_itself_is_zero_with_fewer_pictures_than_features_too(self, n, generator):
        a = 100 * normal(n, 100, generator=generator) + 1000
        assert 0 <= frechet(a, a) < 1e-10 * float(a.var(0).sum())

    def test_fewer_pictures_than_features(self, generator):
        """Ranks 9 and 14 in 100 dimensions: a scaled set, and sets in spaces that are orthogonal to each other."""
        a = torch.zeros(10, 100, dtype=torch.float64)
        a[:, :50] = normal(10, 50, generator=generator)
        a -= a.mean(0)
        trace = float(a.var(0).sum())
        assert frechet(3 * a, a) == pytest.approx(4 * trace, rel=1e-11)
        b = torch.zeros(15, 100, dtype=torch.float64)
        b[:, 50:] = 1 + normal(15, 50, generator=generator)
        expected = float(b.mean(0).square().sum() + b.var(0).sum()) + trace
        assert frechet(a, b) == pytest.approx(expected, rel=1e-11)

    def test_dead_and_constant_features_change_nothing(self, generator):
        a, b = normal(40, 6, generator=generator), normal(50, 6, generator=generator)
        padded = [torch.cat([x, torch.zeros(len(x), 30), torch.full((len(x), 9), 7.0)], dim=1) for x in (a, b)]
        assert frechet(*padded) == pytest.approx(frechet(a, b), rel=1e-10)

    def test_rotation_and_translation_change_nothing_and_scale_squares(self, generator):
        a, b = normal(40, 8, generator=generator), 1.3 * normal(25, 8, generator=generator) + 0.2
        rotation, shift = torch.linalg.qr(normal(8, 8, generator=generator)).Q, 1e3 * normal(8, generator=generator)
        expected = frechet(a, b)
        assert frechet(a @ rotation + shift, b @ rotation + shift) == pytest.approx(expected, rel=1e-8)
        assert frechet(10 * a, 10 * b) == pytest.approx(100 * expected, rel=1e-10)

    def test_half_precision_features_are_computed_in_float64(self, generator):
        a, b = normal(40, 8, generator=generator).half(), normal(25, 8, generator=generator).half()
        assert frechet(a, b) == frechet(a.double(), b.double())

    def test_torchmetrics_agrees(self, generator):
        fid = pytest.importorskip("torchmetrics.image.fid")
        net = torch.nn.Identity()
        net.num_features = 16
        peer = fid.FrechetInceptionDistance(feature=net)
        a, b = normal(400, 16, generator=generator), 1.2 * normal(300, 16, generator=generator) + 0.1
        peer.update(a, real=False)
        peer.update(b, real=True)
        assert frechet(a, b) == pytest.approx(peer.compute().item(), rel=1e-8)


class TestFrechetBias:
    def test_estimate_of_the_bias_is_most_of_it(self, generator):
        """A shift of 0.3 in eight unit Gaussians: the distance is 0.72. At 200 pictures it is measured a tenth higher."""
        results = [
            frechet_distance(
                normal(200, 8, generator=generator) + 0.3, normal(200, 8, generator=generator), resamples=30, seed=i
            )
            for i in range(40)
        ]
        true = 8 * 0.3**2
        value, bias = (sum(getattr(result, name) for result in results) / len(results) for name in ("value", "bias"))
        assert value - true > 0.05
        assert abs(value - bias - true) < 0.4 * (value - true)

    def test_noise_shows_the_bias_of_equal_distributions(self, generator):
        a, b = normal(100, 32, generator=generator), normal(200, 32, generator=generator)
        result = frechet_distance(a, b, resamples=2)
        assert result.noise_samples == (100, 100)
        assert 0.5 < result.noise / result.value < 3
        worse = frechet_distance(a + 1, b, resamples=2)
        assert worse.value > 5 * worse.noise and worse.noise == result.noise


class TestIntervals:
    @pytest.mark.parametrize("shift", [0.0, 0.4])
    def test_frechet_covers_the_mean_at_this_sample_count(self, shift, generator):
        results = [
            frechet_distance(
                normal(60, 4, generator=generator) + shift, normal(80, 4, generator=generator), resamples=50, seed=i
            )
            for i in range(40)
        ]
        values = torch.tensor([result.value for result in results])
        ends = torch.tensor([result.interval for result in results])
        assert ((ends[:, 0] <= values.mean()) & (values.mean() <= ends[:, 1])).sum() >= 35
        assert (ends[:, 1] - ends[:, 0]).median() < 7 * values.std()  # not by being wide

    @pytest.mark.parametrize("shift", [0.0, 0.3])
    def test_kernel_covers_the_distance_of_the_distributions(self, shift, generator):
        means = torch.full((16,), shift, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
        results = [
            kernel_distance(*(mean + normal(60, 16, generator=generator) for mean in means), resamples=100, seed=i)
            for i in range(60)
        ]
        ends = torch.tensor([result.interval for result in results])
        true = squared_mmd(*means)
        assert ((ends[:, 0] <= true) & (true <= ends[:, 1])).sum() >= 53
        if shift:
            assert (ends[:, 0] > 0).sum() >= 50  # not by being wide

    @pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
    def test_holds_the_value_repeats_and_widens_with_the_level(self, distance, generator):
        a, b = normal(50, 6, generator=generator), normal(70, 6, generator=generator) * 1.5
        result = distance(a, b, resamples=60)
        assert result.interval[0] < result.value < result.interval[1]
        assert distance(a, b, resamples=60) == result
        assert distance(a, b, resamples=60, seed=1).interval != result.interval
        low, high = distance(a, b, resamples=60, level=0.5).interval
        assert result.interval[0] < low < high < result.interval[1]

    def test_frechet_ends_are_not_negative(self, generator):
        a = normal(30, 2, generator=generator)
        low, high = frechet_distance(a, a, resamples=50).interval
        assert low == 0 <= high


class TestKernelValue:
    def test_by_hand(self, generator):
        a, b = normal(5, 3, generator=generator), normal(6, 3, generator=generator)

        def k(x, y):
            return (float(x @ y) / 3 + 1) ** 3

        within_a = sum(k(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
        within_b = sum(k(b[i], b[j]) for i in range(6) for j in range(6) if i != j) / 30
        between = sum(k(x, y) for x in a for y in b) / 30
        assert kernel(a, b) == pytest.approx(within_a + within_b - 2 * between, rel=1e-12)

    def test_two_points(self):
        a, b = torch.full((7, 4), 2.0), torch.full((9, 4), 1.0)
        assert kernel(a, b) == pytest.approx((4 + 1) ** 3 + (1 + 1) ** 3 - 2 * (2 + 1) ** 3, rel=1e-12)

    def test_a_set_of_equal_size_as_the_chunks_or_not(self, generator, monkeypatch):
        a, b = normal(20, 3, generator=generator), normal(33, 3, generator=generator)
        expected = kernel_distance(a, b, resamples=20)
        monkeypatch.setattr(distributions, "_CHUNK", 10)
        in_chunks = kernel_distance(a, b, resamples=20)
        assert in_chunks.value == pytest.approx(expected.value, rel=1e-10)
        assert in_chunks.interval == pytest.approx(expected.interval, rel=1e-10)

    @pytest.mark.parametrize(("shift_a", "shift_b"), [(0.0, 0.0), (0.5, 0.5), (0.5, 0.0)])
    def test_unbiased_at_ten_pictures(self, shift_a, shift_b, generator):
        """Mean of 400 estimates against the closed form."""
        means = torch.full((16,), shift_a, dtype=torch.float64), torch.full((16,), shift_b, dtype=torch.float64)
        values = torch.tensor(
            [kernel(*(mean + normal(10, 16, generator=generator) for mean in means)) for _ in range(400)]
        )
        error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - squared_mmd(*means)) < 3.5 * error
        assert (
            error < 0.05
        )  # to count each picture with itself adds a tenth of 7, the kernel of a picture with itself, twice

    def test_bootstrap_leaves_out_a_picture_with_itself(self, generator):
        """Against the resampled sets written out, whose equal rows are known."""
        a, b = normal(8, 2, generator=generator), normal(9, 2, generator=generator)
        rows_a, rows_b = torch.tensor([0, 0, 1, 2, 3, 5, 5, 5]), torch.tensor([1, 1, 2, 3, 4, 4, 6, 7, 8])

        def within(x, rows):
            kernels = (x[rows] @ x[rows].T / 2 + 1) ** 3
            different = rows[:, None] != rows
            return kernels[different].sum() / different.sum()

        expected = within(a, rows_a) + within(b, rows_b) - 2 * ((a[rows_a] @ b[rows_b].T / 2 + 1) ** 3).mean()
        counts = [torch.bincount(rows, minlength=len(x))[None] for x, rows in ((a, rows_a), (b, rows_b))]
        found = distributions._kernel([a], b, counts[0], counts[1])
        torch.testing.assert_close(found, expected.view(1, 1), rtol=1e-12, atol=0)

    def test_torchmetrics_agrees(self, generator):
        kid = pytest.importorskip("torchmetrics.image.kid")
        a, b = normal(40, 7, generator=generator), 1.2 * normal(40, 7, generator=generator)
        assert kernel(a, b) == pytest.approx(kid.poly_mmd(a, b).item(), rel=1e-10)


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance])
class TestNoise:
    def test_two_disjoint_parts_of_the_reference(self, distance, generator):
        reference = normal(40, 3, generator=generator)
        result = distance(normal(15, 3, generator=generator), reference, resamples=2, seed=5)
        assert result.noise_samples == (15, 25) and result.samples == (15, 40)
        order = torch.randperm(40, generator=torch.Generator().manual_seed(5))
        parts = distance(reference[order[:15]], reference[order[15:]], resamples=2)
        assert result.noise == pytest.approx(parts.value, rel=1e-12)

    def test_not_more_than_half_of_the_reference(self, distance, generator):
        result = distance(normal(50, 3, generator=generator), normal(31, 3, generator=generator), resamples=2)
        assert result.noise_samples == (15, 16)

    def test_given_sets(self, distance, generator):
        a, b, c, d = (normal(n, 3, generator=generator) for n in (15, 40, 16, 17))
        alone = distance(a, b, noise=c, resamples=2)
        assert alone.noise == pytest.approx(distance(c, b, resamples=2).value, rel=1e-12)
        pair = distance(a, b, noise=(c, d), resamples=2)
        assert pair.noise == pytest.approx(distance(c, d, resamples=2).value, rel=1e-12)
        assert (alone.noise_samples, pair.noise_samples) == ((16, 40), (16, 17))
        assert alone.value == pair.value

    def test_json(self, distance, generator):
        result = distance(normal(15, 3, generator=generator), normal(9, 3, generator=generator), resamples=5)
        read = json.loads(json.dumps(result.to_dict()))
        assert read["value"] == result.value and read["samples"] == [15, 9] and read["dimensions"] == 3
        assert read["resamples"] == 5 and read["interval"] == list(result.interval)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"features": torch.zeros(8)}, r"`features` is a tensor of torch.float32 and shape \(8,\)"),
            ({"features": torch.zeros(8, 3, dtype=torch.int64)}, "`features` is a tensor of torch.int64"),
            ({"reference": [[0.0]]}, "`reference` is list; it must be a float tensor"),
            ({"reference": torch.zeros(3, 3)}, "`reference` has 3 rows; at least 4"),
            ({"features": torch.zeros(8, 4)}, "`features` has 4 features a picture and `reference` has 3"),
            ({"reference": torch.full((8, 3), math.nan)}, "`reference` has values that are not finite"),
            ({"noise": torch.zeros(8, 2)}, "`noise` has 2 features a picture"),
            ({"noise": (torch.zeros(8, 3), torch.zeros(2, 3))}, r"`noise\[1\]` has 2 rows"),
            ({"noise": (torch.zeros(8, 3),)}, "`noise` has 1 entries"),
            ({"resamples": 1}, "`resamples` is 1"),
            ({"resamples": 10.0}, "`resamples` is 10.0"),
            ({"level": 1.0}, "`level` is 1.0"),
        ],
    )
    def test_refuses(self, distance, change, message):
        with pytest.raises(ValueError, match=message):
            distance(**({"features": torch.zeros(8, 3), "reference": torch.zeros(8, 3)} | change))


@pytest.mark.parametrize(("kind", "distance"), [("frechet", frechet_distance), ("kernel", kernel_distance)])
class TestDifference:
    def test_is_the_difference(self, kind, distance, generator):
        a, b, c = (normal(n, 5, generator=generator) for n in (30, 30, 50))
        found = distance_difference(1.2 * a, b, c, kind=kind, resamples=20)
        expected = distance(1.2 * a, c, resamples=2).value - distance(b, c, resamples=2).value
        assert found.value == pytest.approx(expected, rel=1e-10)
        assert found.interval[0] < found.value < found.interval[1]
        assert (found.samples, found.dimensions, found.resamples) == ((30, 50), 5, 20)
        assert json.loads(json.dumps(found.to_dict()))["value"] == found.value

    def test_equal_sets_differ_by_nothing(self, kind, distance, generator):
        a, c = normal(30, 5, generator=generator), normal(50, 5, generator=generator)
        found = distance_difference(a, a, c, kind=kind, resamples=20)
        assert (found.value, found.interval) == (0, (0, 0))

    def test_pairs_tell_more_than_sets(self, kind, distance, generator):
        """A small change of each picture is clear in pairs, and not when the pairs are torn apart."""
        baseline, reference = normal(80, 5, generator=generator), normal(100, 5, generator=generator) - 0.3
        changed = baseline + 0.08
        paired = distance_difference(changed, baseline, reference, kind=kind, resamples=100)
        torn = distance_difference(changed, baseline.roll(1, 0), reference, kind=kind, resamples=100)
        assert paired.value == pytest.approx(torn.value)
        assert paired.interval[0] > 0
        assert paired.interval[1] - paired.interval[0] < 0.7 * (torn.interval[1] - torn.interval[0])

    def test_refuses(self, kind, distance):
        with pytest.raises(ValueError, match="`features` has 8 rows and `baseline` has 9; they must pair up"):
            distance_difference(torch.zeros(8, 3), torch.zeros(9, 3), torch.zeros(8, 3), kind=kind)
        with pytest.raises(ValueError, match="`kind` is 'fid'; allowed are frechet, kernel"):
            distance_difference(torch.zeros(8, 3), torch.zeros(8, 3), torch.zeros(8, 3), kind="fid")
        with pytest.raises(ValueError, match="`baseline` has 2 rows"):
            distance_difference(torch.zeros(8, 3), torch.zeros(2, 3), torch.zeros(8, 3), kind=kind)
