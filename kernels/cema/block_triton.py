"""The work of CEMA's Triton kernels before, between and after their products.

A program has DC channels with N components each. The map of a block of T steps is built from p, q
and gamma where it is used, and its gradient is contracted to theirs where it was summed, so that
neither crosses memory; `maps._BlockMap` has the formulas. Powers of q are float64 until they
are placed in a map. Complex numbers are pairs of tensors, real part first.
"""

import triton
import triton.language as tl


@triton.jit
def times(a_real, a_imag, b_real, b_imag):
    """(a_real + i a_imag) (b_real + i b_imag)."""
    return a_real * b_real - a_imag * b_imag, a_real * b_imag + a_imag * b_real


@triton.jit
def power(q_real, q_imag, exponent):
    """q^exponent for an integer of at least 0, by squaring."""
    exponent = tl.cast(exponent, tl.int32)
    real = tl.full(q_real.shape, 1.0, q_real.dtype)
    imag = tl.zeros(q_real.shape, q_real.dtype)
    while exponent > 0:
        if exponent % 2 == 1:
            real, imag = times(real, imag, q_real, q_imag)
        q_real, q_imag = times(q_real, q_imag, q_real, q_imag)
        exponent = exponent // 2
    return real, imag


@triton.jit
def halves(z, EXACT: tl.constexpr):
    """A float32 factor as a sum of numbers that tensor cores take in TF32: two where EXACT.

    The first is rounded, so that the second has few enough digits to be taken whole.
    """
    if EXACT:
        high = ((z.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)
        return high, z - high
    else:
        return (z,)


@triton.jit
def transposed(z):
    """A factor [DC, A, B] as [DC, B, A]."""
    if len(z) == 2:
        return tl.permute(z[0], (0, 2, 1)), tl.permute(z[1], (0, 2, 1))
    else:
        return (tl.permute(z[0], (0, 2, 1)),)


@triton.jit
def product(a, b, total):
    """total + a b of factors [DC, ., .]; what low parts multiply to is below float32's digits."""
    if len(a) == 2:
        total = tl.dot(a[1], b[0], total, input_precision="tf32")
    if len(b) == 2:
        total = tl.dot(a[0], b[1], total, input_precision="tf32")
    return tl.dot(a[0], b[0], total, input_precision="tf32")


@triton.jit
def _in_turns(a, b):
    """Factors [DC, A, M] as one [DC, A, 2 M], their columns taken in turns."""
    return tl.reshape(tl.join(a, b), [a.shape[0], a.shape[1], 2 * a.shape[2]])


@triton.jit
def outer(a, b, zero):
    """a b^T of factors [DC, A, M] and [DC, B, M]: the share of M blocks in a map's gradient.

    It is a product from zero, for the caller to add: what tensor cores add to, they cut digits off,
    and over many tiles that adds up. `zero` is a 0 that the compiler does not know to be one: it
    would have the product add to what the caller adds to. Tensor cores sum over 16 at least (Triton
    3.6 over no less): of 8 blocks, both parts of `a` go side by side.
    """
    M: tl.constexpr = a[0].shape[2]
    total = tl.zeros([a[0].shape[0], a[0].shape[1], b[0].shape[1]], tl.float32) + zero
    if M >= 16:
        return product(a, transposed(b), total)
    else:
        low = tl.zeros(a[0].shape, tl.float32)
        if len(a) == 2:
            low = a[1]
        left = (_in_turns(a[0], low),)
        if len(b) == 2:
            total = product(left, transposed((_in_turns(b[1], b[1]),)), total)
        return product(left, transposed((_in_turns(b[0], b[0]),)), total)


@triton.jit
def load_pair(pointer, at, mask):
    """Complex numbers number `at` of a tensor."""
    real = tl.load(pointer + 2 * at, mask=mask, other=0.0)
    return real, tl.load(pointer + 2 * at + 1, mask=mask, other=0.0)


@triton.jit
def store_pair(pointer, at, real, imag, mask):
    """Complex numbers to number `at` of a tensor."""
    tl.store(pointer + 2 * at, real.to(pointer.dtype.element_ty), mask=mask)
    tl.store(pointer + 2 * at + 1, imag.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def places(d, D, N: tl.constexpr, NP: tl.constexpr):
    """A mask of the components of channels among [DC, NP], and their places in [D, N]."""
    n = tl.arange(0, NP)
    return (d < D)[:, None] & (n < N)[None], d[:, None] * N + n[None]


@triton.jit
def load_channels(p_ptr, q_ptr, gamma_ptr, omega_ptr, d, D, N: tl.constexpr, NP: tl.constexpr):
    """p, q and the readout gamma / sqrt(N) in float64 [DC, NP], and omega [DC]."""
    here, at = places(d, D, N, NP)
    p = tl.load(p_ptr + at, mask=here, other=0.0)
    q_real, q_imag = load_pair(q_ptr, at, here)
    real, imag = load_pair(gamma_ptr, at, here)
    real, imag = real.to(tl.float64) * N**-0.5, imag.to(tl.float64) * N**-0.5
    return p, q_real, q_imag, real, imag, tl.load(omega_ptr + d, mask=d < D, other=0.0)


@triton.jit
def block_map(p, q_real, q_imag, read_real, read_imag, omega, T: tl.constexpr):
    """K [DC, T, T], W and R transposed [DC, N, T] of a block, float32, and q^T, float64."""
    DC: tl.constexpr = p.shape[0]
    N: tl.constexpr = p.shape[1]
    i = tl.arange(0, T)
    lag = (i[:, None] - i[None])[None]
    within = tl.where(lag == 0, omega[:, None, None], tl.zeros([DC, T, T], tl.float32))
    w_real = tl.zeros([DC, N, T], tl.float32)
    w_imag = tl.zeros([DC, N, T], tl.float32)
    r_real = tl.zeros([DC, N, T], tl.float32)
    r_imag = tl.zeros([DC, N, T], tl.float32)
    t_real = tl.full([DC, N], 1.0, tl.float64)
    t_imag = tl.zeros([DC, N], tl.float64)
    for t in range(0, T):
        response, _ = times(read_real, read_imag, t_real, t_imag)
        tap = tl.sum(response * p, 1).to(tl.float32)
        within += tl.where(lag == t, tap[:, None, None], 0.0)
        there = (i == T - 1 - t)[None, None]
        w_real = tl.where(there, (p * t_real).to(tl.float32)[:, :, None], w_real)
        w_imag = tl.where(there, (p * t_imag).to(tl.float32)[:, :, None], w_imag)
        t_real, t_imag = times(t_real, t_imag, q_real, q_imag)
        real, imag = times(read_real, read_imag, t_real, t_imag)
        there = (i == t)[None, None]
        r_real = tl.where(there, real.to(tl.float32)[:, :, None], r_real)
        r_imag = tl.where(there, -imag.to(tl.float32)[:, :, None], r_imag)
    return within, w_real, w_imag, r_real, r_imag, t_real, t_imag


@triton.jit
def _at_column(z, at, T: tl.constexpr):
    """z[..., at] of [DC, N, T], float64."""
    return tl.sum(tl.where((tl.arange(0, T) == at)[None, None], z, 0.0), 2).to(tl.float64)


@triton.jit
def block_map_gradient(
    within,
    w_real,
    w_imag,
    r_real,
    r_imag,
    turn_real,
    turn_imag,
    p,
    q_real,
    q_imag,
    read_real,
    read_imag,
    omega,
    T: tl.constexpr,
):
    """From the gradients of K, W, R and q^T those of p, log q, the readout [DC, N] and omega [DC].

    A complex gradient is dL/dRe + i dL/dIm, and z = ab has da = dz conj(b).
    """
    DC: tl.constexpr = p.shape[0]
    N: tl.constexpr = p.shape[1]
    i = tl.arange(0, T)
    lag = (i[:, None] - i[None])[None]
    to_omega = tl.sum(tl.sum(tl.where(lag == 0, within, 0.0), 2), 1).to(tl.float64)
    to_p = tl.zeros([DC, N], tl.float64)
    to_read_real = tl.zeros([DC, N], tl.float64)
    to_read_imag = tl.zeros([DC, N], tl.float64)
    log_real = tl.zeros([DC, N], tl.float64)
    log_imag = tl.zeros([DC, N], tl.float64)
    t_real = tl.full([DC, N], 1.0, tl.float64)
    t_imag = tl.zeros([DC, N], tl.float64)
    for t in range(0, T):
        # K's tap Re(sum_n read p q^t) and W's p q^t, what stands at T-1-t.
        tap = tl.sum(tl.sum(tl.where(lag == t, within, 0.0), 2), 1).to(tl.float64)[:, None]
        real, imag = times(read_real, read_imag, t_real, t_imag)
        real, imag = real * tap, -imag * tap
        to_read_real += p * tap * t_real
        to_read_imag -= p * tap * t_imag
        more_real, more_imag = times(
            _at_column(w_real, T - 1 - t, T), _at_column(w_imag, T - 1 - t, T), t_real, -t_imag
        )
        to_p += real + more_real
        log_real += t * p * (real + more_real)
        log_imag += t * p * (imag + more_imag)
        # R's conj(read q^(t+1)).
        t_real, t_imag = times(t_real, t_imag, q_real, q_imag)
        real, imag = times(_at_column(r_real, t, T), -_at_column(r_imag, t, T), t_real, -t_imag)
        to_read_real += real
        to_read_imag += imag
        real, imag = times(real, imag, read_real, -read_imag)
        log_real += (t + 1) * real
        log_imag += (t + 1) * imag
    real, imag = times(turn_real.to(tl.float64), turn_imag.to(tl.float64), t_real, -t_imag)
    return to_p, log_real + T * real, log_imag + T * imag, to_read_real, to_read_imag, to_omega


@triton.jit
def scan(s_real, s_imag, h_real, h_imag, q_real, q_imag, M: tl.constexpr, REVERSE: tl.constexpr):
    """The recurrence h <- q h + s over the M numbers that s [DC, N, M] has in a row.

    h: before the first, [DC, N]. q: float64 [DC, N]. Returns h before each [DC, N, M], and what
    all of s add up to without the first h. REVERSE: the last number comes first.

    Neighbours are joined to a recurrence of half the length with q^2, as often as there are pairs.
    """
    a, b = q_real.to(tl.float32), q_imag.to(tl.float32)
    DC: tl.constexpr = s_real.shape[0]
    N: tl.constexpr = s_real.shape[1]
    if M > 2:
        s_real = tl.reshape(s_real, [DC, N, M // 2, 2])
        s_imag = tl.reshape(s_imag, [DC, N, M // 2, 2])
        a, b = a[:, :, None], b[:, :, None]
    if REVERSE:
        next_real, first_real = tl.split(s_real)
        next_imag, first_imag = tl.split(s_imag)
    else:
        first_real, next_real = tl.split(s_real)
        first_imag, next_imag = tl.split(s_imag)
    real, imag = times(a, b, first_real, first_imag)
    real, imag = real + next_real, imag + next_imag
    if M > 2:
        square_real, square_imag = times(q_real, q_imag, q_real, q_imag)
        h_real, h_imag, real, imag = scan(
            real, imag, h_real, h_imag, square_real, square_imag, M // 2, REVERSE
        )
    later_real, later_imag = times(a, b, h_real, h_imag)
    later_real, later_imag = later_real + first_real, later_imag + first_imag
    if REVERSE:
        h_real, h_imag = tl.join(later_real, h_real), tl.join(later_imag, h_imag)
    else:
        h_real, h_imag = tl.join(h_real, later_real), tl.join(h_imag, later_imag)
    return tl.reshape(h_real, [DC, N, M]), tl.reshape(h_imag, [DC, N, M]), real, imag
