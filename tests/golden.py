"""Golden words: what every back end must draw, bit for bit.

KNOWN_ANSWERS are Random123's published vectors (kat_vectors): rounds, counter, key, words. The
others were written down from a plain-integer Philox (tests/restatement.py), not from the package.
"""

_ONES = 0xFFFFFFFF
_PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))

KNOWN_ANSWERS = [
    (7, (0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, (_ONES,) * 4, (_ONES,) * 2, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, *_PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, (0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, (_ONES,) * 4, (_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, *_PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]

# (seed, position) -> the parameter's key
KEYS = {
    (0, 0): 0x2706DD2F4D197E6F,
    (0, 1): 0x2A98F501AF37E97F,
    (7, 3): 0x753A29A2695577C0,
    (-1, 0): 0x5DC20AA7B2A27137,
}

# (seed, name) -> the key of a parameter that has a name
NAMED_KEYS = {
    (0, "model.layers.0.self_attn.q_proj.weight"): 0x45F3810755374839,
    (7, "weight"): 0x5499B2EA6463602C,
    (-1, "h.0.mlp"): 0x380A8558CB89CCD7,
}

# z(j, k) of key KEY, epoch 5: bf16 bits at (j, k)
KEY = 0x0123456789ABCDEF
NORMALS = {
    (0, 0): 0x3F26,
    (0, 1): 0x3F42,
    (0, 2): 0x3E5A,
    (0, 7): 0x3F58,
    (0, 8): 0xBFDD,
    (0, 9): 0xBF7E,
    (0, 15): 0xBEEC,
    (0, 16): 0x3EAE,
    (3, 5): 0xBF18,
    (3, 500): 0xBEDD,
    (255, 4095): 0xBECE,
    (1023, 1000003): 0x3F09,
}
# k with a negative sign among k = 500 .. 539 of row 2
NEGATIVE_SIGNS = [
    504,
    506,
    509,
    510,
    511,
    513,
    514,
    515,
    519,
    520,
    522,
    523,
    524,
    527,
    529,
    531,
    533,
    535,
    536,
    537,
    539,
]
# (rank, k) -> the row and the sign of column k of the sparse projection of KEY, epoch 5
NONZEROS = {
    (1, 0): (0, 1),
    (1, 1): (0, 1),
    (1, 17): (0, -1),
    (3, 4): (0, 1),
    (3, 100): (2, -1),
    (8, 0): (7, 1),
    (8, 7): (0, 1),
    (8, 8): (0, 1),
    (8, 13): (5, -1),
    (8, 129): (0, 1),
    (20, 19): (4, 1),
    (20, 20): (15, 1),
    (20, 399): (15, -1),
    (64, 63): (8, -1),
    (64, 64): (48, -1),
    (64, 1000): (48, -1),
    (130, 1133): (23, 1),
    (256, 255): (56, 1),
    (256, 256): (200, -1),
    (256, 4095): (39, 1),
    (1024, 1000003): (483, -1),
}
