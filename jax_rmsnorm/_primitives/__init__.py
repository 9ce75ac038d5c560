"""JAX primitives: one file each, with abstract evaluation, lowering and batching, registered at its end."""

from .backward import backward as backward
from .forward import forward as forward
