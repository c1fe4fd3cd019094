"""Networks of Lipschitz layers: published shapes, and a proven gain whatever the weights."""

import keras
import numpy as np
import pytest

from tf_lyapunov import layers, models
from tf_lyapunov.certification import lipschitz_upper_bound
from tf_lyapunov.export import export_plain
from tf_lyapunov.models.lipschitz import CONVEX_POTENTIAL_SIZES, FAMILIES

TINY = [
    *({"name": "two_conv_two_dense", "filters": [4, 6], "widths": [8], "family": f}
      for f in FAMILIES),
    {"name": "two_conv_two_dense", "filters": [4], "widths": [], "activation": "householder"},
    {"name": "kw_large", "channels": 4, "units": 8},
    {"name": "kw_large", "channels": 4, "units": 8, "family": "sandwich", "head": "bounded"},
    {"name": "lip_conv_net", "depth": 10, "channels": 2},
    {"name": "convex_potential", "depth": 3, "channels": 5, "dense_depth": 2, "units": 6},
    {"name": "convex_potential", "depth": 1, "channels": 5, "dense_depth": 1, "units": 6,
     "size": None, "head": "truncated"},
    {"name": "liresnet", "blocks": 2, "channels": 4, "units": 8, "activation": "relu"},
]  # fmt: skip


@pytest.mark.parametrize("spec", TINY, ids=str)
def test_the_gain_is_bounded_by_the_construction_at_random_weights(spec):
    model = models.build(spec, (8, 8, 3), 4, seed=1)
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(0.3 * rng.standard_normal(variable.shape))
    x = rng.standard_normal((3, 8, 8, 3)).astype("float32")
    logits = keras.ops.convert_to_numpy(model(x))
    assert logits.shape == (3, 4) and np.ptp(logits) > 0
    head = 2.0 if spec.get("head", "normalized") == "normalized" else 1.0
    assert 0.01 < lipschitz_upper_bound(model).gain_upper_bound <= head * (1 + 1e-6)
    plain = keras.ops.convert_to_numpy(export_plain(model)(x))
    assert np.max(np.abs(plain - logits)) <= 1e-5 * max(1.0, np.max(np.abs(logits)))


@pytest.mark.parametrize("spec", TINY, ids=str)
def test_names_do_not_depend_on_what_else_the_process_has_built(spec):
    with keras.StatelessScope():
        first, second = (models.build(spec, (8, 8, 3), 4) for _ in range(2))
    names = [[v.path for v in model.weights] for model in (first, second)]
    assert names[0] == names[1] and len(set(names[0])) == len(names[0])


def count(shapes):
    return sum(int(np.prod(shape)) for shape in shapes)


def trainable(model):
    return count(v.shape for v in model.trainable_variables)


def test_the_mnist_network_has_the_published_parameters():
    model = models.two_conv_two_dense(family="almost_orthogonal")
    shapes = [(4, 4, 1, 16), (16,), (4, 4, 16, 32), (32,), (1568, 100), (100,), (100, 10), (10,)]
    assert trainable(model) == count(shapes) == models.cnn((28, 28, 1), 10).count_params()


def test_kw_large_has_the_published_layers():
    model = models.kw_large(family="almost_orthogonal")
    shapes = [(3, 3, 3, 32), (4, 4, 32, 32), (3, 3, 32, 64), (4, 4, 64, 64), (4096, 512)]
    shapes += [(512, 512), (512, 10)]
    assert trainable(model) == count(shapes) + sum(shape[-1] for shape in shapes)


@pytest.mark.parametrize("depth", [5, 10])
def test_lip_conv_net_has_as_many_convolutions_as_its_name_says(depth):
    model = models.lip_conv_net(depth=depth, channels=2)
    convolutions = [v for v in model.layers if isinstance(v, layers.SkewOrthogonalConv2D)]
    assert len(convolutions) == depth
    filters = [2 * 2 ** (i * 5 // depth) for i in range(depth)]
    assert [v.filters for v in convolutions] == filters
    assert model.get_layer("flatten").output.shape == (None, 32)
    with pytest.raises(ValueError, match="multiple of 5"):
        models.lip_conv_net(depth=7)


def test_the_published_sizes_of_convex_potential_networks():
    assert CONVEX_POTENTIAL_SIZES["S"] == (20, 45, 7, 2048)
    model = models.convex_potential((4, 4, 3), 10, "S", units=8)
    convolutions = [v for v in model.layers if isinstance(v, layers.ConvexPotentialConv2D)]
    dense = [v for v in model.layers if isinstance(v, layers.ConvexPotentialDense)]
    assert (len(convolutions), len(dense)) == (20, 7)
    expected = 20 * (9 * 45 * 45 + 45) + 7 * (45 * 8 + 8) + 45 * 10 + 10
    assert trainable(model) == expected


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "kw_large", "family": "plain"}, "family"),
        ({"name": "kw_large", "activation": "gelu"}, "activation"),
        ({"name": "kw_large", "head": "softmax"}, "head"),
        ({"name": "convex_potential", "size": "XXL"}, "size"),
        ({"name": "convex_potential", "size": None}, "depth"),
        ({"name": "liresnet", "family": "sandwich"}, "sandwich"),
        ({"name": "liresnet", "blocks": 0}, "blocks"),
    ],
)
def test_wrong_descriptions_are_named(spec, message):
    with pytest.raises(ValueError, match=message):
        models.build(spec, (8, 8, 3), 4)
