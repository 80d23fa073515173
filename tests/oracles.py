"""Independent references for linear-Gaussian models: NumPy only, no JAX, no code of the package.

`dense` conditions one joint Gaussian of every state, emission and disturbance on the entries that
were observed. `sequential` is a Kalman filter and Rauch-Tung-Striebel loop for long series. Both
run in extended precision (`numpy.longdouble`, 64 mantissa bits on x86) unless told otherwise, so
their own rounding stays far below the tolerances they are used with.
"""

from typing import NamedTuple

import numpy as np

LONG = np.longdouble


class Model(NamedTuple):
    """A model as plain arrays; row t belongs to the step into z_t, row 0 of F, c and Q is unused.

    z_1 ~ N(m0, P0), z_t = F_t z_{t-1} + c_t + w_t with w_t ~ N(0, Q_t),
    y_t = H_t z_t + d_t + eps_t with eps_t ~ N(0, R_t); inputs are inside c and d.
    """

    m0: np.ndarray
    P0: np.ndarray
    F: np.ndarray
    c: np.ndarray
    Q: np.ndarray
    H: np.ndarray
    d: np.ndarray
    R: np.ndarray


class DensePosterior(NamedTuple):
    """What `dense` returns; time leads, and names are the package's where it has one."""

    log_likelihood: np.ndarray
    filtered_means: np.ndarray
    filtered_covariances: np.ndarray
    smoothed_means: np.ndarray
    smoothed_covariances: np.ndarray
    cross_moments: np.ndarray  # E[z_t z_{t+1}^T | y], T - 1 rows
    joint_mean: np.ndarray  # of (z_1, ..., z_T) stacked, given y
    joint_covariance: np.ndarray
    prior_covariances: np.ndarray  # of z_t before any emission
    emission_means: np.ndarray  # of y_t given the observed entries; the entry itself where observed
    emission_covariances: np.ndarray
    predicted_emission_means: np.ndarray  # of y_t given y_{1:t-1}
    predicted_emission_covariances: np.ndarray
    standardized: np.ndarray  # innovations through the Cholesky factor of their observed block
    dynamics_disturbance_means: np.ndarray  # of w_t given y; row 0 is z_1 - m0
    dynamics_disturbance_covariances: np.ndarray
    emission_disturbance_means: np.ndarray
    emission_disturbance_covariances: np.ndarray


def _rows(value, ndim, shape, num_timesteps, dtype):
    """Bring one parameter (None, constant, time-varying or a callable of t) to one row per step."""
    if value is None:
        return np.zeros((num_timesteps, *shape), dtype)
    if callable(value):
        return np.stack([np.asarray(value(t)).astype(dtype) for t in range(num_timesteps)])
    value = np.asarray(value).astype(dtype)
    if value.ndim == ndim:
        value = np.broadcast_to(value, (num_timesteps, *value.shape))
    assert value.shape == (num_timesteps, *shape), (value.shape, shape, num_timesteps)
    return np.array(value)


def model_arrays(params, num_timesteps, inputs=None, dtype=LONG):
    """Unfold dynamax's `ParamsLGSSM` (1.0.3 indexing) and inputs into a `Model`."""
    T = num_timesteps
    m0 = np.asarray(params.initial.mean).astype(dtype)
    D = m0.shape[0]
    R = np.asarray(params.emissions.cov).astype(dtype)
    N = R.shape[-1]
    u = np.zeros((T, 0), dtype) if inputs is None else np.asarray(inputs).astype(dtype)
    U = u.shape[1]
    if R.ndim == 1 or (R.ndim == 2 and R.shape == (T, N) and T != N):  # diagonal, as in dynamax
        R = np.eye(N, dtype=dtype) * R[..., None, :]
    F = _rows(params.dynamics.weights, 2, (D, D), T, dtype)
    B = _rows(params.dynamics.input_weights, 2, (D, U), T, dtype)
    b = _rows(params.dynamics.bias, 1, (D,), T, dtype)
    Q = _rows(params.dynamics.cov, 2, (D, D), T, dtype)
    H = _rows(params.emissions.weights, 2, (N, D), T, dtype)
    G = _rows(params.emissions.input_weights, 2, (N, U), T, dtype)
    d = _rows(params.emissions.bias, 1, (N,), T, dtype)
    R = _rows(R, 2, (N, N), T, dtype)
    c = b + np.einsum("tij,tj->ti", B, u)
    d = d + np.einsum("tij,tj->ti", G, u)
    return Model(m0, np.asarray(params.initial.cov).astype(dtype), F, c, Q, H, d, R)


def extend(model, rows):
    """Repeat the last row of a time-invariant model so that it covers `rows` more steps."""
    return Model(
        model.m0,
        model.P0,
        *(np.concatenate([x, np.repeat(x[-1:], rows, axis=0)]) for x in model[2:]),
    )


