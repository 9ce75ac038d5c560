"""The tables of the training steps: one of times, and for who asks one of kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .step_results import Family, Measured, Result, families

_SHOWN_KERNELS = 12  # besides those that belong to norms
_NAME_WIDTH = 100


def progress(result: Result, seconds: float) -> str:
    """One line on a model that is done."""
    steps = ", ".join(
        f"{name} {_milliseconds(result.step(name).median)} ms" for name in result.measured
    )
    return f"{result.config.name}: {steps} ({seconds:.0f} s)"


def table(results: Sequence[Result]) -> Table:
    """A section for each model, with a line for each implementation."""
    profiled = any(one.device for result in results for one in result.measured.values())
    shown = Table(
        box=SIMPLE_HEAD, pad_edge=False, title="milliseconds a step", title_justify="left"
    )
    shown.add_column("implementation")
    for header in _headers(profiled):
        shown.add_column(header, justify="right")
    for result in results:
        shown.add_row(str(result.config), style="bold")
        for name in result.measured:
            cells = _cells(result, name, profiled)
            shown.add_row(name, *(cell or "-" for cell in cells))
        shown.add_section()
    return shown


def _headers(profiled: bool) -> Iterator[str]:
    yield from ("step", "±", "norm tax", "±", "of jnp's", "speed-up", "±")
    if profiled:
        yield from ("kernels", "of norms", "kernel tax", "of jnp's")
    yield from ("peak GiB", "first loss", "last", "compiled in s")


def _cells(result: Result, name: str, profiled: bool) -> Iterator[str | None]:
    one = result.measured[name]
    step, tax, speedup = result.step(name), result.tax(name), result.speedup(name)
    yield _milliseconds(step.median)
    yield _milliseconds(step.notch)
    yield tax and _milliseconds(tax.median)
    yield tax and _milliseconds(tax.notch)
    yield _decimals(result.of_plain_tax(name), 2)
    yield speedup and f"{speedup.median:.3f}x"
    yield speedup and _decimals(speedup.notch, 3)
    if profiled:
        yield one.device and _milliseconds(one.device.seconds)
        yield one.device and _milliseconds(sum(one.of_norms().values()))
        yield _milliseconds(result.kernel_tax(name))
        yield _decimals(result.of_plain_kernel_tax(name), 2)
    yield f"{one.memory.peak / 2**30:.3f}"
    yield f"{one.losses[0]:.4f}"
    yield f"{one.losses[-1]:.4f}"
    yield f"{one.compile_seconds:.1f}"


def notes(results: Sequence[Result]) -> Iterator[str]:
    """What the table's numbers mean."""
    yield (
        "step: the median over rounds in which each implementation runs several steps in turn; ±: how far a median "
        "may be off, at about 95 % confidence. norm tax: the step over the identity's, which has no norms but adds to "
        "the stream and rotates all the same; speed-up: jnp's step over this one; both within each round."
    )
    if any(one.device for result in results for one in result.measured.values()):
        yield (
            "kernels: the time in which any kernel runs, from the profiler; of norms: in kernels that contain a norm "
            "or a part of one, whatever else they do; kernel tax: the norm tax in the time of kernels."
        )
    yield (
        "peak GiB: what the compiler plans for arguments, results and temporaries at once. first loss, last: of the "
        "steps whose losses are compared."
    )


def kernels(result: Result, name: str) -> Table:
    """The kernels of an implementation's step: all that belong to norms, and of the others the slowest."""
    one = result.measured[name]
    shown = Table(
        box=SIMPLE_HEAD,
        pad_edge=False,
        title=f"{result.config.name}, {name}: kernels by time",
        title_justify="left",
    )
    shown.add_column("microseconds a step", justify="right")
    shown.add_column("alike", justify="right")
    shown.add_column("of norms")
    shown.add_column("kernel")
    for family in _worth_showing(one):
        shown.add_row(
            f"{family.seconds * 1e6:.1f}",
            str(family.kernels),
            "yes" if family.of_norms else "",
            family.name[:_NAME_WIDTH],
        )
    return shown


def _worth_showing(one: Measured) -> Iterator[Family]:
    others = 0
    for family in families(one):
        others += not family.of_norms
        if family.of_norms or others <= _SHOWN_KERNELS:
            yield family


def _milliseconds(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds * 1e3:.3f}"


def _decimals(ratio: float | None, digits: int) -> str | None:
    return None if ratio is None else f"{ratio:.{digits}f}"
