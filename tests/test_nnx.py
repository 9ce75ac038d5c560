"""`jax_rmsnorm.nnx.RMSNorm` against `flax.nnx.RMSNorm` and float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import flax_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_cases import BF16, DTYPES, F16, F32, INPUT, MASK, H

import jax_rmsnorm
from jax_rmsnorm.nnx import RMSNorm


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """Flax's own code mixes dtypes, which the rest of the tests forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return cases.record_calls(monkeypatch)


def make(cls: type, features: int = H, **arguments: Any) -> Any:
    """A layer with a scale that is not the identity, unless the arguments give an initialiser."""
    arguments.setdefault("scale_init", lambda key, shape, dtype: cases.draw_scale(shape, dtype))
    return cls(features, rngs=nnx.Rngs(0), **arguments)


def results(layer: Any, x: jax.Array) -> cases.Results:
    graph, state = nnx.split(layer)
    y, dx, dstate = cases.results(lambda state, x: nnx.merge(graph, state)(x), state, x)
    return cases.Results(y, dx, dstate["scale"][...] if layer.use_scale else None)


def test_constructor_takes_all_that_flax_takes():
    cases.assert_signature_is_superset(RMSNorm.__init__, nnx.RMSNorm.__init__)


@pytest.mark.parametrize(("x_dtype", "param_dtype", "dtype"), DTYPES)
def test_values_and_gradients(calls, x_dtype, param_dtype, dtype):
    x = cases.draw_input((3, 4, H), x_dtype)
    arguments = {"param_dtype": param_dtype, "dtype": dtype}
    ours = results(make(RMSNorm, **arguments), x)
    assert len(calls) == 1

    # Flax rounds both operands first: the exact result is that of the rounded ones.
    common = dtype or jnp.promote_types(x_dtype, param_dtype)
    expected, size = cases.exact(
        x.astype(common), cases.draw_scale((H,), param_dtype).astype(common)
    )
    coarsest = cases.coarsest(x_dtype, param_dtype, common)
    cases.assert_same_results(ours, results(make(nnx.RMSNorm, **arguments), x), size, coarsest)
    cases.assert_near_exact(ours, expected, size, common, coarsest)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_without_scale(calls, dtype):
    x = cases.draw_input((5, H), dtype)
    ours = results(make(RMSNorm, use_scale=False), x)
    assert len(calls) == 1
    expected, size = cases.exact(x, None)
    cases.assert_same_results(ours, results(make(nnx.RMSNorm, use_scale=False), x), size, dtype)
    cases.assert_near_exact(ours, expected, size, dtype, dtype)


@pytest.mark.parametrize("epsilon", [0.5, np.float32(0.1), 1])
def test_epsilon(calls, epsilon):
    x = cases.draw_input((3, H))
    layers = [make(cls, epsilon=epsilon) for cls in (RMSNorm, nnx.RMSNorm)]
    cases.assert_trees_close(*(layer(x) for layer in layers))
    assert calls[0]["eps"] == epsilon


@pytest.mark.parametrize(("shape", "arguments"), cases.COVERED_AXES)
def test_covered_axes(calls, shape, arguments):
    x = cases.draw_input(shape)
    axes = arguments.get("feature_axes", -1)
    features = int(np.prod(np.take(shape, axes)))
    layers = [make(cls, features, **arguments) for cls in (RMSNorm, nnx.RMSNorm)]
    cases.assert_trees_close(*(results(layer, x) for layer in layers))
    assert len(calls) == 1


def as_float32(args, *, dtype):
    return tuple(None if a is None else jnp.asarray(a, F32) for a in args)


UNCOVERED = cases.UNCOVERED | {
    "promote_dtype": ({"promote_dtype": as_float32}, INPUT.astype(BF16), None),
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_what_kernels_do_not_cover_is_flax_own(calls, case):
    arguments, x, mask = UNCOVERED[case]
    flax = make(nnx.RMSNorm, x.shape[-1], **arguments)(x, mask)
    cases.assert_same_tree(make(RMSNorm, x.shape[-1], **arguments)(x, mask), flax)
    # Flax's own path is plain JAX and launches nothing that a margin could limit.
    harmless = {"implementation": "xla", "sm_margin": 4}
    cases.assert_same_tree(make(RMSNorm, x.shape[-1], **arguments, **harmless)(x, mask), flax)
    assert not calls


@pytest.mark.parametrize("case", UNCOVERED)
@pytest.mark.parametrize("option", cases.BEYOND_FLAX)
def test_options_that_flax_cannot_honour_are_errors(case, option):
    arguments, x, mask = UNCOVERED[case]
    layer = make(RMSNorm, x.shape[-1], **arguments, **option)
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"RMSNorm with {name}=.* must .* got .*leave {name} at"):
        layer(x, mask)


