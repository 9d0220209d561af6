"""CRC-32C with numpy alone.

Source: RFC 3720, section 12.1, for the polynomial; LevelDB, `util/crc32c.h`, for the mask.
"""

import functools

import numpy as np
from jaxtyping import UInt8

# The polynomial of CRC-32C divides 1 + x^426 + x^1362 + x^5685, and so its n-th power for n = 2^k, which has the
# same terms at n times the exponents. By subtracting multiples of that, the front of a message is folded onto the
# bytes (n = 8) or runs of 16 bytes that lie this far behind it, and the remainder stays the same.
_POLYNOMIAL = 0x82F63B78
_FOLDS = (5685 - 1362, 5685 - 426, 5685)
_RUNS = (16, 1)
_CHUNK = 4 << 20
# A remainder that starts from zero is, after these bytes, the one that CRC-32C starts from.
_START = np.frombuffer(b"Td\x1fd", np.uint8)


def masked_crc32c(data: bytes | UInt8[np.ndarray, "N"]) -> int:
    """The CRC-32C of some bytes, changed as LevelDB does so that data may hold checksums of its own."""
    data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data
    rest = _START
    for start in range(0, len(data), _CHUNK):
        rest = np.concatenate([rest, data[start : start + _CHUNK]])
        for run in _RUNS:
            surplus = max(len(rest) - _FOLDS[-1] * run, 0)
            for front in range(0, surplus, _FOLDS[0] * run):
                back = min(front + _FOLDS[0] * run, surplus)
                for fold in _FOLDS:
                    rest[front + fold * run : back + fold * run] ^= rest[front:back]
            rest = rest[surplus:]
    bits = np.unpackbits(rest, bitorder="little")
    remainder = np.bitwise_xor.reduce(_powers()[_powers().size - bits.size :] * bits)
    crc = int(remainder) ^ 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.cache
def _powers() -> np.ndarray:
    """x^32 modulo the polynomial, last, and before it one higher power for every bit that is not folded away."""
    powers = [_POLYNOMIAL]
    for _ in range(8 * (_FOLDS[-1] + _START.size) - 1):
        powers.append(powers[-1] >> 1 ^ (_POLYNOMIAL if powers[-1] & 1 else 0))
    return np.array(powers[::-1], np.uint32)
