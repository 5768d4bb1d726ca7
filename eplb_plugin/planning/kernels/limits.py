"""Numbers that several of the searches share."""

from __future__ import annotations

import numpy as np

_TRIED_RANKS = 3  # heavy ranks that a round looks at before the search gives up
_LEAST_GAIN = 2e-4  # smaller gains are not worth a round, as a share of the mean rank load
_LEAST_GAIN_32 = np.float32(_LEAST_GAIN)
_LEAST_EXACT_GAIN = 1e-5  # the same for a single load
_ROUNDING = np.float32(1.0001)  # bounds are as much too high as sums of float32 may be too low
_COLD = np.float32(1e-30)
_VACANT = -2  # a slot that is to be filled; -1 is closed
_NEVER = np.float32(1e18)  # moves of an exchange that is not allowed
