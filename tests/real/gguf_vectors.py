"""Writes worker/src/load/blocks.txt: blocks of every GGUF type with the f32 bits that the `gguf` package gives them.

    pip install gguf numpy && python tests/real/gguf_vectors.py > worker/src/load/blocks.txt
"""
import importlib.metadata

import gguf
import numpy as np
from gguf.quants import dequantize

TYPES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()
# Where the f16 numbers of a block lie: scales and minima.
HALVES = dict(Q4_0=[0], Q4_1=[0, 2], Q5_0=[0], Q5_1=[0, 2], Q8_0=[0], Q2_K=[80, 82], Q3_K=[108], Q4_K=[0, 2],
              Q5_K=[0, 2], Q6_K=[208], IQ4_NL=[0], IQ4_XS=[0], MXFP4=[])

rng = np.random.default_rng(20)
print(f"# gguf {importlib.metadata.version('gguf')}: type, block, values as big-endian f32 bits")
for name in TYPES:
    kind = gguf.GGMLQuantizationType[name]
    _, size = gguf.GGML_QUANT_SIZES[kind]
    # Scales: ordinary ones, a negative one, a subnormal f16; for MXFP4 the exponents at which something changes.
    for case in range(7 if name == "MXFP4" else 3):
        block = rng.integers(0, 256, size, dtype=np.uint8)
        for at in HALVES[name]:
            scale = [rng.normal(), -abs(rng.normal()) * 0.01, 3e-7][case]
            block[at:at + 2] = np.frombuffer(np.float16(scale).tobytes(), dtype=np.uint8)
        if name == "MXFP4":
            block[0] = [127, 120, 0, 1, 2, 254, 255][case]
        with np.errstate(all="ignore"):
            values = dequantize(block.reshape(1, -1), kind).astype(np.float32).reshape(-1)
        print(int(kind), block.tobytes().hex(), values.astype(">f4").tobytes().hex())
