"""``overwrite`` of add_rms_norm: h in an operand's buffer, copies only where something else reads that, same values."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import draw, needs_8_devices
from compare import assert_same_bits
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from sharded import AXIS_TYPES, compile_on, put

from jax_rmsnorm import add_rms_norm

BF16, F32 = jnp.bfloat16, jnp.float32
SHAPE = (24, 64)
SUMMANDS = pytest.mark.parametrize("summand", ["x", "residual"])
norm = functools.partial(add_rms_norm, implementation="kernel")


def operands(dtype=F32):
    return [draw(seed, shape, dtype) for seed, shape in enumerate((SHAPE, SHAPE, SHAPE[-1:]))]


def compile_for(f, *arguments, donate=()):
    return jax.jit(f, donate_argnums=donate).lower(*arguments).compile()


def copies(compiled) -> int:
    """Of arrays of the operands' shape."""
    return len(re.findall(r"= \w+\[24,64\]\S* copy\(", compiled.as_text()))


def aliases(compiled) -> list[str]:
    """What the kernel's custom call says of results in operands' buffers."""
    (call,) = [
        line
        for line in compiled.as_text().splitlines()
        if 'custom_call_target="jax_rmsnorm_add_forward"' in line
    ]
    return re.findall(r"output_to_operand_aliasing=\{(.*?\))", call)


@SUMMANDS
def test_a_donated_operand_is_overwritten_and_nothing_copied(summand):
    x, residual, gamma = operands()
    f = functools.partial(norm, overwrite=summand)
    given = ("x", "residual").index(summand)
    compiled = compile_for(lambda *a: f(*a)[::-1], x, residual, gamma, donate=given)
    # The kernel's first operand is the residual.
    assert aliases(compiled) == [f"{{1}}: ({1 - given}, {{}})"]
    assert copies(compiled) == 0
    want = norm(x, residual, gamma)
    h, y = compiled(jnp.copy(x), jnp.copy(residual), gamma)
    assert_same_bits(h, want[1])
    assert_same_bits(y, want[0])


def test_by_default_h_is_copied_to_a_donated_operand():
    """What ``overwrite`` spares."""
    x, residual, gamma = operands()
    compiled = compile_for(lambda *a: norm(*a)[::-1], x, residual, gamma, donate=1)
    assert aliases(compiled) == []
    assert copies(compiled) == 1


@SUMMANDS
def test_an_operand_that_is_still_needed_keeps_its_value(summand):
    x, residual, gamma = operands(BF16)

    @jax.jit
    def f(x, residual, gamma):
        y, h = norm(x, residual, gamma, overwrite=summand)
        return y, h, x - residual

    before = np.asarray(x), np.asarray(residual)
    y, h, difference = f(x, residual, gamma)
    want = norm(x, residual, gamma)
    assert_same_bits(y, want[0])
    assert_same_bits(h, want[1])
    assert_same_bits(difference, x - residual)
    assert_same_bits(x, before[0])
    assert_same_bits(residual, before[1])


@SUMMANDS
def test_one_operand_as_both(summand):
    x, _, gamma = operands()
    overwriting = jax.jit(functools.partial(norm, overwrite=summand))
    assert_same_bits(overwriting(x, x, gamma), norm(x, x, gamma))


@SUMMANDS
def test_outside_jit_arguments_keep_their_values(summand):
    x, residual, gamma = operands()
    before = np.asarray(x), np.asarray(residual)
    y, h = norm(x, residual, gamma, overwrite=summand)
    want = norm(x, residual, gamma)
    assert_same_bits(y, want[0])
    assert_same_bits(h, want[1])
    assert_same_bits(x, before[0])
    assert_same_bits(residual, before[1])


