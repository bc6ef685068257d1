"""Distances, multiply-accumulates, time ratios, intervals and attributes, on cases with known answers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

from diffusers_ext import metrics
from diffusers_ext.metrics import attributes
from tests.fresh import run_fresh

DATA = Path(__file__).parents[1] / "benchmarks" / "data"


@pytest.fixture(scope="module")
def avatars() -> dict[str, np.ndarray]:
    with np.load(DATA / "avatars.npz", allow_pickle=False) as data:
        return dict(data)


class TestNames:
    def test_each_public_name_is_there(self):
        assert sorted(metrics.__all__) == sorted(metrics._MODULES)
        assert all(getattr(metrics, name) is not None for name in metrics.__all__)
        with pytest.raises(AttributeError, match="no attribute 'fid'"):
            _ = metrics.fid

    def test_captions_are_read_without_torch(self):
        code = """
            import sys
            from diffusers_ext.metrics import balanced_accuracy, parse_caption
            assert not {"torch", "numpy", "diffusers"} & set(sys.modules)
        """
        run_fresh(code)


class TestToTensor:
    def test_all_forms_of_the_same_pictures_agree(self):
        array = np.random.default_rng(0).integers(256, size=(3, 4, 5, 3), dtype=np.uint8)
        expected = torch.tensor(array / 255.0, dtype=torch.float32).permute(0, 3, 1, 2)
        forms = {
            "uint8": array,
            "float": array / 255.0,
            "tensor": expected.clone(),
            "double": expected.double(),
            "PIL": [Image.fromarray(picture) for picture in array],
            "PIL with alpha": [Image.fromarray(picture).convert("RGBA") for picture in array],
        }
        for name, form in forms.items():
            tensor = metrics.to_tensor(form)
            assert tensor.dtype == torch.float32 and tensor.shape == (3, 3, 4, 5), name
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7, msg=name)

    def test_grey_pictures_have_three_equal_channels(self):
        array = np.random.default_rng(0).integers(256, size=(3, 4, 5, 1), dtype=np.uint8)
        expected = torch.tensor(array / 255.0, dtype=torch.float32).permute(0, 3, 1, 2).repeat(1, 3, 1, 1)
        forms = (array, array / 255.0, expected[:, :1].clone(), [Image.fromarray(picture[..., 0]) for picture in array])
        for form in forms:
            tensor = metrics.to_tensor(form)
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-7)
        torch.testing.assert_close(metrics.rmse(expected[:, :1], 1 - expected), metrics.rmse(expected, 1 - expected))

    @pytest.mark.parametrize(
        ("pictures", "message"),
        [
            (torch.zeros(3, 4, 4), r"`frames` is a tensor of torch.float32 and shape \(3, 4, 4\)"),
            (torch.zeros(1, 4, 4, 3), r"shape \(1, 4, 4, 3\); a tensor must be"),
            (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "tensor of torch.uint8"),
            (np.zeros((1, 3, 4, 4), np.uint8), r"`frames` is an array of uint8 and shape \(1, 3, 4, 4\)"),
            (np.zeros((1, 4, 4, 3), np.int64), "array of int64"),
            (torch.full((1, 3, 2, 2), -0.5), r"`frames` has values from -0.5 to -0.5; .* must lie in \[0, 1\]"),
            (np.full((1, 2, 2, 3), 255.0), "values from 255 to 255"),
            (torch.full((1, 3, 2, 2), math.nan), "values from nan to nan"),
            ([], "an empty list"),
            ([Image.new("RGB", (2, 2)), Image.new("RGB", (3, 2))], "images of 2 sizes"),
            (["a.png"], "a list of str"),
            (Image.new("RGB", (2, 2)), "`frames` is Image; allowed are"),
        ],
    )
    def test_refuses(self, pictures, message):
        with pytest.raises(ValueError, match=message):
            metrics.to_tensor(pictures, "frames")


class TestDistances:
    @pytest.mark.parametrize("offset", [1.0, 0.5, 0.1])
    def test_constant_offset(self, offset):
        a, b = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), offset)
        torch.testing.assert_close(metrics.rmse(a, b), torch.full((2,), offset))
        torch.testing.assert_close(metrics.psnr(a, b), torch.full((2,), -20 * math.log10(offset)))

    def test_one_value_a_picture(self):
        a = torch.zeros(3, 3, 2, 2)
        b = a.clone()
        b[1, 0, 0, 0] = 1.0  # one of twelve values
        b[2] = 0.1
        torch.testing.assert_close(metrics.rmse(a, b), torch.tensor([0.0, math.sqrt(1 / 12), 0.1]))
        torch.testing.assert_close(metrics.psnr(a, b), torch.tensor([math.inf, 10 * math.log10(12), 20.0]))

    def test_one_step_of_uint8(self):
        a, b = np.full((1, 8, 8, 3), 100, np.uint8), np.full((1, 8, 8, 3), 101, np.uint8)
        assert metrics.psnr(a, b).item() == pytest.approx(20 * math.log10(255), abs=1e-3)

    def test_data_range_is_the_difference_that_counts_as_zero(self):
        a, b = torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.5)
        assert metrics.psnr(a, b, data_range=0.5).item() == pytest.approx(0.0, abs=1e-6)
        assert metrics.psnr(a, b, data_range=5.0).item() == pytest.approx(20.0, abs=1e-5)

    def test_refuses(self):
        a = torch.zeros(2, 3, 4, 4)
        with pytest.raises(ValueError, match=r"`a` has shape \(2, 3, 4, 4\) and `b` has \(1, 3, 4, 4\)"):
            metrics.psnr(a, a[:1])
        with pytest.raises(ValueError, match="`b` has values"):
            metrics.rmse(a, a - 1)
        with pytest.raises(ValueError, match="`data_range` is 0"):
            metrics.psnr(a, a, data_range=0)


class TestCountMacs:
    """Against counts by hand."""

    @pytest.mark.parametrize(
        ("layer", "shape", "macs"),
        [
            (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
            (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 6, 6), 2 * 6 * 6 * 8 * 3 * 9),
            (nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4), (1, 8, 6, 6), 3 * 3 * 8 * 2 * 9),
            (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 3, 3), 3 * 3 * 4 * 6 * 4),
            (nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU()), (1, 4, 3, 3), 0),
        ],
    )
    def test_layers(self, layer, shape, macs):
        with torch.no_grad():
            assert metrics.count_macs(layer, torch.randn(shape)) == macs

    def test_attention(self):
        batch, heads, queries, keys, width = 2, 4, 16, 10, 8
        q = torch.randn(batch, heads, queries, width)
        k, v = torch.randn(batch, heads, keys, width), torch.randn(batch, heads, keys, width)
        by_hand = 2 * batch * heads * queries * keys * width  # scores, then their product with the values
        assert metrics.count_macs(F.scaled_dot_product_attention, q, k, v) == by_hand

    def test_attention_block_of_diffusers(self):
        from diffusers.models.attention_processor import Attention

        block = Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8)
        states, context = torch.randn(1, 9, 16), torch.randn(1, 5, 12)
        projections = 9 * 16 * 16 + 2 * 5 * 12 * 16 + 9 * 16 * 16  # queries; keys and values; output
        assert metrics.count_macs(block, states, encoder_hidden_states=context) == projections + 2 * 9 * 5 * 16

    def test_backward_counts(self):
        layer, x = nn.Linear(4, 6), torch.randn(3, 4)
        forward_and_weight_gradient = 2 * 3 * 4 * 6
        assert metrics.count_macs(lambda: layer(x).sum().backward()) == forward_and_weight_gradient

    def test_keyword_arguments_and_repeated_calls_add(self):
        layer, x = nn.Linear(4, 6), torch.randn(3, 4)

        def twice(inputs, times):
            for _ in range(times):
                layer(inputs)

        assert metrics.count_macs(twice, x, times=2) == 2 * 3 * 4 * 6


class TestCallCounter:
    def test_counts_by_name(self):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.block = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
                self.unused = nn.Linear(2, 2)

            def forward(self, x):
                return self.block(self.block(x))

        net = Net()
        counter = metrics.CallCounter(net)
        with counter:
            net(torch.zeros(1, 2))
        assert counter.calls == {"": 1, "block": 2, "block.0": 2, "block.1": 2, "unused": 0}
        net(torch.zeros(1, 2))
        assert counter.calls[""] == 1  # nothing is counted outside
        assert not any(module._forward_pre_hooks for module in net.modules())
        with counter:
            net.unused(torch.zeros(1, 2))
        assert counter.calls == {"": 0, "block": 0, "block.0": 0, "block.1": 0, "unused": 1}

    def test_hooks_go_when_the_block_fails(self):
        layer = nn.Linear(2, 2)
        with pytest.raises(RuntimeError), metrics.CallCounter(layer) as counter:
            layer(torch.zeros(1, 3))
        assert counter.calls == {"": 1} and not layer._forward_pre_hooks

    def test_refuses(self):
        with pytest.raises(ValueError, match="`module` is function"):
            metrics.CallCounter(lambda: None)
        counter = metrics.CallCounter(nn.Identity())
        with counter, pytest.raises(RuntimeError, match="counting already"):
            counter.__enter__()


class FakeClock:
    """A clock that functions advance."""

    def __init__(self):
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, seconds: float):
        def fn():
            self.log.append(name)
            self.now += seconds

        return fn


class TestTimeRatio:
    def test_known_costs(self):
        clock = FakeClock()
        fns = {"a": clock.takes("a", 2.0), "half": clock.takes("half", 1.0), "double": clock.takes("double", 4.0)}
        result = metrics.time_ratio(fns, "a", repeats=5, clock=clock)
        assert result.seconds == {"a": 2.0, "half": 1.0, "double": 4.0}
        assert set(result.ratios) == {"half", "double"}
        for ratio, value in ((result["half"], 0.5), (result["double"], 2.0), (result.noise, 1.0)):
            assert ratio.rounds == (value,) * 5 and ratio.median == value and ratio.interval == (value, value)

    def test_a_machine_that_slows_down_changes_seconds_and_no_ratio(self):
        clock, calls = FakeClock(), []

        def costs(factor):
            def fn():
                clock.now += factor * 1.5 ** (len(calls) // 3)  # three calls a round
                calls.append(factor)

            return fn

        result = metrics.time_ratio({"a": costs(1.0), "b": costs(0.25)}, "a", repeats=6, clock=clock)
        assert result["b"].rounds == pytest.approx((0.25,) * 6) and result.noise.median == pytest.approx(1.0)
        assert result.seconds["a"] > 1.0

    def test_each_round_runs_the_baseline_twice_and_the_order_moves_on(self):
        clock = FakeClock()
        fns = {"x": clock.takes("x", 1.0), "a": clock.takes("a", 1.0)}
        metrics.time_ratio(fns, "a", repeats=3, warmup=1, clock=clock)
        rounds = ["".join(clock.log[i : i + 3]) for i in range(0, len(clock.log), 3)]
        assert rounds == ["axa", "xaa", "aax", "axa"]

    def test_warmup_does_not_count(self):
        clock, calls = FakeClock(), []

        def slow_at_first():
            calls.append(None)
            clock.now += 100.0 if len(calls) == 1 else 1.0

        result = metrics.time_ratio({"a": clock.takes("a", 1.0), "b": slow_at_first}, "a", repeats=4, clock=clock)
        assert len(calls) == 5 and result["b"].rounds == (1.0,) * 4

    def test_waits_for_the_device_before_each_reading(self):
        clock, queue = FakeClock(), []

        def launch():  # returns at once; the work is done when somebody waits for it
            queue.append(3.0)

        def synchronize():
            while queue:
                clock.now += queue.pop()

        fns = {"a": clock.takes("a", 1.0), "b": launch}
        result = metrics.time_ratio(fns, "a", repeats=4, synchronize=synchronize, clock=clock)
        assert result["b"].rounds == (3.0,) * 4 and result.noise.rounds == (1.0,) * 4

    def test_real_clock_and_json(self):
        result = metrics.time_ratio({"a": lambda: sum(range(500)), "b": lambda: sum(range(500))}, "a", repeats=3)
        stored = json.loads(json.dumps(result.to_dict()))
        assert set(stored) == {"baseline", "seconds", "ratios", "noise"} and stored["baseline"] == "a"
        assert stored["ratios"]["b"]["rounds"] == list(result["b"].rounds) and len(stored["noise"]["rounds"]) == 3
        low, high = stored["ratios"]["b"]["interval"]
        assert 0 < low <= stored["ratios"]["b"]["median"] <= high

    @pytest.mark.parametrize(
        ("names", "options", "message"),
        [
            ("ab", {"baseline": "c"}, "`baseline` is 'c'; allowed are the names in `fns`: 'a', 'b'"),
            ("a", {"baseline": "a"}, "`fns` holds only the baseline 'a'"),
            ("ab", {"baseline": "a", "repeats": 0}, "`repeats` is 0"),
            ("ab", {"baseline": "a", "warmup": -1}, "`warmup` is -1"),
            ("ab", {"baseline": "a", "repeats": 2.5}, "`repeats` is 2.5"),
        ],
    )
    def test_refuses_before_it_runs_anything(self, names, options, message):
        clock = FakeClock()
        with pytest.raises(ValueError, match=message):
            metrics.time_ratio({name: clock.takes(name, 1.0) for name in names}, **options)
        assert not clock.log


FINITE = st.floats(-1e6, 1e6, allow_subnormal=False)


class TestBootstrapInterval:
    @settings(max_examples=40, deadline=None)
    @given(values=st.lists(FINITE, min_size=1, max_size=20), seed=st.integers(0, 3))
    def test_lies_inside_the_values_and_repeats(self, values, seed):
        low, high = metrics.bootstrap_interval(values, resamples=200, seed=seed)
        assert min(values) <= low <= high <= max(values)
        assert (low, high) == metrics.bootstrap_interval(values, resamples=200, seed=seed)

    @settings(max_examples=40, deadline=None)
    @given(values=st.lists(FINITE, min_size=2, max_size=20), level=st.floats(0.1, 0.9))
    def test_a_higher_level_is_wider(self, values, level):
        low, high = metrics.bootstrap_interval(values, resamples=200, level=level)
        wider_low, wider_high = metrics.bootstrap_interval(values, resamples=200, level=(1 + level) / 2)
        assert wider_low <= low and high <= wider_high

    @settings(max_examples=40, deadline=None)
    @given(values=st.lists(st.integers(-1000, 1000), min_size=1, max_size=20), factor=st.sampled_from([0.5, 2.0, 8.0]))
    def test_scales_and_mirrors_with_the_values(self, values, factor):
        low, high = metrics.bootstrap_interval(values, np.mean, resamples=200)
        scaled = metrics.bootstrap_interval(factor * np.array(values), np.mean, resamples=200)
        mirrored = metrics.bootstrap_interval(-np.array(values), np.mean, resamples=200)
        assert scaled == pytest.approx((factor * low, factor * high))
        assert mirrored == pytest.approx((-high, -low))

    @settings(max_examples=20, deadline=None)
    @given(value=FINITE, count=st.integers(1, 9))
    def test_no_spread_no_width(self, value, count):
        assert metrics.bootstrap_interval([value] * count, resamples=50) == (value, value)

    def test_covers_the_true_mean_about_as_often_as_it_says(self):
        generator = np.random.default_rng(0)
        inside = 0
        for _ in range(200):
            low, high = metrics.bootstrap_interval(generator.normal(3.0, 1.0, size=40), np.mean, resamples=500)
            inside += low <= 3.0 <= high
        assert 0.88 <= inside / 200 <= 0.99

    @pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, math.nan], [math.inf]])
    def test_refuses_values(self, values):
        with pytest.raises(ValueError, match="`values` is"):
            metrics.bootstrap_interval(values)

    @pytest.mark.parametrize("level", [0.0, 1.0, 95])
    def test_refuses_levels(self, level):
        with pytest.raises(ValueError, match=f"`level` is {level}"):
            metrics.bootstrap_interval([1.0], level=level)


class TestBalancedAccuracy:
    def test_by_hand(self):
        true = ["a", "a", "a", "a", "b", "b"]
        predicted = ["a", "a", "a", "b", "b", "a"]
        assert metrics.balanced_accuracy(predicted, true) == pytest.approx((3 / 4 + 1 / 2) / 2)

    def test_a_constant_guess_is_chance_however_unequal_the_classes(self):
        true = [True] + [False] * 99
        assert metrics.balanced_accuracy([False] * 100, true) == 0.5

    def test_classes_that_are_only_guessed_do_not_count(self):
        assert metrics.balanced_accuracy(["a", "c"], ["a", "a"]) == 0.5

    def test_sequences_arrays_and_tensors_agree(self):
        predicted, true = [True, False, True, True], [True, False, False, True]
        for form in (list, tuple, np.array, torch.tensor):
            assert metrics.balanced_accuracy(form(predicted), form(true)) == 0.75

    def test_refuses(self):
        with pytest.raises(ValueError, match="`predicted` has 1 labels and `true` has 2"):
            metrics.balanced_accuracy([1], [1, 2])
        with pytest.raises(ValueError, match="`true` is empty"):
            metrics.balanced_accuracy([], [])


class TestCaptions:
    def test_every_caption_of_the_data_agrees_with_its_attributes(self, avatars):
        parsed = [metrics.parse_caption(caption) for caption in avatars["caption"].tolist()]
        for name in metrics.ATTRIBUTES:
            assert [attributes[name] for attributes in parsed] == avatars[name].tolist(), name

    def test_every_caption_of_the_data_can_be_written_again(self, avatars):
        captions = set(avatars["caption"].tolist())
        assert len(captions) == 6318
        for caption in captions:
            assert write_caption(metrics.parse_caption(caption)) == caption

    def test_classes_are_those_of_the_data(self, avatars):
        for name, classes in metrics.CLASSES.items():
            assert list(classes) == np.unique(avatars[name]).tolist(), name
        parsed = [metrics.parse_caption(caption) for caption in avatars["caption"].tolist()]
        for name, allowed in (("hat_color", attributes.HAT_COLORS), ("glasses_kind", attributes.GLASSES_KINDS)):
            assert {caption[name] for caption in parsed} == {None, *allowed}, name

    def test_example(self):
        caption = "a person with dark brown skin and long blue hair, a green hat, dark sunglasses, a happy smile, navy clothes"
        assert metrics.parse_caption(caption) == {
            "hat": True, "glasses": True, "beard": False, "smile": True, "long_hair": True, "hair_color": "blue",
            "clothes_color": "navy", "skin": "dark brown", "hat_color": "green", "glasses_kind": "dark",
        }  # fmt: skip

    @pytest.mark.parametrize(
        "caption",
        [
            "",
            "a person with tan skin and long red hair, a happy smile, navy clothes ",
            "A person with tan skin and long red hair, a happy smile, navy clothes",
            "a person with tan skin and long red hair, a happy smile, purple clothes",
            "a person with tan skin and long red hair, a beard, a green hat, a happy smile, navy clothes",
            "a person with tan skin and long red hair, navy clothes",
            "a person with tan skin and long red hair, a happy smile, a sad mouth, navy clothes",
        ],
    )
    def test_refuses(self, caption):
        with pytest.raises(ValueError, match="`caption` is "):
            metrics.parse_caption(caption)

    @pytest.mark.parametrize(("hat", "long_hair", "shows"), [(0, 0, 1), (0, 1, 1), (1, 1, 1), (1, 0, 0)])
    def test_hair_shows_unless_short_under_a_hat(self, hat, long_hair, shows):
        assert attributes.hair_shows({"hat": bool(hat), "long_hair": bool(long_hair)}) == bool(shows)


def write_caption(says: dict) -> str:
    """The caption with these attributes: `parse_caption` backwards."""
    length = "long" if says["long_hair"] else "short"
    parts = [f"a person with {says['skin']} skin and {length} {says['hair_color']} hair"]
    if says["hat_color"]:
        parts.append(f"a {says['hat_color']} hat")
    if says["glasses_kind"]:
        parts.append({"clear": "clear glasses", "dark": "dark sunglasses"}[says["glasses_kind"]])
    if says["beard"]:
        parts.append("a beard")
    parts += ["a happy smile" if says["smile"] else "a sad mouth", f"{says['clothes_color']} clothes"]
    return ", ".join(parts)
