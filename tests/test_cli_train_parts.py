"""The parts of ``jax-rmsnorm train``: model, step, text, loop, progress."""

from __future__ import annotations

import dataclasses
import io
import math
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from jax_rmsnorm.cli._errors import CommandError
from jax_rmsnorm.cli._layout import Layout
from jax_rmsnorm.cli._train.config import PRESETS, Config
from jax_rmsnorm.cli._train.corpus import Corpus
from jax_rmsnorm.cli._train.generate import sample
from jax_rmsnorm.cli._train.history import History, Throughput
from jax_rmsnorm.cli._train.interrupt import StopOnInterrupt
from jax_rmsnorm.cli._train.loop import Job, train
from jax_rmsnorm.cli._train.model import normalize_and_rotate, rotary_angles
from jax_rmsnorm.cli._train.progress import reporter
from jax_rmsnorm.cli._train.step import State, Trainer, build
from jax_rmsnorm.nnx import RMSNorm

CONFIG = dataclasses.replace(
    PRESETS["cpu"], d_model=32, layers=2, heads=4, kv_heads=2, seq=16, batch=4, sample_bytes=30
)


@pytest.fixture(scope="module")
def built() -> tuple[Trainer, State]:
    return build(CONFIG, "xla", Layout())


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_gradient_flows_to_every_parameter(built):
    trainer, state = built
    gradients = jax.jit(jax.grad(trainer.loss))(state.params, random_bytes(4, 17))
    leaves = jax.tree.leaves_with_path(gradients)
    assert len(leaves) == 3 + CONFIG.layers * 11
    for path, gradient in leaves:
        if "embedding" in jax.tree_util.keystr(path):  # only the bytes that occur have one
            gradient = gradient[np.unique(random_bytes(4, 17)[:, :-1])]
        share = np.count_nonzero(np.asarray(gradient)) / gradient.size
        assert share > 0.99, path


def test_no_logit_depends_on_a_later_byte(built):
    trainer, state = built
    tokens = random_bytes(2, 16).astype(np.int32)
    changed = tokens.copy()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    logits = jax.jit(trainer.logits)
    before, after = (np.asarray(logits(state.params, each)) for each in (tokens, changed))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (np.abs(before - after)[:, 9:].max(axis=(0, 2)) > 1e-4 * np.abs(before).max()).all()


@jax.numpy_dtype_promotion("standard")  # JAX's attention promotes bfloat16
def test_logits_are_float32_and_follow_the_float32_model_in_bfloat16():
    windows = random_bytes(4, 17)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer, state = build(dataclasses.replace(CONFIG, dtype=dtype), "xla", Layout())
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
        assert jax.eval_shape(trainer.logits, state.params, windows).dtype == jnp.float32
        losses[dtype] = float(jax.jit(trainer.loss)(state.params, windows))
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-3)
    assert losses["float32"] == pytest.approx(math.log(256), rel=0.02)


