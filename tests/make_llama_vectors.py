"""Make tests/vectors/llama.safetensors: what llama.cpp computes from the bundled models as its converter writes them.

    python tests/make_llama_vectors.py PATH/TO/llama.cpp

For every model and storage: logits after a prompt and after single tokens, and a digest of every tensor in the file.
From the file that minimtp.convert writes llama.cpp computes the same bits, but in Q4_0, where convert keeps the models'
own int4 weights: those logits are there, too. In F32 also two draft steps after several prefixes, and the ids of texts,
these by random_gguf's twin of the file: for special the converter takes what tokenizer_config.json names, which in the
bundled Gemma is not <|turn>.

It takes an environment with the extra "hf" and llama-cpp-python 0.3.36, of PyPI's source package (pip download
--no-binary :all: --no-deps llama-cpp-python==0.3.36), unpacked and built by

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON" pip wheel --no-deps PATH

The argument is vendor/llama.cpp in it, where the converter is. The vectors are of AVX2's kernels and one thread.
"""

import ctypes
import json
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import llama_cpp
import numpy as np
from llama_cases import COLUMNS_C, LENGTH, PREFIXES, ROWS_R, SINGLES, STORES, TEXTS, digests, given_tensors, rebuild
from safetensors.numpy import save_file

from minimtp import convert as own
from minimtp.loading import bundled

OUT = Path(__file__).parent / "vectors" / "llama.safetensors"
STEPS = 2
CONVERT = """
import runpy, sys
vendored, *sys.argv = sys.argv[1:]
sys.path[:0] = [vendored, f"{vendored}/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"  # known by a hash of the published vocabulary's ids
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def convert(vendored, folder, path, type):
    script = f"{vendored}/convert_hf_to_gguf.py"
    arguments = [vendored, script, folder, "--outfile", path, "--outtype", type]
    subprocess.run([sys.executable, "-c", CONVERT, *map(str, arguments)], check=True, capture_output=True)


def quantize(source, path, type):
    """With llama.cpp's own rounding, all weights to one type."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type}"), True, 1
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(params)) == 0


def write(vendored, folder, work):
    """-> {storage: file}: F32 and Q8_0 by the converter, Q4_0, which it has not, by llama.cpp from F32."""
    files = {store: work / f"{Path(folder).name}-{store}.gguf" for store in STORES}
    convert(vendored, folder, files["F32"], "f32")
    convert(vendored, folder, files["Q8_0"], "q8_0")
    quantize(files["F32"], files["Q4_0"], "Q4_0")
    quantize(files["F32"], work / "again.gguf", "Q8_0")
    assert digests(work / "again.gguf") == digests(files["Q8_0"]), "llama.cpp rounds to Q8_0 as its converter does"
    return files


# Running llama.cpp


@contextmanager
def opened(path, mtp=False, lender=None):
    """A context on one thread, everything in float32, no flash attention.

    mtp: to draft, with the MTP layer or, with the memory of the target's context, `lender`, as an assistant.
    """
    params = llama_cpp.llama_model_default_params()
    params.load_mtp = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if mtp:
        params.ctx_type, params.ctx_other = llama_cpp.LLAMA_CONTEXT_TYPE_MTP, lender
    context = llama_cpp.llama_init_from_model(model, params)
    assert context, f"llama.cpp does not run {path}"
    yield context
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)


def decode(context, ids_T, at=0, hidden_TD=None):
    """Read tokens from position `at` on -> logits [T, V]. hidden_TD: what a drafter gets beside them."""
    batch = llama_cpp.llama_batch_init(len(ids_T), 0, 1)
    batch.n_tokens = len(ids_T)
    for i, token in enumerate(ids_T):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, at + i, 1, 0, 1
    if hidden_TD is not None:
        batch.embd = hidden_TD.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    assert llama_cpp.llama_decode(context, batch) == 0
    batch.embd = None
    llama_cpp.llama_batch_free(batch)
    vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context)))
    rows = [llama_cpp.llama_get_logits_ith(context, i) for i in range(len(ids_T))]
    return np.stack([np.ctypeslib.as_array(row, (vocab,)).copy() for row in rows])


