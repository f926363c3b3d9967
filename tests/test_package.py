"""The package as a whole: what imports what, what is public, and what must never be in it."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minimtp

PACKAGE = Path(minimtp.__file__).parent
PROJECT = PACKAGE.parent
ORDER = ["display", "backend", "checkpoint", "config", "quant", "ggml", "mobile", "formats", "gguf_file", "gguf_text",
         "gguf_model", "gguf_write", "layers", "kv_storage", "kv", "delta_state", "drafter_kv", "cache", "plan",
         "kernel_source", "shim", "device", "device_layout", "device_weights", "kernel_ops", "device_kv",
         "device_state", "device_cache", "gemma4", "gemma4_assistant", "qwen35", "qwen35_mtp", "sampling", "drafting",
         "text", "memory", "parameters", "loading", "lattice", "lattice_report", "encode", "source", "convert",
         "synth", "acceptance", "audit", "generate", "bench", "explain", "watch", "page", "device_bytes",
         "device_bench", "oracle_rules", "oracle_logits", "expected", "oracle_cache", "oracle_drafter", "oracle",
         "self_check", "golden", "logits", "worklist", "server", "server_check", "hf_check", "chat", "cli_common",
         "cli_show", "cli_worklist", "cli_files", "cli_oracle", "cli_check", "cli"]  # fmt: skip
SOURCES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.glob("*.py")}
MODULES = [name for name in SOURCES if not name.startswith("__")]


def imported(tree):
    """(module, names) of every import in a syntax tree, wherever it stands; relative ones as minimtp.*"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["minimtp" if node.level else "", node.module]))
            yield module, [alias.name for alias in node.names]


def own_imports(tree):
    """Modules of the package that it imports."""
    for module, names in imported(tree):
        if module == "minimtp":
            yield from (name for name in names if name in SOURCES)
        elif module.startswith("minimtp."):
            yield module.split(".")[1]


# Order


def test_every_module_has_its_place():
    assert set(MODULES) <= set(ORDER) and len(MODULES) > 10


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_only_from_modules_above_it(name):
    above = set(ORDER[: ORDER.index(name)])
    assert set(own_imports(SOURCES[name])) <= above


def test_the_order_test_sees_every_kind_of_import():
    text = "import minimtp.cli\nfrom . import text, Draft\nfrom minimtp import cache\n"
    text += "def f():\n  from .loading import load\n"
    assert sorted(own_imports(ast.parse(text))) == ["cache", "cli", "loading", "text"]


def fresh(code, *flags):
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_import_loads_nothing_heavy():
    loaded = fresh("import minimtp, minimtp.cli, sys; print(*{name.split('.')[0] for name in sys.modules})")
    assert "numpy" in loaded
    assert not {"cupy", "torch", "transformers", "scipy", "matplotlib", "jinja2", "safetensors", "pytest",
                "distributed"} & set(loaded)  # fmt: skip


def test_import_says_nothing_and_warns_of_nothing():
    assert fresh("import minimtp", "-W", "error") == []


# Public names

GENERATE = """target, prompt_ids, drafter=None, num_draft=4, rule='rejection', sampling=Sampling(temperature=0.0),
              draft_sampling=None, max_new_tokens=128, stop=(), seed=0, cache=None"""
SIGNATURES = {
    "load": "path, backend='numpy', dtype='float32', keep='auto'",
    "load_drafter": "path, target",
    "Draft": "tokens_K, q_KV=None, soft_KV=None",
    "Sampling": "temperature=1.0, top_k=None, top_p=None, min_p=None, suppress=(), presence_penalty=0.0",
    "Sampling.law": "self, logits_V, history=()",
    "accept": "rule, p_JV, draft, u_J, **parameters",
    "exact_law": "rule, p_V, q, **parameters",
    "generate": GENERATE,
    "loading.Target.new_cache": "self, capacity=None",
    "loading.Target.load_cache": "self, path",
    "loading.Target.forward": "self, ids_T, cache, taps=(), last=None",
    "cache.Cache.rollback": "self, n",
    "cache.Cache.commit": "self",
    "cache.Cache.save": "self, path",
    **{
        f"{drafter}.propose": "self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K"
        for drafter in ("GemmaAssistant", "PromptLookup", "Scripted")
    },
}


def parameters(signature):
    """Text of each parameter; a shape's letters are no part of its name."""
    return [re.sub(r"_[A-Z]+\b|:.*?(?==|$)| ", "", str(parameter)) for parameter in signature.parameters.values()]


