"""What benchmarks of quantizers share: calibration sets, runs that are kept, and the claim about Fréchet distances."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from benchmarks import _quantized
from benchmarks._bench import Benchmark
from benchmarks._quantized import QuantizedQuality, add_models, calibration_inputs
from benchmarks._record import Recorder
from benchmarks._zoo import ZooModel, _model
from benchmarks.zoo import _avatars
from diffusers_ext.quantization import PTQConfig, calibrate
from tests import ptq

MODEL = "fashion-ddpm"


@pytest.mark.parametrize(("model", "scale"), [("avatars-sd", 3.0), ("fashion-dit", 3.0), (MODEL, None)])
def test_models_are_calibrated_on_other_captions_than_those_of_the_pictures(model, scale):
    inputs = calibration_inputs(model, _quantized.SAMPLES, scale)
    prompts, drawn = inputs.pop("prompts", None), _model(model).conditions(_quantized.DRAWN)
    assert inputs == ({"num_samples": _quantized.SAMPLES} if scale is None else {"guidance_scale": scale})
    assert set(inputs) <= {*inspect.signature(calibrate).parameters, "guidance_scale"}
    if model == "avatars-sd":
        assert len(set(prompts)) == _quantized.SAMPLES and set(prompts) <= set(_avatars.captions("generator"))
        assert not set(prompts) & set(drawn) and len(set(drawn)) == _quantized.DRAWN
    elif scale is not None:
        assert prompts == [i % 10 for i in range(_quantized.SAMPLES)]


def test_another_model_is_refused():
    with pytest.raises(ValueError, match="`model` is 'avatars-flow'; allowed are avatars-sd, fashion-dit"):
        calibration_inputs("avatars-flow", 4, 3.0)


def minmax(bits: int) -> PTQConfig:
    return PTQConfig(method="minmax", weight_bits=bits, act_bits=8, attention=False, calibration_steps=1)


def study(**options) -> QuantizedQuality:
    variants = options.pop("variants", {"W8A8": minmax(8), "W4A8": minmax(4)})
    return QuantizedQuality(
        MODEL, 2, variants, {"over": ("W8A8", "W4A8", 0.0)}, minutes=1, pictures=4, samples=2,
        zoo=lambda name: ZooModel(name, ptq.tiny()[0]), **options,
    )  # fmt: skip


def measured(part: QuantizedQuality) -> Recorder:
    recorder = Recorder("q_diffusion", part.settings, part.seeds)
    part.measure(recorder, None)
    assert [entry["name"] for entry in recorder.claims] == part.claims
    return recorder


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Few pictures, and two nets that are linear maps."""
    monkeypatch.setattr(_quantized, "CACHE", tmp_path)
    monkeypatch.setattr(_quantized, "PART", 4)
    monkeypatch.setattr(_quantized, "DRAWN", 8)
    monkeypatch.setattr(_quantized, "RESAMPLES", 20)

    def net(features: int):
        def of(pictures: np.ndarray) -> torch.Tensor:
            flat = torch.from_numpy(pictures).double().flatten(1)
            return flat @ ptq.formula(flat.shape[1], features).double()

        return of

    monkeypatch.setattr(_quantized, "feature_nets", lambda model: {"judge": net(20), "efficientnet": net(24)})
    return tmp_path


def test_runs_are_kept_and_shared(small, monkeypatch):
    part = study(costs=["W4A8"], frechet=["W8A8"])
    first = measured(part)
    claims = {entry["name"].removeprefix(f"{MODEL}_"): entry for entry in first.claims}
    assert set(claims) == {"over", "calibration_minutes_W4A8", "frechet_W8A8_judge", "frechet_W8A8_efficientnet"}
    assert claims["over"]["value"] > 6 and claims["over"]["holds"], "8 bits are nearer than 4"
    assert all(claims[f"frechet_W8A8_{net}"]["value"] < 1 for net in _quantized.NETS)
    rows = {row[0]: row for row in first.tables[f"{MODEL}: quality"]["rows"]}
    assert rows["W4A8"][1] < rows["W8A8"][1] < rows["full precision"][1] == 1
    files = {file.name for file in small.iterdir()}
    # full precision: its own seeds and others, two parts each; one variant with as many as a distance needs
    assert len(files) == 4 + 2 + 1 + 2 and {name.rpartition(".")[2] for name in files} == {"npy", "json"}

    with monkeypatch.context() as patch:
        for name in ("calibrate", "copy"):
            patch.setattr(_quantized, name, None)
        patch.setattr(ZooModel, "generate", None)
        again = measured(part)
    assert again.claims == first.claims and again.tables == first.tables

    other = study(variants={"W8A8": minmax(8), "W4A8": minmax(5)})
    measured(other)
    assert len({file.name for file in small.iterdir()} - files) == 2, "pictures and cost of the new variant alone"
    assert {file.name for file in small.iterdir()} >= files


