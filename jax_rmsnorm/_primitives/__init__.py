"""JAX primitives: one file each, with abstract evaluation, lowering and batching, registered at its end."""

from .add_backward import add_backward as add_backward
from .add_forward import add_forward as add_forward
from .backward import backward as backward
from .forward import forward as forward
from .rope_backward import rope_backward as rope_backward
from .rope_forward import rope_forward as rope_forward
