"""Ridge regression (Hoerl and Kennard 1970) whose penalty is that of the least leave-one-out error (Allen 1974, PRESS).

Shape letters: ``N`` rows, ``F`` inputs, ``K`` outputs, ``R`` rank of the inputs.
"""

from dataclasses import dataclass

import numpy as np

from trainer.arrays import FloatArray

PENALTIES = np.logspace(-1, 5, 25)


@dataclass(frozen=True)
class LinearMap:
    """x -> (x - centre) @ weight + mean."""

    centre_F: FloatArray
    weight_FK: FloatArray
    mean_K: FloatArray

    def __call__(self, x_NF: FloatArray) -> FloatArray:
        found: FloatArray = self.mean_K + np.matmul(x_NF - self.centre_F, self.weight_FK)
        return found


class Ridge:
    """Linear maps with an intercept from inputs [N, F] to outputs; the inputs are decomposed once."""

    def __init__(self, x_NF: FloatArray) -> None:
        centre_F: FloatArray = x_NF.mean(0)
        self._centre_F, x_NF = centre_F, x_NF - centre_F
        # The smaller of both matrices of products is decomposed.
        if len(x_NF) < x_NF.shape[1]:
            squares_R, left_NR = np.linalg.eigh(x_NF @ x_NF.T)
            kept_R = squares_R > 1e-9 * squares_R[-1]
            squares_R, left_NR = squares_R[kept_R], left_NR[:, kept_R]
            along_FR = x_NF.T @ left_NR
        else:
            squares_R, right_FR = np.linalg.eigh(x_NF.T @ x_NF)
            kept_R = squares_R > 1e-9 * squares_R[-1]
            squares_R = squares_R[kept_R]
            along_FR = right_FR[:, kept_R] * np.sqrt(squares_R)
            left_NR = x_NF @ (along_FR / squares_R)
        self._squares_R, self._left_NR, self._along_FR = squares_R, left_NR, along_FR

    def fit(self, y_NK: FloatArray) -> LinearMap:
        """With the penalty, the same for all K, of PENALTIES that has the least squared error of leaving each row
        out."""
        mean_K = y_NK.mean(0)
        y_NK = y_NK - mean_K
        left_NR, squares_R = self._left_NR, self._squares_R
        along_RK = left_NR.T @ y_NK

        def left_out_error(penalty: float) -> float:
            share_R = squares_R / (squares_R + penalty)
            leverage_N = (left_NR**2) @ share_R + 1 / len(y_NK)  # the intercept's too
            residual_NK = (y_NK - left_NR @ (share_R[:, None] * along_RK)) / (1 - leverage_N)[:, None]
            return float((residual_NK**2).sum())

        penalty = min(PENALTIES, key=left_out_error)
        return LinearMap(self._centre_F, self._along_FR @ (along_RK / (squares_R + penalty)[:, None]), mean_K)
