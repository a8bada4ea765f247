"""Decompositions of kernels into chains of thinner ones, on NumPy arrays in float64.

Kernels lie as in Keras: (inputs, outputs) or (height, width, inputs, outputs). A chain is a tuple of kernels; `errors`
are squared Frobenius norms of what is lost as a share of the whole.

matrix: singular value decomposition (Denton et al. 2014, arXiv:1404.0736; Zhang et al. 2015, arXiv:1505.06798).
spatial: a column, then a row (Jaderberg et al. 2014, arXiv:1405.3866; Tai et al. 2016, arXiv:1511.06067).
tucker: 1x1, a smaller core, 1x1 (Kim et al. 2016, arXiv:1511.06530).
cp: 1x1, depthwise, 1x1 (Lebedev et al. 2015, arXiv:1412.6553, with the two modes of space as one as in Astrid and
Lee 2017, arXiv:1701.07148, so that strides stay whole).
"""

from __future__ import annotations

import numpy as np

_TINY = 1e-30


def matrix(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(…, inputs, rank) and (rank, outputs); the error is least among all of that rank (Eckart and Young 1936)."""
    left, values, right = _svd(kernel.reshape(-1, kernel.shape[-1]))
    root = np.sqrt(values[:rank])
    return (left[:, :rank] * root).reshape(*kernel.shape[:-1], rank), root[:, None] * right[:rank]


def matrix_values(kernel: np.ndarray) -> np.ndarray:
    """Singular values of the kernel as a matrix of (taps · inputs, outputs)."""
    return _svd(kernel.reshape(-1, kernel.shape[-1]))[1]


def projected(kernel: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The factors that keep what of the answers lies along `directions`, (outputs, rank) with orthonormal columns.

    With the leading eigenvectors of the answers' covariance this is the least squared error of the answers at that
    rank (Zhang et al. 2015, equation 5).
    """
    return kernel.astype(np.float64) @ directions, directions.T.copy()


def spatial(kernel: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """(height, 1, inputs, rank) and (1, width, rank, outputs)."""
    height, width, inputs, outputs = kernel.shape
    left, values, right = _svd(_columns_by_rows(kernel))
    root = np.sqrt(values[:rank])
    column = (left[:, :rank] * root).reshape(height, 1, inputs, rank)
    return column, (root[:, None] * right[:rank]).reshape(rank, 1, width, outputs).transpose(1, 2, 0, 3)


def spatial_values(kernel: np.ndarray) -> np.ndarray:
    """Singular values of the kernel as a matrix of (height · inputs, width · outputs)."""
    return _svd(_columns_by_rows(kernel))[1]


def tucker(kernel: np.ndarray, ranks: tuple[int, int], rounds: int = 5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(1, 1, inputs, r), (height, width, r, s) and (1, 1, s, outputs) for ranks (r, s).

    Begins with the higher-order SVD and improves it by alternation (De Lathauwer et al. 2000, HOOI).
    """
    kernel = kernel.astype(np.float64)
    before, after = _leading(_unfold(kernel, 2), ranks[0]), _leading(_unfold(kernel, 3), ranks[1])
    for _ in range(rounds):
        before = _leading(_unfold(np.einsum("hwio,os->hwis", kernel, after), 2), ranks[0])
        after = _leading(_unfold(np.einsum("hwio,ir->hwro", kernel, before), 3), ranks[1])
    core = np.einsum("hwio,ir,os->hwrs", kernel, before, after, optimize=True)
    return before[None, None], core, after.T[None, None].copy()


def tucker_values(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Singular values along the inputs and along the outputs; what is cut off of both bounds the error from above."""
    return _svd(_unfold(kernel, 2))[1], _svd(_unfold(kernel, 3))[1]


def cp(
    kernel: np.ndarray, rank: int, *, starts: int = 3, rounds: int = 200, tolerance: float = 1e-9, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(1, 1, inputs, rank), depthwise (height, width, rank, 1) and (1, 1, rank, outputs), by alternating least squares.

    The first start is from singular vectors, the others are random; the best is kept. Each least squares problem is
    damped, since CP's factors may grow without bound where the kernel has no best approximation of that rank (de
    Silva and Lim 2008).
    """
    height, width, inputs, outputs = kernel.shape
    tensor = kernel.astype(np.float64).reshape(height * width, inputs, outputs)
    random, best, least = np.random.default_rng(seed), None, np.inf
    for start in range(starts):
        factors = [_start(tensor, mode, rank, random if start else None) for mode in range(3)]
        factors = _alternate(tensor, factors, rounds, tolerance)
        error = _share(tensor, _whole(factors))
        if error < least:
            best, least = factors, error
        if least < 1e-12:
            break
    space, before, after = _balanced(best)
    return before[None, None], space.reshape(height, width, rank, 1), after.T[None, None].copy()


def depthwise(kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A depthwise kernel (height, width, channels, 1) as a column (height, 1, channels, 1) and a row, by channel."""
    filters = kernel[..., 0].transpose(2, 0, 1).astype(np.float64)
    left, values, right = np.linalg.svd(filters, full_matrices=False)
    root = np.sqrt(values[:, :1])
    column, row = left[:, :, 0] * root, right[:, 0] * root
    return column.T[:, None, :, None].copy(), row.T[None, :, :, None].copy()


def compose(method: str, chain: tuple[np.ndarray, ...]) -> np.ndarray:
    """The one kernel that a chain computes."""
    if method == "matrix":
        return np.tensordot(chain[0], chain[1].reshape(chain[1].shape[-2:]), 1)
    if method == "spatial":
        return np.einsum("hir,wro->hwio", chain[0][:, 0], chain[1][0], optimize=True)
    if method == "tucker":
        return np.einsum("ir,hwrs,so->hwio", chain[0][0, 0], chain[1], chain[2][0, 0], optimize=True)
    if method == "cp":
        return np.einsum("ir,hwr,ro->hwio", chain[0][0, 0], chain[1][..., 0], chain[2][0, 0], optimize=True)
    return chain[0] * chain[1]  # depthwise


def error(method: str, kernel: np.ndarray, chain: tuple[np.ndarray, ...]) -> float:
    """What the chain loses of the kernel's energy, 0 to 1."""
    return _share(kernel.astype(np.float64), compose(method, chain))


def _columns_by_rows(kernel: np.ndarray) -> np.ndarray:
    height, width, inputs, outputs = kernel.shape
    return kernel.transpose(0, 2, 1, 3).reshape(height * inputs, width * outputs)


def _svd(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.linalg.svd(values.astype(np.float64), full_matrices=False)


def _unfold(kernel: np.ndarray, mode: int) -> np.ndarray:
    return np.moveaxis(kernel, mode, 0).reshape(kernel.shape[mode], -1)


def _leading(values: np.ndarray, rank: int) -> np.ndarray:
    return _svd(values)[0][:, :rank]


def _start(tensor: np.ndarray, mode: int, rank: int, random: np.random.Generator | None) -> np.ndarray:
    size = tensor.shape[mode]
    factor = (
        np.random.default_rng(mode).normal(size=(size, rank)) if random is None else random.normal(size=(size, rank))
    )
    if random is None:
        vectors = _leading(_unfold(tensor, mode), rank)
        factor[:, : vectors.shape[1]] = vectors
    return factor


def _alternate(tensor: np.ndarray, factors: list, rounds: int, tolerance: float) -> list:
    letters, last = "abc", np.inf
    for _ in range(rounds):
        for mode in range(3):
            others = [factor for index, factor in enumerate(factors) if index != mode]
            names = [letters[index] for index in range(3) if index != mode]
            right = np.einsum(
                f"abc,{names[0]}r,{names[1]}r->{letters[mode]}r", tensor, *others, optimize=True
            )  # fmt: skip
            gram = (others[0].T @ others[0]) * (others[1].T @ others[1])
            gram[np.diag_indices_from(gram)] += 1e-9 * max(float(np.trace(gram)) / len(gram), _TINY)
            factors[mode] = np.linalg.solve(gram, right.T).T
        factors = list(_balanced(factors))
        now = _share(tensor, _whole(factors))
        if last - now < tolerance * max(last, _TINY) or now < 1e-14:
            break
        last = now
    return factors


def _balanced(factors: list) -> tuple[np.ndarray, ...]:
    """The same tensor with the three columns of each component equally long: no weight is larger than it must be."""
    lengths = np.array([np.linalg.norm(factor, axis=0) for factor in factors])
    common = np.cbrt(np.prod(lengths, axis=0))
    return tuple(factor * (common / np.maximum(length, _TINY)) for factor, length in zip(factors, lengths))


def _whole(factors: list) -> np.ndarray:
    return np.einsum("ar,br,cr->abc", *factors, optimize=True)


def _share(whole: np.ndarray, part: np.ndarray) -> float:
    return float(np.sum((whole - part) ** 2) / max(float(np.sum(whole**2)), _TINY))