def test_normalized_queries_turn_in_pairs_by_position_times_frequency():
    length, heads, head_dim = 7, 3, 8
    queries = np.random.default_rng(1).standard_normal((2, length, heads, head_dim))
    x = queries / np.sqrt(np.mean(queries**2, axis=-1, keepdims=True) + 1e-6)
    expected = np.empty_like(x)
    for position in range(length):
        for i in range(head_dim // 2):
            angle = position * 10_000.0 ** (-2 * i / head_dim)
            first, second = x[:, position, :, i], x[:, position, :, i + head_dim // 2]
            turned = (first + 1j * second) * np.exp(1j * angle)
            expected[:, position, :, i] = turned.real
            expected[:, position, :, i + head_dim // 2] = turned.imag
    norm = RMSNorm(head_dim, rngs=nnx.Rngs(0))
    tables = rotary_angles(length, head_dim)
    actual = normalize_and_rotate(norm, jnp.asarray(queries, jnp.float32), *tables)
    np.testing.assert_allclose(actual, expected, atol=1e-6 * np.abs(x).max())


def test_sample_is_seeded_and_slides_past_the_window(built):
    trainer, state = built
    text = sample(trainer, state.params, CONFIG)
    assert text.startswith("def ")
    assert len(text) > CONFIG.seq
    assert text == sample(trainer, state.params, CONFIG)
    assert text != sample(trainer, state.params, dataclasses.replace(CONFIG, seed=1))


def test_greedy_sample_is_the_likeliest_byte_after_the_last_window(built):
    trainer, state = built
    config = dataclasses.replace(CONFIG, temperature=0.0, prompt="x" * 20, sample_bytes=3)
    logits = jax.jit(trainer.logits)
    tokens = list(config.prompt.encode())
    for _ in range(config.sample_bytes):
        window = np.asarray([tokens[-config.seq :]], np.int32)
        tokens.append(int(np.argmax(logits(state.params, window)[0, -1])))
    drawn = bytes(tokens[20:]).decode(errors="replace")
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in drawn)
    assert sample(trainer, state.params, config) == config.prompt + shown


def test_the_standard_library_is_split_by_file():
    corpus = Corpus.read(CONFIG)
    train_files, held_out_files = (
        set(part.tobytes().split(b"\0")) for part in (corpus.train, corpus.held_out)
    )
    assert corpus.train.size > 4e6
    assert 0.01 < corpus.held_out.size / corpus.train.size < 0.2
    long = {text for text in held_out_files if len(text) > 1000}
    assert len(long) > 10
    assert long.isdisjoint(train_files)
    assert corpus.fingerprint() == Corpus.read(CONFIG).fingerprint()


def test_batches_depend_on_seed_and_step_alone():
    corpus = Corpus(random_bytes(5000), random_bytes(3000))
    batch = corpus.batch(CONFIG, 5)
    assert batch.shape == (CONFIG.batch, CONFIG.seq + 1)
    assert batch.dtype == np.uint8
    assert all(row.tobytes() in corpus.train.tobytes() for row in batch)
    np.testing.assert_array_equal(batch, corpus.batch(CONFIG, 5))
    assert (batch != corpus.batch(CONFIG, 6)).any()
    assert (batch != corpus.batch(dataclasses.replace(CONFIG, seed=1), 5)).any()


def test_held_out_windows_cover_the_part_in_full_batches():
    corpus = Corpus(random_bytes(5000), np.arange(3000) % 251)
    batches = corpus.held_out_batches(dataclasses.replace(CONFIG, held_out_windows=9))
    assert [batch.shape for batch in batches] == [(4, 17)] * 3
    assert batches[0][0, 0] == corpus.held_out[0]
    assert batches[-1][-1, -1] == corpus.held_out[-1]


class Recorder:
    def __init__(self) -> None:
        self.updates: list[tuple[int, float]] = []

    def update(self, step: int, loss: float, bytes_per_second: float | None) -> None:
        self.updates.append((step, loss))


def run_loop(losses: list[float], *, stop_after: int | None = None, first: int = 0) -> History:
    """Runs the loop on a step function whose state is the number of steps done."""
    stop = types.SimpleNamespace(requested=False)

    def step(state, windows):
        done = state.params
        assert windows == done
        stop.requested = done + 1 == stop_after
        return State(done + 1, None), losses[done]

    history = History(losses[:first])
    recorder = Recorder()
    job = Job(step, lambda step: step, lambda state: -float(state), 2, len(losses))
    throughput = Throughput(1)
    state = State(first, None)
    state = train(job, state, history, stop=stop, reporter=recorder, throughput=throughput)
    assert state.params == len(history.train)
    assert [step for step, _ in recorder.updates] == list(range(first + 1, state.params + 1))
    return history


def test_the_loop_records_every_loss_in_order():
    assert run_loop([5.0, 4.0, 3.0, 2.0, 1.0]) == History(
        [5.0, 4.0, 3.0, 2.0, 1.0], [(0, 0.0), (2, -2.0), (4, -4.0)]
    )
    assert run_loop([5.0, 4.0, 3.0, 2.0], first=3) == History([5.0, 4.0, 3.0, 2.0], [])


def test_the_loop_stops_after_the_step_at_hand():
    assert run_loop([5.0, 4.0, 3.0, 2.0, 1.0], stop_after=3).train == [5.0, 4.0, 3.0]


def test_the_loop_ends_where_the_loss_is_not_finite():
    with pytest.raises(CommandError, match=r"step 1 is nan; a lower --lr"):
        run_loop([5.0, math.nan, 3.0, 2.0, 1.0])


def test_the_second_interrupt_aborts():
    with StopOnInterrupt() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_loss_and_speed(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    with reporter(console, first=0, last=100) as progress:
        for step in range(1, 101):
            progress.update(step, 800 / step, 12345.6 if step > 1 else None)
    output = console.file.getvalue()
    assert "8.000 bits/byte, 12,346 bytes/s" in output
    if not terminal:
        lines = output.splitlines()
        assert len(lines) == 20
        assert lines[-1] == "step 100/100: 8.000 bits/byte, 12,346 bytes/s"


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_presets_are_within_their_means(preset: Config):
    """A guard against slips: what a preset trains on is of the order of what its text holds."""
    assert preset.warmup_steps < preset.steps
    assert 5e5 < preset.steps * preset.batch * preset.seq < 1e8
