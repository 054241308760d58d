"""The models that fill an accelerator are the published ones, and every parameter is covered."""

import jax
import pytest
from lib.large import LARGE

import natgrad_jax as ng

pytestmark = pytest.mark.once
# Of torchvision's ResNet-50 and OpenAI's GPT-2 small
PARAMETERS = {"resnet50": 25_557_032, "gpt2": 124_439_808}


@pytest.mark.parametrize("name", LARGE)
def test_it_is_the_published_model(name: str) -> None:
    model = LARGE[name]
    params = jax.eval_shape(model.init, 0)
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]
    batch = jax.eval_shape(lambda: model.draw(2))
    layers = ng.find_layers(model.loss_fn, params, batch)
    assert not layers.uncovered