def test_mask_may_be_positional():
    flax = make(nnx.RMSNorm)
    cases.assert_same_tree(make(RMSNorm)(INPUT, MASK), flax(INPUT, mask=MASK))
    assert not np.allclose(flax(INPUT, MASK), flax(INPUT))


def test_axis_name(calls):
    layers = [make(cls, axis_name="rows") for cls in (RMSNorm, nnx.RMSNorm)]
    ours, flax = (jax.vmap(layer, axis_name="rows")(INPUT[0]) for layer in layers)
    cases.assert_same_tree(ours, flax)
    assert not calls
    with pytest.raises(ValueError, match="axis_name must be None, got 'rows'"):
        make(RMSNorm, axis_name="rows", zero_centered_gamma=True)(INPUT)


def test_float64(calls):
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(3, H))
        for value, arguments in (
            (x, {}),
            (x, {"dtype": F32}),
            (INPUT, {}),
            (INPUT, {"dtype": jnp.float64}),
            (INPUT, {"param_dtype": jnp.float64}),
        ):
            ours, flax = (make(cls, **arguments)(value) for cls in (RMSNorm, nnx.RMSNorm))
            cases.assert_trees_close(ours, flax)
        assert flax.dtype == jnp.float64
        with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16, got float64"):
            make(RMSNorm, zero_centered_gamma=True)(x)
    assert len(calls) == 1  # all in float32


@pytest.mark.parametrize(
    "x", [np.asarray(INPUT), np.asarray(INPUT, np.float64), np.asarray(INPUT, BF16), [1.0] * H]
)
def test_inputs_that_are_not_jax_arrays(calls, x):
    ours, flax = make(RMSNorm)(x), make(nnx.RMSNorm)(x)
    cases.assert_trees_close(ours, flax)
    assert len(calls) == 1


def test_no_rows(calls):
    assert make(RMSNorm)(jnp.ones((0, 3, H), BF16)).shape == (0, 3, H)
    assert len(calls) == 1


def test_scalars_and_wrong_shapes_fail_as_in_flax():
    for cls in (RMSNorm, nnx.RMSNorm):
        with pytest.raises(IndexError, match="out of range"):
            make(cls)(jnp.float32(1))
        with pytest.raises(TypeError, match="cannot reshape"):
            make(cls)(jnp.ones((2, H + 1)))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_scale": False},
        {"param_dtype": BF16},
        {"scale_init": nnx.initializers.normal(0.5)},
        {"scale_metadata": {"out_sharding": ("model",), "note": "a"}},
        {"scale_init": nnx.with_partitioning(nnx.initializers.normal(), ("model",))},
    ],
)
def test_parameters_and_metadata_are_flax_own(arguments):
    with jax.set_mesh(jax.make_mesh((1,), ("model",), (jax.sharding.AxisType.Auto,))):
        ours, flax = (cls(H, rngs=nnx.Rngs(7), **arguments) for cls in (RMSNorm, nnx.RMSNorm))
    cases.assert_same_tree(nnx.state(ours), nnx.state(flax))
    if flax.use_scale:
        assert type(ours.scale) is type(flax.scale)
        assert ours.scale.get_metadata() == flax.scale.get_metadata()
        specs = [nnx.get_partition_spec(nnx.state(layer))["scale"] for layer in (ours, flax)]
        assert specs[0].get_value() == specs[1].get_value()
    for name in vars(flax):
        if not name.startswith("_") and name != "scale":
            assert getattr(ours, name) == getattr(flax, name), name


def test_state_of_flax_loads():
    flax, ours = make(nnx.RMSNorm), RMSNorm(H, rngs=nnx.Rngs(1))
    before = ours(INPUT)
    nnx.update(ours, nnx.state(flax))
    cases.assert_trees_close(ours(INPUT), flax(INPUT))
    assert not np.allclose(before, ours(INPUT))


class TestZeroCenteredGamma:
    def test_fresh_layer_has_the_identity_scale(self):
        layer = RMSNorm(H, zero_centered_gamma=True, rngs=nnx.Rngs(0))
        cases.assert_same_tree(layer.scale[...], jnp.zeros(H))
        cases.assert_trees_close(layer(INPUT), nnx.RMSNorm(H, rngs=nnx.Rngs(0))(INPUT))

    def test_given_initialiser_is_respected(self):
        layer = make(RMSNorm, zero_centered_gamma=True, scale_init=nnx.initializers.ones)
        cases.assert_same_tree(layer.scale[...], jnp.ones(H))

    def test_needs_a_scale(self):
        with pytest.raises(ValueError, match="zero_centered_gamma"):
            make(RMSNorm, zero_centered_gamma=True, use_scale=False)(INPUT)

    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_values_and_gradients(self, dtype):
        x = cases.draw_input((3, H), dtype)
        scale = cases.draw_scale((H,), dtype)
        expected, size = cases.exact(x, 1 + np.asarray(scale, np.float64))
        actual = results(make(RMSNorm, zero_centered_gamma=True, param_dtype=dtype), x)
        cases.assert_near_exact(actual, expected, size, dtype, dtype)


