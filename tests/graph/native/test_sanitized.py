"""The kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer, on each path, in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).parents[3] / "graph" / "native"
COMPILER = next((name for name in ("g++", "clang++") if shutil.which(name)), None)

# Without torch: the interpreter and ctypes alone. Buffers are exactly as large as they have to be.
DRIVER = """
import ctypes, random, sys
from sparsepass_library import KINDS, PATHS, NativeWeight, load
from pathlib import Path

library = load(Path(sys.argv[1]))
random.seed(0)

def buffer(size, fill=None):
    # malloc, so that the sanitizer watches each end
    block = libc.malloc(max(1, size))
    if fill is not None:
        ctypes.memmove(block, bytes(fill), size)
    return block

def row_of(block, row, size):
    return ctypes.string_at(block + row * size, size)

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
GOOD = [first | second << 2 for first in range(4) for second in range(first + 1, 4)]
ran = 0
for path in PATHS.values():
    for name, kind in KINDS.items():
        if not library.has(path, kind):
            continue
        long_row = (33, 4104 if kind < 2 else 8200)
        for rows, columns in ((1, 8), (3, 48), (7, 64), (33, 72), (16, 576), (5, 136), (40, 1032), (291, 72), long_row):
            wide = columns > 4096
            kept_bytes = columns // 2 * (2 if kind < 2 else 1) // (2 if name == "int4" else 1)
            # Words whose upper byte says 1 to 2, so that sums stay finite.
            word = lambda: bytes([random.randrange(256), 0x3F if kind == 0 else 0x3C])
            kept = b"".join(word() for _ in range(rows * columns // 2)) if kind < 2 else random.randbytes(rows * kept_bytes)
            codes = bytes(random.choice(GOOD) | random.choice(GOOD) << 4 for _ in range(rows * columns // 8))
            p_kept, p_codes = buffer(rows * kept_bytes, kept), buffer(len(codes), codes)
            assert library.bad_codes(p_codes, rows, columns, 2) == -1
            size = library.laid_out_bytes(path, kind, rows, columns)
            data = buffer(size)
            assert library.lay_out(path, kind, p_kept, p_codes, rows, columns, data, 2) == 0
            again, codes_again = buffer(rows * kept_bytes), buffer(len(codes))
            assert library.store(path, kind, data, rows, columns, again, codes_again, 2) == 0
            assert ctypes.string_at(again, rows * kept_bytes) == bytes(kept)
            assert ctypes.string_at(codes_again, len(codes)) == codes
            for group_size in ((0,) if kind < 2 else (32,) if wide else (0, 32, 128)):
                groups = -(-columns // group_size) if group_size else 1
                scales = buffer(rows * groups * 2, [0x80, 0x3F] * (rows * groups)) if kind >= 2 else None
                k = 4
                branch = buffer(rows * (columns // k) * 2, [0, 0x3C] * (rows * (columns // k)))
                bias = buffer(rows * 4, [0, 0, 0x80, 0x3F] * rows)
                for with_rest in ((True,) if wide else (False, True)):
                    rest = (branch, bias) if with_rest else (None, None)
                    weight = NativeWeight(kind, path, 0, k if with_rest else 0, rows, columns, group_size, data, scales, *rest)
                    for kind_of_x, item in (((0, 2),) if wide else ((0, 2), (1, 2), (2, 4))):
                        for tokens in ((1, 9) if wide else (0, 1, 3, 9, 65) if columns <= 136 else (0, 1, 3, 9)):
                            x = buffer(tokens * columns * item, ([0] * (item - 1) + [0x3C]) * (tokens * columns))
                            y = buffer(tokens * rows * item)
                            assert library.linear(ctypes.byref(weight), kind_of_x, x, columns, tokens, y, 2) == 0
                            # The same rows to three buffers, one of which gets none.
                            numbers = (rows // 2, 0, rows - rows // 2)
                            ends = (ctypes.c_int64 * 3)(rows // 2, rows // 2, rows)
                            parts = (ctypes.c_void_p * 3)(*(buffer(tokens * number * item) for number in numbers))
                            asked = (x, columns, tokens, 3, ends, parts, 2)
                            assert library.linear_parts(ctypes.byref(weight), kind_of_x, *asked) == 0
                            for token in range(tokens):
                                found = [row_of(part, token, number * item) for part, number in zip(parts, numbers)]
                                assert b"".join(found) == row_of(y, token, rows * item)
                            for block in (x, y, *parts):
                                libc.free(block)
                        out = buffer(rows * columns * item)
                        assert library.unpack(ctypes.byref(weight), 0, rows, kind_of_x, out, 2) == 0
                        libc.free(out)
                        ran += 1
                for each in (scales, branch, bias):
                    libc.free(each)
            for each in (p_kept, p_codes, data, again, codes_again):
                libc.free(each)
        if name != "int4":
            for rows, columns in ((3, 8), (5, 40), (9, 200)):
                item = 2 if kind < 2 else 1
                data = buffer(rows * columns * item, [0] * (rows * columns * item))
                scales = buffer(rows * 2, [0x80, 0x3F] * rows) if kind == 2 else None
                weight = NativeWeight(kind, path, 1, 0, rows, columns, 0, data, scales, None, None)
                x, y = buffer(3 * columns * 2, [0, 0x3C] * (3 * columns)), buffer(3 * rows * 2)
                assert library.linear(ctypes.byref(weight), 0, x, columns, 3, y, 2) == 0
                for each in (data, scales, x, y):
                    libc.free(each)
for kind_of_x, item in ((0, 2), (1, 2), (2, 4)):
    for rows, columns in ((1, 8), (3, 13), (17, 576)):
        x, y = (buffer(rows * columns * item, ([0] * (item - 1) + [0x3C]) * (rows * columns)) for _ in range(2))
        weight = buffer(columns * item, ([0] * (item - 1) + [0x3C]) * columns)
        library.rms_norm(kind_of_x, x, weight, rows, columns, 1e-5, y, 2)
        for block in (x, y, weight):
            libc.free(block)
print("ran", ran)
"""


def test_the_kernels_touch_nothing_but_their_own_memory(tmp_path: Path) -> None:
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("there is no C++ compiler, or this is not Linux")
    library = tmp_path / "libsparsepass.so"
    flags = ["-std=c++17", "-fPIC", "-shared", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [COMPILER, "-O1", "-g", *flags, str(NATIVE / "kernels.cpp"), "-o", str(library)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    asked = subprocess.run([COMPILER, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    runtime = asked.stdout.strip()
    if built.returncode or not os.path.isabs(runtime):
        assert "libasan" in built.stderr or "sanitize" in built.stderr or not built.returncode, built.stderr
        pytest.skip("this compiler has no AddressSanitizer")
    # The file by itself: the package would load torch, which is not sanitized.
    text = (NATIVE / "library.py").read_text(encoding="utf-8")
    text = text.replace("from sparsepass.graph.support import SparsepassError, nearest", "SparsepassError = ValueError")
    (tmp_path / "sparsepass_library.py").write_text(text, encoding="utf-8")
    (tmp_path / "driver.py").write_text(DRIVER, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "driver.py"), str(library)],
        env={**os.environ, "LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert int(done.stdout.split()[-1]) > 0
