"""`jax_rmsnorm.linen.RMSNorm` against `flax.linen.RMSNorm` and float64."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import flax
import flax_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax_cases import BF16, DTYPES, F16, F32, INPUT, MASK, H

import jax_rmsnorm
from jax_rmsnorm.linen import RMSNorm

CLASSES = (RMSNorm, nn.RMSNorm)
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def standard_promotion() -> Iterator[None]:
    """Flax's own code mixes dtypes, which the rest of the tests forbid."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return cases.record_calls(monkeypatch)


def draw_init(key, shape, dtype):
    return cases.draw_scale(tuple(shape), dtype)


def results(layer: nn.Module, x: jax.Array) -> cases.Results:
    """For a layer with the scale of `draw_init`."""
    shape = [x.shape[axis] for axis in sorted(np.ravel(layer.feature_axes) % x.ndim)]
    variables = {"params": {"scale": cases.draw_scale(tuple(shape), layer.param_dtype)}}
    y, dx, dvariables = cases.results(layer.apply, variables if layer.use_scale else {}, x)
    return cases.Results(y, dx, dvariables["params"]["scale"] if layer.use_scale else None)


def init_and_apply(layer: nn.Module, x: Any, mask: Any = None) -> tuple[Any, jax.Array]:
    variables = layer.init(KEY, x, mask=mask)
    return variables, layer.apply(variables, x, mask=mask)


def test_constructor_takes_all_that_flax_takes():
    cases.assert_signature_is_superset(RMSNorm, nn.RMSNorm)
    assert RMSNorm(0.5, BF16, BF16, False).epsilon == 0.5


@pytest.mark.parametrize(("x_dtype", "param_dtype", "dtype"), DTYPES)
def test_values_and_gradients(calls, x_dtype, param_dtype, dtype):
    x = cases.draw_input((3, 4, H), x_dtype)
    ours, flax = (results(cls(param_dtype=param_dtype, dtype=dtype), x) for cls in CLASSES)
    assert len(calls) == 1

    expected, size = cases.exact(x, cases.draw_scale((H,), param_dtype))
    result = dtype or jnp.promote_types(x_dtype, param_dtype)
    coarsest = cases.coarsest(x_dtype, param_dtype, result)
    cases.assert_same_results(ours, flax, size, coarsest)
    cases.assert_near_exact(ours, expected, size, result, coarsest)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_without_scale(calls, dtype):
    x = cases.draw_input((5, H), dtype)
    ours, flax = (results(cls(use_scale=False), x) for cls in CLASSES)
    assert len(calls) == 1
    expected, size = cases.exact(x, None)
    cases.assert_same_results(ours, flax, size, dtype)
    cases.assert_near_exact(ours, expected, size, dtype, dtype)
    assert not RMSNorm(use_scale=False).init(KEY, x)


@pytest.mark.parametrize("epsilon", [0.5, np.float32(0.1), 1])
def test_epsilon(calls, epsilon):
    layers = [cls(epsilon=epsilon, use_scale=False) for cls in CLASSES]
    cases.assert_trees_close(*(layer.apply({}, INPUT) for layer in layers))
    assert calls[0]["eps"] == epsilon


@pytest.mark.parametrize(("shape", "arguments"), cases.COVERED_AXES)
def test_covered_axes(calls, shape, arguments):
    x = cases.draw_input(shape)
    layers = [cls(scale_init=draw_init, **arguments) for cls in CLASSES]
    cases.assert_trees_close(*(results(layer, x) for layer in layers))
    assert len(calls) == 1
    shapes = [jax.eval_shape(layer.init, KEY, x) for layer in layers]
    assert shapes[0] == shapes[1]


UNCOVERED = cases.UNCOVERED | {
    "two features": ({"feature_axes": (1, 2)}, INPUT, None),
    "force_float32": ({"force_float32_reductions": False}, INPUT.astype(BF16), None),
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_what_kernels_do_not_cover_is_flax_own(calls, case):
    arguments, x, mask = UNCOVERED[case]
    arguments = {"scale_init": draw_init, **arguments}
    flax = init_and_apply(nn.RMSNorm(**arguments), x, mask)
    cases.assert_same_tree(init_and_apply(RMSNorm(**arguments), x, mask), flax)
    # Flax's own path is plain JAX and launches nothing that a margin could limit.
    harmless = RMSNorm(**arguments, implementation="xla", sm_margin=4)
    cases.assert_same_tree(init_and_apply(harmless, x, mask), flax)
    assert not calls


@pytest.mark.parametrize("case", UNCOVERED)
@pytest.mark.parametrize("option", cases.BEYOND_FLAX)
def test_options_that_flax_cannot_honour_are_errors(case, option):
    arguments, x, mask = UNCOVERED[case]
    name = next(iter(option))
    with pytest.raises(ValueError, match=f"RMSNorm with {name}=.* must .* got .*leave {name} at"):
        RMSNorm(**arguments, **option).init(KEY, x, mask=mask)


def test_arguments_are_those_of_flax_with_residual_and_copies():
    ours, flax = (inspect.signature(inspect.unwrap(cls.__call__)).parameters for cls in CLASSES)
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("residual", "copies")
    ]
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in (*flax.values(), *more)
    ]