@SUMMANDS
@pytest.mark.parametrize("dtype", [F32, BF16, jnp.float16])
@pytest.mark.parametrize("shape", [(9, 64), (3, 21), (2, 5001), (2, 20_480)], ids=str)
def test_values_and_gradients_are_those_of_the_default(shape, dtype, summand):
    x, residual, dy, dh = (draw(seed, shape, dtype) for seed in range(4))
    gamma = draw(4, shape[-1:], F32, offset=1.0)

    @functools.partial(jax.jit, static_argnums=0)
    def run(overwrite, *operands):
        results, vjp = jax.vjp(functools.partial(norm, overwrite=overwrite), *operands)
        return *results, *vjp((dy, dh))

    got = run(summand, x, residual, gamma)
    want = run(None, x, residual, gamma)
    assert_same_bits(got, want)


def test_a_chain_of_layers_needs_less_memory():
    x, residual, gamma = operands()
    matrix = draw(3, (64, 64), F32)

    def layers(x, residual, gamma, matrix, overwrite):
        for _ in range(4):
            y, residual = norm(x, residual, gamma, overwrite=overwrite)
            x = jnp.tanh(y @ matrix)
        return x, residual

    def compiled(overwrite):
        f = functools.partial(layers, overwrite=overwrite)
        return compile_for(f, x, residual, gamma, matrix, donate=(0, 1))

    overwriting, default = compiled("residual"), compiled(None)
    assert copies(overwriting) <= copies(default)
    spared = (
        default.memory_analysis().temp_size_in_bytes
        - overwriting.memory_analysis().temp_size_in_bytes
    )
    assert spared >= x.nbytes
    got = overwriting(jnp.copy(x), jnp.copy(residual), gamma, matrix)
    assert_same_bits(got, default(x, residual, gamma, matrix))


@SUMMANDS
def test_vmap_and_scan(summand):
    x, residual = (draw(seed, (3, *SHAPE), F32) for seed in (0, 1))
    gamma = draw(2, SHAPE[-1:], F32)
    f = functools.partial(norm, overwrite=summand)
    got = jax.jit(jax.vmap(f, in_axes=(0, 0, None)))(x, residual, gamma)
    assert_same_bits(got, norm(x, residual, gamma))

    def layer(stream, x):
        y, h = f(x, stream, gamma)
        return h, y

    def layer_of_default(stream, x):
        y, h = norm(x, stream, gamma)
        return h, y

    run = jax.jit(lambda layer, *a: jax.lax.scan(layer, *a), static_argnums=0)
    got = run(layer, residual[0], x)
    assert_same_bits(got, run(layer_of_default, residual[0], x))


@needs_8_devices
@AXIS_TYPES
@SUMMANDS
def test_sharded(summand, axis_type):
    mesh = jax.make_mesh((8,), ("rows",), (axis_type,))
    x, residual, gamma = operands()
    sharded = put(mesh, x, "rows"), put(mesh, residual, "rows"), put(mesh, gamma)
    compiled = compile_on(mesh, functools.partial(norm, overwrite=summand), *sharded)
    assert len(aliases(compiled)) == 1
    assert_same_bits(compiled(*sharded), norm(x, residual, gamma))
    in_shards = jax.shard_map(
        functools.partial(norm, overwrite=summand),
        mesh=jax.make_mesh((8,), ("rows",), (AxisType.Auto,)),
        in_specs=(P("rows"), P("rows"), P()),
        out_specs=P("rows"),
    )
    assert_same_bits(jax.jit(in_shards)(x, residual, gamma), norm(x, residual, gamma))


def test_a_wider_x_is_not_overwritten():
    x, residual, gamma = operands()
    with pytest.raises(
        ValueError, match=r"overwrite='x' needs an x of h's dtype.*bfloat16; got float32"
    ):
        add_rms_norm(x, residual.astype(BF16), gamma, overwrite="x")
    with pytest.raises(
        ValueError, match=r"overwrite must be one of None, 'x', 'residual', got 'h'"
    ):
        add_rms_norm(x, residual, gamma, overwrite="h")
