"""The stock models and pipelines that methods are put on: each works, so that a rule that fails tells of the method."""

from __future__ import annotations

import pytest
import torch

from tests.common.models import MODELS, STOCKS, Abort, abort, is_here


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_finite_and_depends_on_its_inputs(name, world):
    model = MODELS[name]
    bare = world.model(model)
    outputs = model.run(bare, 3)
    assert all(output.isfinite().all() for output in outputs)
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(model.predict(bare, 1), outputs[1])
    assert not torch.equal(model.predict(bare, 1, seed=1), outputs[1])
    assert len(model.predict(bare, 0, batch=3)) == 3 * len(outputs[0]) // 2
    assert model.predict(bare.to(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", STOCKS)
def test_a_pipeline_draws_and_survives_an_abort(name, world):
    stock = STOCKS[name]
    if stock.zoo and not is_here(name):
        pytest.skip(f"the zoo has no checkpoint {name!r} yet: methods are not tested on it")
    pipe = world.pipe(stock)
    drawn = stock.draw(pipe)
    assert drawn.isfinite().all() and drawn.double().std() > 0
    assert torch.equal(stock.draw(pipe), drawn)
    assert not torch.equal(stock.draw(pipe, seed=1), drawn)
    abort(stock, pipe)
    assert torch.equal(stock.draw(pipe), drawn)


def test_an_abort_reaches_the_caller(world):
    stock = STOCKS["tiny-ddpm"]
    with pytest.raises(AssertionError, match="not more than 9 times"):
        abort(stock, world.pipe(stock), after=9)
    assert issubclass(Abort, Exception)