def test_axis_name(calls):
    def apply(cls):
        return jax.vmap(cls(axis_name="rows", use_scale=False).bind({}), axis_name="rows")(INPUT[0])

    cases.assert_same_tree(*map(apply, CLASSES))
    assert not calls
    with pytest.raises(ValueError, match="axis_name must be None, got 'rows'"):
        RMSNorm(axis_name="rows", zero_centered_gamma=True).init(KEY, INPUT)


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
            ours, flax = (init_and_apply(cls(**arguments), value) for cls in CLASSES)
            cases.assert_trees_close(ours, flax)
        assert flax[1].dtype == jnp.float64
        with pytest.raises(ValueError, match="x must be float32, bfloat16 or float16, got float64"):
            RMSNorm(zero_centered_gamma=True).init(KEY, x)
        # What counts is the scale that is stored, not the param_dtype that a new one would have.
        scale = {"params": {"scale": cases.draw_scale((H,), jnp.float64)}}
        cases.assert_same_tree(*(cls().apply(scale, INPUT) for cls in CLASSES))
    assert len(calls) == 2  # init and apply, all in float32


@pytest.mark.parametrize(
    "x",
    [
        np.asarray(INPUT),
        np.asarray(INPUT, np.float64),
        np.asarray(INPUT, BF16),
        jnp.broadcast_to(2.0, (3, H)),
    ],
    ids=["float32", "float64", "bfloat16", "weak"],
)
def test_numpy_and_weakly_typed_inputs(calls, x):
    layers = [cls(param_dtype=BF16) for cls in CLASSES]
    scale = {"params": {"scale": np.asarray(cases.draw_scale((H,), BF16))}}
    ours, flax = (layer.apply(scale, x) for layer in layers)
    assert (ours.dtype, ours.weak_type) == (flax.dtype, flax.weak_type)
    cases.assert_within(ours, flax, abs(np.asarray(flax)), ours.dtype, 1)
    assert len(calls) == 1


def test_no_rows(calls):
    assert init_and_apply(RMSNorm(), jnp.ones((0, 3, H), BF16))[1].shape == (0, 3, H)
    assert len(calls) == 2


def test_scalars_fail_as_in_flax():
    for cls in CLASSES:
        with pytest.raises(IndexError, match="out of range"):
            cls().init(KEY, jnp.float32(1))


def test_scale_of_the_wrong_shape_fails_as_in_flax():
    for cls in CLASSES:
        with pytest.raises(flax.errors.ScopeParamShapeError):
            cls().apply({"params": {"scale": jnp.ones(H)}}, jnp.ones((2, H + 1)))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_scale": False},
        {"param_dtype": BF16},
        {"scale_init": nn.initializers.normal(0.5)},
        {"scale_init": nn.with_partitioning(nn.initializers.normal(), ("model",))},
        {"scale_init": nn.with_logical_partitioning(nn.initializers.normal(), ("embed",))},
    ],
)
def test_parameters_and_metadata_are_flax_own(arguments):
    ours, flax = (init_and_apply(cls(**arguments), INPUT) for cls in CLASSES)
    cases.assert_same_tree(ours[0], flax[0])
    cases.assert_trees_close(ours[1], flax[1])
    assert nn.get_partition_spec(ours[0]) == nn.get_partition_spec(flax[0])


def test_parameters_of_a_model_with_flax_layers_load():
    """Flax names layers after their classes, here ``RMSNorm_0`` and ``RMSNorm_1``."""

    class Block(nn.Module):
        norm: Any

        @nn.compact
        def __call__(self, x):
            x = nn.Dense(H)(self.norm(scale_init=nn.initializers.normal())(x))
            return self.norm(name="last")(self.norm()(x))

    variables = Block(nn.RMSNorm).init(KEY, INPUT)
    assert {"RMSNorm_0", "RMSNorm_1", "last"} < set(variables["params"])
    cases.assert_same_tree(Block(RMSNorm).init(KEY, INPUT), variables)
    cases.assert_trees_close(*(Block(cls).apply(variables, INPUT) for cls in CLASSES))


