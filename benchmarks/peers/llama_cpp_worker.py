"""llama.cpp, asked line by line: reads one JSON object a line, answers with one. Needs llama-cpp-python and nothing else.

packed_models.py and packed_ggml.py start it with the Python of the environment in which llama-cpp-python is installed, so that
it takes turns with ours: while one runs, the other waits for input and computes nothing.
"""

import ctypes
import json
import sys
import time
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import llama_cpp

Q4_0, FLOAT32 = 2, 0
BLOCK, BLOCK_BYTES = 32, 18


def resident_bytes():
    """Of this process, pages of mapped files that were read included."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/smaps_rollup has no line Rss")


class Model:
    """A GGUF file, and one sequence."""

    def __init__(self, file, threads, context):
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.use_mmap = False  # else weights that ggml has put into its own order count twice in the resident memory
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), params)
        if not self.model:
            raise OSError(f"llama.cpp cannot load {file}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = context
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.num_words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def forget(self):
        """Begin a sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def read(self, words):
        """Run the model on some words, and return the likeliest next one."""
        array = (llama_cpp.llama_token * len(words))(*words)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(array, len(words))):
            raise RuntimeError("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        # Slices are copied by C code; the maximum of a list is found by C code too.
        numbers = logits[: self.num_words]
        return numbers.index(max(numbers))

    def generate(self, prompt, tokens):
        """Greedy; the moments at which each word was known."""
        self.forget()
        begin, word, words, seen = time.perf_counter(), None, [], []
        for _ in range(tokens):
            word = self.read(prompt if word is None else [word])
            words.append(word)
            seen.append(time.perf_counter() - begin)
        return {"seconds": seen, "words": words}

    def prefill(self, words):
        """Seconds for a prompt."""
        self.forget()
        begin = time.perf_counter()
        self.read(words)
        return {"seconds": time.perf_counter() - begin}


class InitParams(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


def libraries():
    """ggml's shared libraries, declared as far as they are needed."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    base, cpu = (ctypes.CDLL(str(folder / f"lib{name}.so")) for name in ("ggml-base", "ggml-cpu"))
    of_base = (
        "ggml_init",
        "ggml_new_tensor_2d",
        "ggml_mul_mat",
        "ggml_new_graph_custom",
        "ggml_backend_alloc_ctx_tensors_from_buft",
        "ggml_backend_get_default_buffer_type",
        "ggml_backend_reg_get_proc_address",
        "ggml_backend_reg_dev_get",
    )
    for library, names in ((base, of_base), (cpu, ("ggml_backend_cpu_init", "ggml_backend_cpu_reg"))):
        for name in names:
            getattr(library, name).restype = c_void_p
    base.ggml_backend_buft_name.restype = c_char_p
    base.ggml_init.argtypes = [InitParams]
    base.ggml_new_tensor_2d.argtypes = [c_void_p, c_int, c_int64, c_int64]
    base.ggml_backend_tensor_set.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
    base.ggml_backend_tensor_get.argtypes = [c_void_p, c_void_p, c_size_t, c_size_t]
    base.ggml_new_graph_custom.argtypes = [c_void_p, c_size_t, c_bool]
    base.ggml_backend_supports_op.restype = c_bool
    return base, cpu


class Products:
    """Products of one x with copies of a Q4_0 weight, in one graph, as a model's are: its threads are started once."""

    def __init__(self, rows, columns, copies, threads, buffer):
        base, cpu = libraries()
        self.base, self.copies = base, copies
        self.backend = c_void_p(cpu.ggml_backend_cpu_init())
        cpu.ggml_backend_cpu_set_n_threads(self.backend, c_int(threads))
        kind = self._buffer_types(cpu)[buffer]
        weights_in, rest = (c_void_p(base.ggml_init(InitParams(1 << 20, None, True))) for _ in range(2))
        weights = [c_void_p(base.ggml_new_tensor_2d(weights_in, Q4_0, columns, rows)) for _ in range(copies)]
        if not base.ggml_backend_alloc_ctx_tensors_from_buft(weights_in, kind):
            raise MemoryError("ggml allocates no weights")
        data = bytes(range(256)) * (rows * columns // BLOCK * BLOCK_BYTES // 256 + 1)
        block = bytearray(data[: rows * columns // BLOCK * BLOCK_BYTES])
        block[0::BLOCK_BYTES] = b"\x00" * len(block[0::BLOCK_BYTES])  # scales of 1, an fp16 each
        block[1::BLOCK_BYTES] = b"\x3c" * len(block[1::BLOCK_BYTES])
        for weight in weights:
            base.ggml_backend_tensor_set(weight, (ctypes.c_char * len(block)).from_buffer(block), 0, len(block))
        x = c_void_p(base.ggml_new_tensor_2d(rest, FLOAT32, columns, 1))
        graph_in = c_void_p(base.ggml_init(InitParams(4 << 20, None, True)))
        self.graph = c_void_p(base.ggml_new_graph_custom(graph_in, copies + 8, False))
        ys = [c_void_p(base.ggml_mul_mat(rest, weight, x)) for weight in weights]
        plain = c_void_p(base.ggml_backend_get_default_buffer_type(self.backend))
        if not base.ggml_backend_alloc_ctx_tensors_from_buft(rest, plain):
            raise MemoryError("ggml allocates no activations")
        if not base.ggml_backend_supports_op(self.backend, ys[0]):
            raise ValueError(f"ggml has no product for weights in {buffer}")
        numbers = (c_float * columns)(*[((i * 7) % 13 - 6) / 6 for i in range(columns)])
        base.ggml_backend_tensor_set(x, numbers, 0, 4 * columns)
        for y in ys:
            base.ggml_build_forward_expand(self.graph, y)
        self.last, self.rows = ys[-1], rows
        self.num_bytes = len(block)

    def _buffer_types(self, cpu):
        """Name -> where ggml keeps weights: as they are, or in an order of its own."""
        base = self.base
        registry = c_void_p(cpu.ggml_backend_cpu_reg())
        device = c_void_p(base.ggml_backend_reg_dev_get(registry, c_size_t(0)))
        found = [c_void_p(base.ggml_backend_get_default_buffer_type(self.backend))]
        address = base.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if address:
            more = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
            i = 0
            while more[i]:
                found.append(c_void_p(more[i]))
                i += 1
        return {base.ggml_backend_buft_name(each).decode(): each for each in found}

    def run(self):
        """Seconds of one product."""
        begin = time.perf_counter()
        if self.base.ggml_backend_graph_compute(self.backend, self.graph):
            raise RuntimeError("ggml_backend_graph_compute failed")
        seconds = (time.perf_counter() - begin) / self.copies
        y = (c_float * self.rows)()
        self.base.ggml_backend_tensor_get(self.last, y, 0, 4 * self.rows)
        return {"seconds": seconds, "sum": float(sum(y)), "num_bytes": self.num_bytes}


def quiet():
    """llama.cpp tells much."""
    callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(callback, c_void_p())
    return callback


def answer(request, held):
    """What is answered to a request; `held` keeps a model and products from one to the next."""
    do = request.pop("do")
    if do == "memory":
        return {"bytes": resident_bytes()}
    if do == "load":
        held["model"] = Model(**request)
        return {"system": llama_cpp.llama_print_system_info().decode(), "version": llama_cpp.__version__}
    if do == "generate":
        return held["model"].generate(**request)
    if do == "prefill":
        return held["model"].prefill(**request)
    if do == "buffers":
        products = Products.__new__(Products)
        products.base, cpu = libraries()
        products.backend = c_void_p(cpu.ggml_backend_cpu_init())
        return {"names": list(products._buffer_types(cpu))}
    if do == "products":
        held["products", request["buffer"]] = Products(**request)
        return {}
    return held["products", request["buffer"]].run()


def main():
    """Answer until there is no more input."""
    kept, held = quiet(), {}  # a callback that Python frees would be called all the same
    for line in sys.stdin:
        try:
            said = answer(json.loads(line), held)
        except (OSError, ValueError, MemoryError, RuntimeError, KeyError) as error:
            said = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(said), flush=True)
    del kept


if __name__ == "__main__":
    main()