def cholesky(S):
    """Lower factor by columns, in any floating dtype; NaN where S is not positive definite."""
    n = S.shape[0]
    L = np.zeros_like(S)
    for j in range(n):
        column = S[j:, j] - L[j:, :j] @ L[j, :j]
        L[j:, j] = column / np.sqrt(column[0]) if column[0] > 0 else np.nan
    return L


def solve_lower(L, B):
    """Solve L X = B by forward substitution, in any floating dtype."""
    X = np.zeros((L.shape[0], *B.shape[1:]), np.result_type(L, B))
    for i in range(L.shape[0]):
        X[i] = (B[i] - L[i, :i] @ X[:i]) / L[i, i]
    return X


def _solve_positive(S, B):
    """Solve S X = B for positive definite S."""
    if S.dtype == np.float64:  # LAPACK has no extended precision, but is ten times faster
        return np.linalg.solve(S, B)
    L = cholesky(S)
    Y = solve_lower(L, B)
    return solve_lower(L.T[::-1, ::-1], Y[::-1])[::-1]


def _block_diagonal(blocks):
    """Square blocks (K, n, n) on the diagonal of one matrix."""
    K, n = blocks.shape[:2]
    out = np.zeros((K * n, K * n), blocks.dtype)
    for k in range(K):
        out[k * n : (k + 1) * n, k * n : (k + 1) * n] = blocks[k]
    return out


class _Joint:
    """The joint Gaussian of v = (z, y, w, eps), conditioned on leading observed entries of y.

    Everything is linear in the sources x = (w, eps), with w_1 = z_1 - m0: v = mean + B x. A diffuse
    component of z_1 is a regressor with a flat prior; its limit is taken by generalised least
    squares instead of by a large number.
    """

    def __init__(self, model, emissions, diffuse):
        T, N, D = model.H.shape
        dtype = model.F.dtype
        y = np.asarray(emissions).astype(dtype)
        diffuse = np.asarray(diffuse if np.size(diffuse) else np.zeros(D), bool)
        P0 = np.where(diffuse[:, None] | diffuse[None], dtype.type(0), model.P0)

        transfer = np.zeros((T, D, T, D), dtype)  # z_t against w_s
        mean = np.zeros((T, D), dtype)
        for t in range(T):
            if t == 0:
                mean[0] = model.m0
            else:
                transfer[t] = np.einsum("ij,jsk->isk", model.F[t], transfer[t - 1])
                mean[t] = model.F[t] @ mean[t - 1] + model.c[t]
            transfer[t, :, t] = np.eye(D, dtype=dtype)
        M = transfer.reshape(T * D, T * D)
        HM = np.einsum("tnd,tdsk->tnsk", model.H, transfer).reshape(T * N, T * D)
        ybar = (np.einsum("tnd,td->tn", model.H, mean) + model.d).reshape(-1)

        zeros_w, zeros_e = np.zeros((T * D, T * N), dtype), np.zeros((T * N, T * D), dtype)
        eye_w, eye_e = np.eye(T * D, dtype=dtype), np.eye(T * N, dtype=dtype)
        B = np.block([[M, zeros_w], [HM, eye_e], [eye_w, zeros_w], [zeros_e, eye_e]])
        blocks_w = np.concatenate([P0[None], model.Q[1:]])
        source = np.zeros((B.shape[1], B.shape[1]), dtype)
        source[: T * D, : T * D] = _block_diagonal(blocks_w)
        source[T * D :, T * D :] = _block_diagonal(model.R)

        observed = ~np.isnan(y).reshape(-1)
        G = B[T * D : T * D + T * N][observed]
        self.observed = observed.reshape(T, N)
        self.counts = np.concatenate([[0], np.cumsum(self.observed.sum(1))])
        self.mean = np.concatenate([mean.reshape(-1), ybar, np.zeros(T * (D + N), dtype)])
        self.B, self.source = B, source
        self.L = cholesky(G @ source @ G.T)
        self.W = solve_lower(self.L, G @ source @ B.T)
        self.u = solve_lower(self.L, (y.reshape(-1) - ybar)[observed])
        self.regressors = B[:, :D][:, diffuse]
        self.X = solve_lower(self.L, G[:, :D][:, diffuse])

    def log_likelihood(self):
        """Log density of the observed entries; the diffuse limit leaves (q/2) log kappa out."""
        log_norm = self.u.size * np.log(2 * LONG(np.pi)) + 2 * np.sum(np.log(np.diag(self.L)))
        value = -(log_norm + self.u @ self.u) / 2
        if self.X.shape[1]:
            L = cholesky(self.X.T @ self.X)
            eta = solve_lower(L, self.X.T @ self.u)
            value += eta @ eta / 2 - np.sum(np.log(np.diag(L)))
        return value

    def given(self, count, rows):
        """Mean and covariance of v[rows] given the first `count` observed entries."""
        W, u, X, B = self.W[:count, rows], self.u[:count], self.X[:count], self.B[rows]
        mean = self.mean[rows] + W.T @ u
        covariance = B @ self.source @ B.T - W.T @ W
        if X.shape[1]:
            J = X.T @ X
            rest = self.regressors[rows] - W.T @ X
            mean = mean + rest @ _solve_positive(J, X.T @ u)
            covariance = covariance + rest @ _solve_positive(J, rest.T)
        return mean, covariance