def test_a_run_is_known_by_what_it_follows_from(small, monkeypatch):
    pytest.importorskip("optimum.quanto")
    part, zoo = study(), ZooModel(MODEL, ptq.tiny()[0])
    learnt = PTQConfig(method="q_diffusion")

    def stems(changed: str = "nothing"):
        configs = (None, minmax(8), learnt, PTQConfig(method="minmax", backend="quanto"))
        with monkeypatch.context() as patch:
            patch.setattr(_quantized.proofs, "source_hash", lambda name: "new" if name.endswith(changed) else name)
            return [_quantized._Run(part, zoo, config).stem for config in configs]

    before = stems()
    assert len(set(before)) == 4 and stems() == before

    def same(changed: str) -> list[bool]:
        return [a == b for a, b in zip(before, stems(changed), strict=True)]

    assert same(".quantization.q_diffusion") == [True, True, False, True]
    assert same(".quantization.calibration") == [True, False, False, False]
    assert same(".quantization.quanto") == [True, True, True, False]
    assert same("_zoo") == [False] * 4
    part.steps = 3
    assert not set(stems()) & set(before)


def test_frechet_claims_are_about_other_seeds(small):
    """A shift as large as that between seeds fails, a slight one holds."""
    generator = np.random.default_rng(0)
    full, others = generator.random((2, 48, 6, 6, 1))
    recorder = Recorder("q_diffusion", {}, {})
    drawn = {"near": full + 1e-3 * others, "far": full + 0.5}
    _quantized.claim_frechet(recorder, MODEL, drawn, full, others)
    holds = {entry["name"]: entry["holds"] for entry in recorder.claims}
    assert holds == {
        f"{MODEL}_frechet_{label}_{net}": label == "near" for net in _quantized.NETS for label in ("near", "far")
    }
    rows = recorder.tables[f"{MODEL}: Fréchet distances of 48 pictures"]["rows"]
    for _, label, distance, seeds, ratio, low, high in rows:
        assert ratio == pytest.approx(distance / seeds) and low < ratio < high
        assert (ratio < 1e-3) == (label == "near")


def test_parts_are_of_the_first_model_alone():
    benchmark = Benchmark("q_diffusion")
    add_models(
        benchmark, {MODEL: (2, None, 1), "fashion-dit": (2, 3.0, 1)}, {"a": minmax(8), "b": minmax(4)},
        {"over": ("a", "b", None)}, parts={"c": minmax(6)}, part_comparisons={"part": ("c", "b", None)}, accuracy=["a"],
    )  # fmt: skip
    assert benchmark.claims == [f"{MODEL}_over", f"{MODEL}_part", "fashion-dit_over", "fashion-dit_accuracy_a"]
    with pytest.raises(ValueError, match=r"`frechet` name \['d'\]; variants are \['W8A8', 'W4A8'\]"):
        study(frechet=["d"])


def test_other_packages_are_variants(small):
    """torchao's tensors say what the float ones held; what is counted is inside."""
    pytest.importorskip("torchao")
    part = study(variants={"W8A8": PTQConfig(method="minmax", backend="torchao"), "W4A8": minmax(4)})
    rows = {row[0]: row for row in measured(part).tables[f"{MODEL}: quality"]["rows"]}
    assert rows["W4A8"][1] < 0.5 < rows["W8A8"][1] < 0.95, "of a net that is mostly convolutions"
    assert rows["W8A8"][3] > rows["W4A8"][3], "in dB"