def test_options_reach_rms_norm(calls):
    margin = jax_rmsnorm.SMMargin(forward=2, backward=3)
    layer = make(RMSNorm, rounding="before_gamma", sm_margin=margin, implementation="xla")
    x = INPUT.astype(BF16)
    y = layer(x)
    assert calls[0]["sm_margin"] == margin
    assert calls[0]["implementation"] == "xla"
    options = {"eps": 1e-6, "implementation": "xla", "dtype": F32}
    expected = jax_rmsnorm.rms_norm(
        x.astype(F32), layer.scale[...], rounding="before_gamma", **options
    )
    cases.assert_same_tree(y, expected)

    layer = make(RMSNorm, rounding="before_gamma", dtype=BF16)
    assert np.any(layer(x) != make(RMSNorm, dtype=BF16)(x))


# Each program makes one or more layers of the given class and returns arrays.


def with_jit(cls):
    layer = make(cls)
    return nnx.jit(lambda layer, x: layer(x))(layer, INPUT)


def with_grad(cls):
    layer = make(cls)

    def loss(layer, x):
        return jnp.sum(jnp.tanh(layer(x)))

    dlayer, dx = nnx.jit(nnx.grad(loss, argnums=(0, 1)))(layer, INPUT)
    return nnx.to_pure_dict(dlayer), dx


def with_split_and_merge(cls):
    graph, state = nnx.split(make(cls))
    merged = nnx.merge(graph, jax.tree.map(lambda a: 2 * a, state))
    assert isinstance(merged, cls)
    return merged(INPUT)


def stacked_layers(cls, length):
    @nnx.jit
    @nnx.split_rngs(splits=length)
    @nnx.vmap
    def create(rngs):
        return cls(H, rngs=rngs, scale_init=nnx.initializers.uniform(2.0))

    return create(nnx.Rngs(3))


def with_vmap(cls):
    return nnx.jit(nnx.vmap(lambda layer, x: layer(x)))(stacked_layers(cls, 2), INPUT)


def with_vmap_of_one_layer(cls):
    return nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 1))(make(cls), INPUT)


def with_scan(cls):
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return x + layer(x)

    def loss(layers, x):
        y = forward(layers, x)
        return jnp.sum(jnp.sin(y)), y

    dlayers, y = nnx.jit(nnx.grad(loss, has_aux=True))(stacked_layers(cls, 3), INPUT)
    return nnx.to_pure_dict(dlayers), y


def with_remat(cls):
    @nnx.remat
    def forward(layer, x):
        return jnp.sin(layer(x))

    dlayer = nnx.jit(nnx.grad(lambda layer, x: jnp.sum(forward(layer, x))))(make(cls), INPUT)
    return nnx.to_pure_dict(dlayer)


def with_captured_outputs(cls):
    class Block(nnx.Module):
        def __init__(self):
            self.norm = make(cls)

        def __call__(self, x, mask=None):
            return self.norm(x, mask)

    _, outputs = nnx.capture(Block(), nnx.Intermediate, method_outputs=nnx.Intermediate)(INPUT)
    _, masked = nnx.capture(Block(), nnx.Intermediate, method_outputs=nnx.Intermediate)(INPUT, MASK)
    return nnx.to_pure_dict(outputs), nnx.to_pure_dict(masked)


@pytest.mark.parametrize(
    "program",
    [
        with_jit,
        with_grad,
        with_split_and_merge,
        with_vmap,
        with_vmap_of_one_layer,
        with_scan,
        with_remat,
        with_captured_outputs,
    ],
)
def test_transforms(calls, program):
    ours = program(RMSNorm)
    assert calls
    cases.assert_trees_close(ours, program(nnx.RMSNorm))


def test_eval_shape():
    layer = nnx.eval_shape(lambda: RMSNorm(H, param_dtype=BF16, rngs=nnx.Rngs(0)))
    assert (layer.scale.shape, layer.scale.dtype) == ((H,), BF16)
    y = nnx.eval_shape(lambda layer, x: layer(x), layer, INPUT)
    assert (y.shape, y.dtype) == (INPUT.shape, F32)
