"""Random streams apart from dropout: Philox itself, the permutation of an epoch, initial values of parameters.

Shape letters: N counters or rows of a batch, P elements of a parameter (flat). README.md derives the streams; they are
a contract, and every back end gives the same bits:

* ``philox4x32``: the generator of ``common/philox.py`` on arrays of counters.
* ``epoch_indices``: rows ``offset .. offset + N`` of the epoch's permutation of n, a cycle-walking alternating Feistel
  network (Black and Rogaway, CT-RSA 2002) whose round keys are drawn by Philox. O(1) memory, any part at any time.
* ``uniform``, ``normal``, ``truncated_normal``: one 52-bit uniform an element, in float64, rounded once to the dtype.
  The normal ones are its image under the inverse of the normal distribution function, by Wichura's rational
  approximations (Algorithm AS 241, Applied Statistics 37, 1988; relative error 1e-16) and a logarithm of our own: with
  + - * / and sqrt alone, in the order written here, no back end can differ, as a libm's log or a fused multiply-add
  would make it.
"""

from __future__ import annotations

import functools

import numpy as np

from fastdl.kernels.common import philox
from fastdl.kernels.registry import Array, OpSpec, Param, Tolerance, register_op

#: Elements of one trip through NumPy: its temporaries of 8 bytes stay in L2.
CHUNK = 1 << 13
#: Data sets up to this many rows have their epoch's permutation kept whole (512 KiB).
WHOLE = 1 << 16
#: Feistel rounds of the permutation, even because the halves take turns, and the least bits of its domain. With 12 and
#: 6 the frequencies of all n! permutations of n = 3 to 6 pass a chi-square test over 40,000 epochs; 10 rounds on the
#: least power of two fail it by 15 sigma at n = 5.
ROUNDS = 12
LEAST_BITS = 6
#: Phi(-2), where the truncated normal distribution begins.
TAIL = 0.022750131948179207

# Wichura's AS 241 (PPND16), highest power first: numerators and denominators of the centre and the two tails.
CENTRE = (
    (
        2.5090809287301226727e3, 3.3430575583588128105e4, 6.7265770927008700853e4, 4.5921953931549871457e4,
        1.3731693765509461125e4, 1.9715909503065514427e3, 1.3314166789178437745e2, 3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3, 2.8729085735721942674e4, 3.9307895800092710610e4, 2.1213794301586595867e4,
        5.3941960214247511077e3, 6.8718700749205790830e2, 4.2313330701600911252e1, 1.0,
    ),
)  # fmt: skip
TAIL_NEAR = (
    (
        7.74545014278341407640e-4, 2.27238449892691845833e-2, 2.41780725177450611770e-1, 1.27045825245236838258e0,
        3.64784832476320460504e0, 5.76949722146069140550e0, 4.63033784615654529590e0, 1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9, 5.47593808499534494600e-4, 1.51986665636164571966e-2, 1.48103976427480074590e-1,
        6.89767334985100004550e-1, 1.67638483018380384940e0, 2.05319162663775882187e0, 1.0,
    ),
)  # fmt: skip
TAIL_FAR = (
    (
        2.01033439929228813265e-7, 2.71155556874348757815e-5, 1.24266094738807843860e-3, 2.65321895265761230930e-2,
        2.96560571828504891230e-1, 1.78482653991729133580e0, 5.46378491116411436990e0, 6.65790464350110377720e0,
    ),
    (
        2.04426310338993978564e-15, 1.42151175831644588870e-7, 1.84631831751005468180e-5, 7.86869131145613259100e-4,
        1.48753612908506148525e-2, 1.36929880922735805310e-1, 5.99832206555887937690e-1, 1.0,
    ),
)  # fmt: skip
# The logarithm of fdlibm (e_log.c, Sun Microsystems 1993): log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)) with
# s = f / (2 + f).
LOG = (
    1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01, 2.222219843214978396e-01,
    2.857142874366239149e-01, 3.999999999940941908e-01, 6.666666666666735130e-01,
)  # fmt: skip
LN2_HIGH, LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
ROOT_HALF = 0.7071067811865476


# ------------------------------------------------------------------------------------------------ the generator
def philox4x32(counter: np.ndarray, key: np.ndarray, out: np.ndarray, *, threads: int = 1) -> None:
    """Write the random words of each counter (N, 4) under a key (2) to out (N, 4); all uint32."""
    for a in range(0, len(counter), CHUNK):
        words = philox.block(*counter[a : a + CHUNK].T, *key)
        for k in range(4):
            out[a : a + CHUNK, k] = words[k]


