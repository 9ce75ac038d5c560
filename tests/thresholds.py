"""The sizes from which a GPU's calls are kernels: 0 for all tests but those of the sizes themselves."""

from collections.abc import Iterator

import pytest

from jax_rmsnorm._primitives import choice

MEASURED = {
    name: getattr(choice, name) for name in ("LEAST_ELEMENTS", "LEAST_ELEMENTS_DIFFERENTIATED")
}
ANY_SIZE = dict.fromkeys(MEASURED, 0)


def use(sizes: dict[str, int]) -> None:
    """Makes these the sizes of all programs that are made from now on."""
    for name, size in sizes.items():
        setattr(choice, name, size)


@pytest.fixture
def as_measured() -> Iterator[None]:
    """The sizes that users have."""
    use(MEASURED)
    yield
    use(ANY_SIZE)
