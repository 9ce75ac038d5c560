"""RMSNorm for JAX from hand-written CUDA and CPU kernels."""

from ._export import DISABLED_EXPORT_CHECKS as DISABLED_EXPORT_CHECKS
from ._info import info as info
from ._ops import add_rms_norm as add_rms_norm
from ._ops import rms_norm as rms_norm
from ._ops import rms_norm_rope as rms_norm_rope
from ._options import SMMargin as SMMargin