def dense(model, emissions, diffuse=()):
    """Every posterior moment of a model by one dense joint Gaussian, O((T (D + N))^3).

    Exact Q = 0, P0 = 0 and singular R are ordinary; only the covariance of the observed entries
    must be positive definite. `diffuse` marks components of z_1 with infinite prior variance.
    """
    joint = _Joint(model, emissions, diffuse)
    T, N, D = model.H.shape
    n_z, n_y = T * D, T * N
    total = joint.counts[-1]

    def blocks(counts, start, size):
        pairs = [
            joint.given(counts[t], slice(start + t * size, start + (t + 1) * size))
            for t in range(T)
        ]
        return np.stack([m for m, _ in pairs]), np.stack([c for _, c in pairs])

    z_mean, z_cov = joint.given(total, slice(0, n_z))
    cov = z_cov.reshape(T, D, T, D)
    means = z_mean.reshape(T, D)
    cross = [cov[t, :, t + 1] + np.outer(means[t], means[t + 1]) for t in range(T - 1)]
    whole = np.full(T, total)
    standardized = np.full((T, N), np.nan, model.F.dtype)
    if not np.any(diffuse):
        standardized[joint.observed] = joint.u
    prior = _Joint(model, np.full((T, N), np.nan), ()).given(0, slice(0, n_z))[1]
    return DensePosterior(
        joint.log_likelihood(),
        *blocks(joint.counts[1:], 0, D),
        means,
        np.stack([cov[t, :, t] for t in range(T)]),
        np.array(cross, model.F.dtype).reshape(T - 1, D, D),
        z_mean,
        z_cov,
        np.stack([prior.reshape(T, D, T, D)[t, :, t] for t in range(T)]),
        *blocks(whole, n_z, N),
        *blocks(joint.counts[:-1], n_z, N),
        standardized,
        *blocks(whole, n_z + n_y, D),
        *blocks(whole, 2 * n_z + n_y, N),
    )


def dense_log_likelihood(model, emissions, diffuse=()):
    """The log-likelihood alone."""
    return _Joint(model, emissions, diffuse).log_likelihood()


class SequentialPosterior(NamedTuple):
    """What `sequential` returns; time leads."""

    log_likelihood: np.ndarray
    filtered_means: np.ndarray
    filtered_covariances: np.ndarray
    smoothed_means: np.ndarray
    smoothed_covariances: np.ndarray


def _filter_loop(model, y):
    """Kalman filter in Joseph form over rows with any missing entries."""
    T, _, D = model.H.shape
    eye = np.eye(D, dtype=model.F.dtype)
    value = model.F.dtype.type(0)
    filtered, predicted = [], []
    m, P = model.m0, model.P0
    for t in range(T):
        if t:
            F = model.F[t]
            m, P = F @ m + model.c[t], F @ P @ F.T + model.Q[t]
        predicted.append((m, P))
        o = ~np.isnan(y[t])
        if o.any():
            H, R = model.H[t][o], model.R[t][np.ix_(o, o)]
            v = y[t][o] - H @ m - model.d[t][o]
            S = H @ P @ H.T + R
            L = cholesky(S)
            white = solve_lower(L, v)
            value -= (o.sum() * np.log(2 * LONG(np.pi)) + white @ white) / 2
            value -= np.sum(np.log(np.diag(L)))
            K = _solve_positive(S, H @ P).T
            A = eye - K @ H
            m, P = m + K @ v, A @ P @ A.T + K @ R @ K.T
            P = (P + P.T) / 2
        filtered.append((m, P))
    return value, filtered, predicted


def sequential(model, emissions):
    """Kalman filter in Joseph form and Rauch-Tung-Striebel smoother, in the dtype of the model.

    The predicted covariances must be positive definite; meant for long regular series.
    """
    y = np.asarray(emissions).astype(model.F.dtype)
    value, filtered, predicted = _filter_loop(model, y)
    smoothed = [filtered[-1]]
    for t in range(len(filtered) - 2, -1, -1):
        (m, P), (mp, Pp), F = filtered[t], predicted[t + 1], model.F[t + 1]
        G = _solve_positive(Pp, F @ P).T
        A = np.eye(len(m), dtype=F.dtype) - G @ F
        ms, Ps = smoothed[-1]
        # Joseph form: a sum of positive terms, so the tiny variances keep their digits.
        Ps = A @ P @ A.T + G @ (Ps + model.Q[t + 1]) @ G.T
        smoothed.append((m + G @ (ms - mp), (Ps + Ps.T) / 2))
    smoothed.reverse()
    return SequentialPosterior(
        value,
        np.stack([m for m, _ in filtered]),
        np.stack([P for _, P in filtered]),
        np.stack([m for m, _ in smoothed]),
        np.stack([P for _, P in smoothed]),
    )