def alone(context, token):
    """Logits [V] after one token and nothing else."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    return decode(context, [token])[0]


def tokenize(context, text, special):
    vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(context))
    ids, data = (ctypes.c_int32 * 4096)(), text.encode()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, 4096, special, True)
    assert count >= 0
    return ids[:count]


# C++ functions that the package does not wrap, by their names in the library


def give_hidden(context, masked):
    """Have the context keep the hidden states that drafting goes on from."""
    function = llama_cpp.llama_cpp._lib._Z26llama_set_embeddings_nextnP13llama_contextbb
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool), None
    function(context, True, masked)


def hidden(context, row):
    function = llama_cpp.llama_cpp._lib._Z30llama_get_embeddings_nextn_ithP13llama_contexti
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int32), ctypes.POINTER(ctypes.c_float)
    width = llama_cpp.llama_model_n_embd_out(llama_cpp.llama_get_model(context))
    return np.ctypeslib.as_array(function(context, row), (width,)).copy()


def draft(target, drafter, ids_T, length):
    """Draft steps after `length` tokens, each from the prompt's next token -> logits [K, V].

    As common/speculative.cpp has it, but that it has the MTP layer also read the first token, with zeros as the hidden
    state. drafter: an assistant's file, whose steps are all at the position of the token that the target has not read;
    None: the MTP layer of the target's own.
    """
    with opened(target) as context, opened(drafter or target, True, context if drafter else None) as small:
        give_hidden(context, False)
        give_hidden(small, True)
        decode(context, ids_T[:length])  # when there is a drafter: making its context empties the memory that it shares
        behind_TD = np.stack([hidden(context, i) for i in range(length)])
        if not drafter:
            decode(small, ids_T[1:length], 1, behind_TD[:-1])
        state_D, logits_KV = behind_TD[-1], []
        for k in range(STEPS):
            at = length if drafter else length + k
            logits_KV.append(decode(small, [ids_T[length + k]], at, state_D[None])[0])
            state_D = hidden(small, 0)
    return np.stack(logits_KV)


def make(vendored, name, work, vectors, notes):
    folder, drafter = bundled(f"tiny-{name}"), f"{name}-assistant"
    files = write(vendored, folder, work)
    drafters = write(vendored, bundled(f"tiny-{drafter}"), work) if name == "gemma4" else {}
    for store in STORES:
        case = f"{name}.{store}"
        given = given_tensors(files[store])
        same = rebuild(work / f"{case}.gguf", folder, store, given)
        notes[case] = digests(files[store])
        assert digests(same) == notes[case], f"{case} written by random_gguf has other tensors"
        with opened(files[store]) as context, opened(same) as twin:
            ids_T = tokenize(context, bundled("heldout.txt").read_text()[:400], True)[:LENGTH]
            logits_TV = decode(context, ids_T)
            assert np.array_equal(decode(twin, ids_T), logits_TV), "and so llama.cpp computes the same from it"
            if store == "F32":
                vectors |= {f"{name}.ids_T": np.int32(ids_T)} | {f"{name}.{key}": a for key, a in given.items()}
                notes[f"{name}.texts"] = [tokenize(twin, text, True) for text in TEXTS]
            singles_NV = [alone(context, id) for id in dict.fromkeys(ids_T[1:])][:SINGLES]
        vectors[f"{case}.logits_RC"] = logits_TV[np.ix_(ROWS_R, COLUMNS_C)]
        vectors[f"{case}.single_NC"] = np.stack(singles_NV)[:, COLUMNS_C]
        own.convert(folder, work / f"own-{case}.gguf", store.lower())
        with opened(work / f"own-{case}.gguf") as context:
            own_TV = decode(context, ids_T)
        if store == "Q4_0":
            vectors[f"{case}.own_RC"] = own_TV[np.ix_(ROWS_R, COLUMNS_C)]
        else:
            assert np.array_equal(own_TV, logits_TV), f"{case} by minimtp.convert is another model"
        if drafters:
            notes[f"{drafter}.{store}"] = digests(drafters[store])
        if store == "F32":
            drafts = [draft(files[store], drafters.get(store), ids_T, length) for length in PREFIXES]
            vectors[f"{case}.draft_NKC"] = np.stack(drafts)[..., COLUMNS_C]
        print(case, "done")


if __name__ == "__main__":
    (vendored,) = sys.argv[1:]
    vectors, notes = {}, {"llama-cpp-python": llama_cpp.__version__}
    llama_cpp.llama_log_set(QUIET := llama_cpp.llama_log_callback(lambda *message: None), None)
    for name in ("gemma4", "qwen35"):
        with tempfile.TemporaryDirectory() as work:
            make(vendored, name, Path(work), vectors, notes)
    vectors = {key: np.ascontiguousarray(value) for key, value in vectors.items()}
    save_file(vectors, OUT, {"notes": json.dumps(notes)})
    print(f"{OUT.stat().st_size / 1000:.0f} kB")