# ------------------------------------------------------------------------------------------------ the permutation
def round_keys(seed: int, epoch: int) -> np.ndarray:
    """Two key words of each Feistel round (ROUNDS, 2): counters (round // 2, 0, 2^31, epoch)."""
    words = philox.block(np.arange(ROUNDS // 2), 0, philox.PERMUTATION_LAYER, epoch, *philox.split(seed))
    return np.stack(np.broadcast_arrays(*words), axis=1).reshape(ROUNDS, 2)


def split_bits(n: int) -> tuple[int, int]:
    """Bits of the low and the high half of the Feistel network's domain, the power of two from n on."""
    bits = max(LEAST_BITS, (n - 1).bit_length())
    return bits // 2, bits - bits // 2


def permute(x: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """One pass of the Feistel network over uint64 values: a bijection of its power of two."""
    low, high = (np.uint64(b) for b in split_bits(n))
    one, half, mask = np.uint64(1), np.uint64(32), np.uint64(philox.MASK)

    def mixed(word: np.ndarray, key: np.ndarray) -> np.ndarray:
        p = (word ^ key[0]) * np.uint64(philox.M0)
        p = ((p >> half) ^ (p & mask) ^ key[1]) * np.uint64(philox.M1)
        return (p >> half) ^ p

    right, left = x & (one << low) - one, x >> low
    for r in range(0, ROUNDS, 2):
        left = left ^ (mixed(right, keys[r]) & (one << high) - one)
        right = right ^ (mixed(left, keys[r + 1]) & (one << low) - one)
    return left << low | right


def positions(first: int, count: int, n: int, seed: int, epoch: int) -> np.ndarray:
    """What stands at positions first .. first + count of the epoch's permutation; positions count modulo n."""
    keys = round_keys(seed, epoch)
    x = permute(((np.arange(count) + first) % n).astype(np.uint64), n, keys)
    outside = np.flatnonzero(x >= n)
    while outside.size:  # walk the cycle until it comes back below n
        x[outside] = permute(x[outside], n, keys)
        outside = outside[x[outside] >= n]
    return x.astype(np.int64)


@functools.lru_cache(maxsize=2)
def whole(n: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of a small epoch: NumPy draws it at once for less than the batches one by one."""
    return positions(0, n, n, seed, epoch)


def epoch_indices(
    index: np.ndarray, *, n: int, seed: int = 0, epoch: int = 0, offset: int = 0, threads: int = 1
) -> None:
    """Write positions offset .. offset + N of the epoch's permutation of n to index (N); positions count modulo n."""
    if n <= WHOLE:
        np.take(whole(n, seed, epoch), np.arange(offset, offset + len(index)), out=index, mode="wrap")
        return
    for a in range(0, len(index), CHUNK):
        piece = index[a : a + CHUNK]
        piece[...] = positions(offset + a, len(piece), n, seed, epoch)


# ------------------------------------------------------------------------------------------------ initial values
def uniforms(first: int, count: int, seed: int, layer: int) -> np.ndarray:
    """Uniforms of the elements first .. first + count, float64 in (0, 1), first even: odd multiples of 2^-53."""
    pair = np.arange(first // 2, (first + count + 1) // 2, dtype=np.uint64)
    words = philox.block(pair & np.uint64(philox.MASK), pair >> np.uint64(32), layer, 0, *philox.split(seed))
    draws = np.empty((len(pair), 2))
    for k in (0, 1):
        bits = words[2 * k + 1] << np.uint64(20) | words[2 * k] >> np.uint64(12)
        draws[:, k] = (bits + 0.5) * 2.0**-52
    return draws.reshape(-1)[:count]


def horner(coefficients: tuple[float, ...], x: np.ndarray) -> np.ndarray:
    """A polynomial, highest power first."""
    total = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        total *= x
        total += c
    return total


def log(x: np.ndarray) -> np.ndarray:
    """Natural logarithm of positive normal numbers by + - * / alone, within 1 ulp."""
    m, k = np.frexp(x)
    small = m < ROOT_HALF
    f = np.where(small, m + m, m) - 1.0
    k = np.where(small, k - 1, k).astype(np.float64)
    s = f / (f + 2.0)
    z = s * s
    half = 0.5 * f * f
    return k * LN2_HIGH - ((half - (s * (half + horner(LOG, z) * z) + k * LN2_LOW)) - f)


def quantile(p: np.ndarray) -> np.ndarray:
    """The inverse of the standard normal distribution function on (0, 1)."""
    q = p - 0.5
    r = 0.180625 - q * q
    z = q * horner(CENTRE[0], r) / horner(CENTRE[1], r)
    tail = np.flatnonzero(np.abs(q) > 0.425)
    if tail.size:
        q = q[tail]
        r = np.sqrt(-log(np.where(q < 0.0, p[tail], 1.0 - p[tail])))
        near, far = r - 1.6, r - 5.0
        value = horner(TAIL_NEAR[0], near) / horner(TAIL_NEAR[1], near)
        value = np.where(r <= 5.0, value, horner(TAIL_FAR[0], far) / horner(TAIL_FAR[1], far))
        z[tail] = np.where(q < 0.0, -value, value)
    return z


def uniform(
    out: np.ndarray,
    *,
    low: float = 0.0,
    high: float = 1.0,
    seed: int = 0,
    layer: int = philox.INITIAL_LAYER,
    threads: int = 1,
) -> None:
    """Fill out (P) with low + (high - low) u; rounding may give an end of the interval itself."""
    for a in range(0, len(out), CHUNK):
        piece = out[a : a + CHUNK]
        piece[...] = (high - low) * uniforms(a, len(piece), seed, layer) + low


def normal(
    out: np.ndarray,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    seed: int = 0,
    layer: int = philox.INITIAL_LAYER,
    threads: int = 1,
) -> None:
    """Fill out (P) with mean + std z, z standard normal."""
    for a in range(0, len(out), CHUNK):
        piece = out[a : a + CHUNK]
        piece[...] = std * quantile(uniforms(a, len(piece), seed, layer)) + mean


def truncated_normal(
    out: np.ndarray,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    seed: int = 0,
    layer: int = philox.INITIAL_LAYER,
    threads: int = 1,
) -> None:
    """Fill out (P) with mean + std z, z standard normal given |z| <= 2; std is that of the whole distribution."""
    for a in range(0, len(out), CHUNK):
        piece = out[a : a + CHUNK]
        p = (1.0 - 2.0 * TAIL) * uniforms(a, len(piece), seed, layer) + TAIL
        piece[...] = std * np.clip(quantile(p), -2.0, 2.0) + mean


# ------------------------------------------------------------------------------------------------ declarations
def _words(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, made: object) -> np.ndarray:
    return rng.integers(0, 1 << 32, shape, dtype=np.uint32)


EXACT = Tolerance(ulp=0.0, why="integers")
ROUNDED = Tolerance(ulp=1.0, why="the same float64 draw, rounded once")
LAYER = Param("layer", "int", philox.INITIAL_LAYER)

register_op(
    OpSpec(
        name="philox4x32",
        family="random",
        summary="ten rounds of Philox4x32",
        arrays=(
            Array("counter", "N,4", dtype="u4", fill=_words),
            Array("key", "2", dtype="u4", fill=_words),
            Array("out", "N,4", "out", dtype="u4"),
        ),
        reference=philox4x32,
        tolerance=lambda sizes: EXACT,
        on_host=True,
    )
)
register_op(
    OpSpec(
        name="epoch_indices",
        family="random",
        summary="a part of the epoch's permutation of n",
        arrays=(Array("index", "N", "out", dtype="i8"),),
        reference=epoch_indices,
        params=(Param("n", "int", 1797), Param("seed", "seed", 0)),
        runtime=("epoch", "offset"),
        tolerance=lambda sizes: EXACT,
        variants=({"n": 1797, "seed": 42}, {"n": 1}, {"n": 1 << 40, "seed": (1 << 64) - 1}),
    )
)
for _name, _reference, _first, _second in (
    ("uniform", uniform, Param("low", "float", 0.0), Param("high", "float", 1.0)),
    ("normal", normal, Param("mean", "float", 0.0), Param("std", "float", 1.0)),
    ("truncated_normal", truncated_normal, Param("mean", "float", 0.0), Param("std", "float", 1.0)),
):
    register_op(
        OpSpec(
            name=_name,
            family="random",
            summary=f"initial values: {_name.replace('_', ' ')}",
            arrays=(Array("out", "P", "out"),),
            reference=_reference,
            params=(_first, _second, Param("seed", "seed", 0), LAYER),
            tolerance=lambda sizes: ROUNDED,
            on_host=True,
            variants=({}, {_first.name: -0.25, _second.name: 0.125, "seed": 42, "layer": philox.INITIAL_LAYER + 7}),
        )
    )
