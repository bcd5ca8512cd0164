"""Given vectors to rows of unit length, or the reason why a row is none. Arrays in, arrays out."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.runtime.reject_reasons import Reason


def unit_rows(column: pa.Array, name: str, dim: int) -> tuple[np.ndarray, dict[int, str]]:
    """(n, dim) float16 rows of unit length of n lists of floats, and row -> why it is none.

    A null, a list of another length, one with NaN, infinity or a null number, and one of zeros
    alone are none; their rows are zeros.
    """
    lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
    whole = lengths == dim
    x = np.zeros((len(column), dim))
    flat = column.filter(pa.array(whole)).flatten().to_numpy(zero_copy_only=False)
    x[whole] = flat.astype(np.float64).reshape(-1, dim)  # numbers that are null become NaN
    largest = np.abs(x).max(axis=1)  # NaN where one is
    finite = np.isfinite(largest)
    good = finite & (largest > 0)
    x[~good] = 0
    x /= np.where(good, largest, 1)[:, None]  # so that no square overflows or vanishes
    x /= np.where(good, np.linalg.norm(x, axis=1), 1)[:, None]
    why = {}
    for row in np.flatnonzero(~good).tolist():
        if lengths[row] < 0:
            why[row] = Reason.MISSING_EMBEDDING.because(f"{name} is null")
        elif not whole[row]:
            why[row] = Reason.WRONG_DIMENSION.because(f"{name} has {lengths[row]}, not {dim}")
        elif not finite[row]:
            why[row] = Reason.EMBEDDING_NOT_FINITE.because(name)
        else:
            why[row] = Reason.ZERO_VECTOR.because(name)
    return x.astype(np.float16), why