def as_signature(text):
    namespace = {"Sampling": minimtp.Sampling}
    function = ast.parse(f"def f({text}): pass").body[0]
    defaults = [eval(ast.unparse(default), namespace) for default in function.args.defaults]
    names = [argument.arg for argument in function.args.args]
    required = len(names) - len(defaults)
    kinds = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in zip(names, [inspect.Parameter.empty] * required + defaults)
    ]
    if function.args.kwarg:
        kinds.append(inspect.Parameter(function.args.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(kinds)


@pytest.mark.parametrize("name", SIGNATURES)
def test_public_names_have_the_signatures_of_the_contract(name):
    """The contract's parameters come first, under those names and defaults; more may follow."""
    thing = minimtp
    for part in name.split("."):
        thing = getattr(thing, part)
    ours, wanted = parameters(inspect.signature(thing)), parameters(as_signature(SIGNATURES[name]))
    if wanted[-1].startswith("**"):
        assert ours.pop() == wanted.pop()
    assert ours[: len(wanted)] == wanted
    assert all("=" in extra or "*" in extra for extra in ours[len(wanted) :])


def test_a_changed_default_or_name_is_noticed():
    def generate(target, prompt_ids, drafter=None, num_draft=5):
        """Not the contract's."""

    assert parameters(inspect.signature(generate)) != parameters(as_signature(GENERATE))[:4]
    assert parameters(inspect.signature(lambda target, cache: 0)) != parameters(as_signature("target, path"))


def test_what_comes_back_has_the_names_of_the_contract():
    target = minimtp.load("tiny-gemma4")
    cache, ids = target.new_cache(), target.tokenizer.encode("To be")
    assert isinstance(ids, list) and all(type(id) is int for id in ids)
    out = target.forward(ids, cache, taps=("embed", "layer.0.in", "layer.1.attn", "layer.2.mlp", "layer.0.out",
                                           "final_norm", "logits"), last=1)  # fmt: skip
    assert out.logits_TV.shape == (1, target.config.vocab_size) and len(out.hidden_TD) == len(ids)
    assert len(out.taps) == 7 and cache.length == len(ids) and list(cache.tokens) == ids
    assert target.forward(ids, cache, last=0).logits_TV.shape == (0, target.config.vocab_size)
    drafter = minimtp.load_drafter("auto", target)
    step = list(minimtp.generate(target, ids, drafter, max_new_tokens=3))[-1]
    assert step.drafted == len(step.draft.tokens) and step.accepted <= step.verdict.accepted <= step.drafted
    assert len(step.uniforms) == step.drafted + 1 and step.seconds > 0
    assert step.tokens[-1] in (step.verdict.token, *step.draft.tokens)
    assert step.draft.q_KV is None and step.draft.soft_KV is None


def test_all_names_what_is_there():
    assert all(hasattr(minimtp, name) for name in minimtp.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", minimtp.__version__)


# What must not be there

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle", "subprocess", "socket", "urllib",
                     "requests", "http"}  # fmt: skip
ALLOWED = {
    "server": {"http.client", "urllib.error", "urllib.parse", "urllib.request"},  # asks the server a user names
    "shim": {"subprocess"},  # compiles and runs the package's own kernels
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}


def dangerous(tree):
    """What in a module could run or load code that came with data, or reach out of the machine."""
    for module, names in imported(tree):
        if module.split(".")[0] in FORBIDDEN_MODULES:
            yield module
        if module.split(".")[0] == "jinja2" and not module.startswith("jinja2.sandbox"):
            yield from (name for name in names or [module] if name in ("Environment", "Template"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            if function in FORBIDDEN_CALLS | {"os.system", "np.load", "numpy.load", "torch.load"}:
                yield function
            yield from (word.arg for word in node.keywords if word.arg in ("allow_pickle", "shell"))


@pytest.mark.parametrize("name", SOURCES)
def test_nothing_can_run_what_comes_with_data(name):
    assert set(dangerous(SOURCES[name])) <= ALLOWED.get(name, set())


@pytest.mark.parametrize(
    "text",
    ["import pickle", "from pickle import loads", "eval('1')", "def f():\n  exec(x)", "np.load(path)",
     "x(allow_pickle=True)", "from jinja2 import Environment", "import os\nos.system('ls')"],
)  # fmt: skip
def test_the_search_finds_what_is_dangerous(text):
    assert list(dangerous(ast.parse(text)))


def project_files():
    """Text files that are, or will be, in the repository; none where this is no checkout."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=PROJECT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        return []
    return [PROJECT / name for name in listed if name and (PROJECT / name).is_file()]


PRIVATE = re.compile(
    r"(?<![\w.~/-])/(root|home|work|mnt|Users)/\w+|[A-Z]:\\\\?Users|file:///"  # somebody's folders
    r"|\b(artifactory|nexus|devpi|jfrog|codeartifact)\b|://(localhost|\d+\.\d+\.\d+\.\d+)"  # somebody's servers
)


def test_no_machine_is_named_in_the_project():
    found = []
    for path in project_files():
        if path.suffix not in (".safetensors", ".png", ".gguf") and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")
            found += [f"{path.relative_to(PROJECT)}: {match[0]}" for match in PRIVATE.finditer(text)]
    assert not found


def test_the_search_knows_a_machine():
    for text in ("see /home/someone/x", '"/root/x"', "file:///x", "http://10.0.0.1/simple", "https://nexus.x.org"):
        assert PRIVATE.search(text)
    for text in ("https://x.org/home/page", "a/root/x", "$HOME/x", "and/or", "~/work/x"):
        assert not PRIVATE.search(text)


def documents():
    tops = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "weights/README.md", "notebooks/README.md")]
    return [*tops, *sorted((PROJECT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_a_document_names_only_what_is_there(path):
    text = path.read_text(encoding="utf-8")
    named = re.findall(r"\b((?:tests|docs|weights|minimtp)/[\w/.-]*\w)", text)
    linked = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    missing = [name for name in named if not (PROJECT / name).exists()]
    assert not missing + [target for target in linked if not (path.parent / target).exists()]


def test_the_module_table_is_the_order_that_is_held():
    table = re.findall(r"^\| `(\w+)\.py`", (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8"), re.M)
    assert table == [name for name in ORDER if name in MODULES]