class TestZeroCenteredGamma:
    def test_fresh_layer_has_the_identity_scale(self):
        variables, y = init_and_apply(RMSNorm(zero_centered_gamma=True), INPUT)
        cases.assert_same_tree(variables, {"params": {"scale": jnp.zeros(H)}})
        cases.assert_trees_close(y, init_and_apply(nn.RMSNorm(), INPUT)[1])

    def test_given_initialiser_is_respected(self):
        layer = RMSNorm(zero_centered_gamma=True, scale_init=nn.initializers.ones)
        cases.assert_same_tree(layer.init(KEY, INPUT), {"params": {"scale": jnp.ones(H)}})

    def test_needs_a_scale(self):
        with pytest.raises(ValueError, match="zero_centered_gamma"):
            RMSNorm(zero_centered_gamma=True, use_scale=False).init(KEY, INPUT)

    def test_clone_keeps_the_choice_open(self):
        layer = RMSNorm().clone(zero_centered_gamma=True)
        cases.assert_same_tree(layer.init(KEY, INPUT), {"params": {"scale": jnp.zeros(H)}})

    @pytest.mark.parametrize("dtype", [F32, BF16])
    def test_values_and_gradients(self, dtype):
        x = cases.draw_input((3, H), dtype)
        scale = cases.draw_scale((H,), dtype)
        expected, size = cases.exact(x, 1 + np.asarray(scale, np.float64))
        actual = results(RMSNorm(zero_centered_gamma=True, param_dtype=dtype), x)
        cases.assert_near_exact(actual, expected, size, dtype, dtype)


def test_options_reach_rms_norm(calls):
    margin = jax_rmsnorm.SMMargin(forward=2, backward=3)
    layer = RMSNorm(rounding="before_gamma", sm_margin=margin, implementation="xla", dtype=BF16)
    x, scale = INPUT.astype(BF16), cases.draw_scale((H,))
    y = layer.apply({"params": {"scale": scale}}, x)
    assert calls[0]["sm_margin"] == margin
    assert calls[0]["implementation"] == "xla"
    expected = jax_rmsnorm.rms_norm(
        x, scale, rounding="before_gamma", eps=1e-6, implementation="xla"
    )
    cases.assert_same_tree(y, expected)
    once = RMSNorm(dtype=BF16).apply({"params": {"scale": scale}}, x)
    assert np.any(y != once)


# Each program applies a layer, or several, of the given class and returns arrays.


def with_jit_and_grad(cls):
    layer = cls(scale_init=draw_init)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def loss(variables, x):
        return jnp.sum(jnp.tanh(layer.apply(variables, x)))

    return loss(jax.jit(layer.init)(KEY, INPUT), INPUT)


def grad_of_layers(module, x=INPUT):
    variables = module.init(KEY, x)
    return jax.jit(jax.grad(lambda v: jnp.sum(jnp.tanh(module.apply(v, x)))))(variables)


def with_scan(cls):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + cls(scale_init=nn.initializers.uniform(2.0))(x), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return scan()(x, None)[0]

    return grad_of_layers(Model())


def with_remat(cls):
    return grad_of_layers(nn.remat(cls)(scale_init=draw_init))


def with_vmap(cls):
    layers = nn.vmap(cls, variable_axes={"params": 0}, split_rngs={"params": True})
    return grad_of_layers(layers(scale_init=nn.initializers.uniform(2.0)))


def with_vmap_of_one_layer(cls):
    layer = nn.vmap(cls, variable_axes={"params": None}, split_rngs={"params": False}, in_axes=1)
    return grad_of_layers(layer(scale_init=draw_init))


def with_captured_intermediates(cls):
    layer = cls(scale_init=draw_init)
    variables = layer.init(KEY, INPUT)
    capture = functools.partial(layer.apply, variables, INPUT, capture_intermediates=True)
    return capture(), capture(mask=MASK)


@pytest.mark.parametrize(
    "program",
    [
        with_jit_and_grad,
        with_scan,
        with_remat,
        with_vmap,
        with_vmap_of_one_layer,
        with_captured_intermediates,
    ],
)
def test_transforms(calls, program):
    ours = program(RMSNorm)
    assert calls
    cases.assert_trees_close(ours, program(nn.RMSNorm))


@pytest.mark.parametrize("mask", [None, MASK])
def test_eval_shape_and_tabulate(mask):
    ours, flax = (jax.eval_shape(cls(dtype=BF16).init, KEY, INPUT) for cls in CLASSES)
    assert ours == flax
    tables = [cls(param_dtype=BF16).tabulate(KEY, INPUT, mask=mask) for cls in CLASSES]
    assert tables[0] == tables[1]
    assert "48" in tables[0]
