# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, one case for each arrow.

The source is read with ``ast``, so imports inside functions count as well; two imports in a fresh interpreter
prove the two that matter most at run time.
"""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pvq_vllm", "offline_quant", "server", "demo")
CPP_SUFFIXES = {".cpp", ".h", ".cu", ".cuh"}

# Module or package: the only places that may import it, a file or a folder that ends in "/".
ONLY_IMPORTED_BY = {
    "pvq_vllm._C": (
        "pvq_vllm/ops.py",
        "pvq_vllm/quantizer_ops.py",
        "pvq_vllm/cuda_constants.py",
        "pvq_vllm/cuda_ops.py",
        "pvq_vllm/canonical_ops.py",
        "pvq_vllm/codec/serving.py",
    ),
    "pvq_vllm.cuda_constants": ("pvq_vllm/cuda_ops.py",),
    "pvq_vllm.cuda_ops": ("pvq_vllm/ops.py", "pvq_vllm/quantizer_ops.py", "pvq_vllm/canonical_ops.py"),
    "vllm": (
        "pvq_vllm/__init__.py",  # inside register()
        "pvq_vllm/config.py",
        "pvq_vllm/embedding.py",
        "pvq_vllm/linear.py",
        "pvq_vllm/vllm_launcher.py",
        "server/engine.py",
    ),
    "transformers": ("pvq_vllm/hf_quantizer.py", "offline_quant/", "server/engine.py"),
    "pvq_vllm.hf_quantizer": ("offline_quant/evaluate.py",),
    "pvq_vllm.config": ("pvq_vllm/__init__.py",),
    "pvq_vllm.linear": ("pvq_vllm/config.py", "pvq_vllm/embedding.py"),
    "offline_quant": ("offline_quant/",),
    "server": ("server/",),
    "fastapi": ("server/",),
}

# Place: what it must never import.
NEVER_IMPORTS = {
    "pvq_vllm/codec/": (
        "vllm",
        "transformers",
        "pvq_vllm.arguments",
        "pvq_vllm.ops",
        "pvq_vllm.quantizer_ops",
        "pvq_vllm.cuda_ops",
        "pvq_vllm.canonical_ops",
        "pvq_vllm.parameter",
        "pvq_vllm.config",
        "pvq_vllm.linear",
    ),
    "pvq_vllm/ops.py": ("vllm", "transformers", "pvq_vllm.parameter", "pvq_vllm.config", "pvq_vllm.linear"),
    "pvq_vllm/quantizer_ops.py": (
        "vllm",
        "transformers",
        "pvq_vllm.ops",
        "pvq_vllm.parameter",
        "pvq_vllm.config",
        "pvq_vllm.linear",
    ),
    "pvq_vllm/cuda_ops.py": (
        "vllm",
        "transformers",
        "pvq_vllm.ops",
        "pvq_vllm.quantizer_ops",
        "pvq_vllm.parameter",
        "pvq_vllm.config",
        "pvq_vllm.linear",
    ),
    "pvq_vllm/canonical_ops.py": ("vllm", "transformers", "pvq_vllm.config", "pvq_vllm.linear"),
    "pvq_vllm/parameter.py": ("vllm", "transformers", "pvq_vllm.config", "pvq_vllm.linear"),
    "pvq_vllm/": ("offline_quant", "server", "demo"),
    "offline_quant/": (
        "vllm",
        "server",
        "demo",
        "pvq_vllm.config",
        "pvq_vllm.linear",
        "pvq_vllm.embedding",
        "pvq_vllm.parameter",
    ),
    "server/": ("pvq_vllm", "offline_quant", "demo"),  # vLLM's command line is run as a process of its own
    "demo/": ("pvq_vllm", "offline_quant", "server", "vllm", "torch"),  # commands only, as a user would
}


def python_files():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def cpp_files():
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in CPP_SUFFIXES)


def relative(path):
    return path.relative_to(ROOT).as_posix()


@cache
def imported_names(path):
    """Absolute dotted names that the file imports: ``from a import b`` gives a.b, which may be a module."""
    names = set()
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            # A constant, or the beginning of an f-string such as f"vllm.{place}".
            parts = getattr(node.args[0], "values", [node.args[0]])
            if isinstance(parts[0], ast.Constant):
                names.add(str(parts[0].value).rstrip("."))
    return names


def is_within(name, module):
    return name == module or name.startswith(f"{module}.")


def is_at(file, places):
    return any(file == place or (place.endswith("/") and file.startswith(place)) for place in places)


@pytest.mark.parametrize("module", ONLY_IMPORTED_BY)
def test_only_these_import(module):
    importers = {
        relative(path)
        for path in python_files()
        if any(is_within(name, module) for name in imported_names(path))
    }
    allowed = ONLY_IMPORTED_BY[module]
    assert {file for file in importers if not is_at(file, allowed)} == set()
    unused = {place for place in allowed if not any(is_at(file, [place]) for file in importers)}
    assert unused == set(), "these no longer import it: take them off the list"


@pytest.mark.parametrize(
    ("place", "module"), [(place, module) for place, modules in NEVER_IMPORTS.items() for module in modules]
)
def test_never_imports(place, module):
    files = [path for path in python_files() if is_at(relative(path), [place])]
    assert files, f"{place} is gone: change this table"
    found = {
        relative(path): name for path in files for name in imported_names(path) if is_within(name, module)
    }
    assert found == {}


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8"), re.MULTILINE)


def test_no_cpp_file_includes_torch():
    files = cpp_files()
    assert sum(len(includes(path)) for path in files) > len(files)
    torch = re.compile(r"(torch|ATen|c10|caffe2)(/|\.h)")
    assert {relative(path): name for path in files for name in includes(path) if torch.match(name)} == {}


def test_only_the_bindings_include_pybind11():
    found = {
        relative(path) for path in cpp_files() if any(name.startswith("pybind11") for name in includes(path))
    }
    assert found == {
        "csrc/bindings.cpp",
        "csrc/canonical_bindings.h",
        "csrc/cuda/bindings.cpp",
        "csrc/cuda/bindings.h",
    }


def test_codebooks_do_not_include_kernels():
    stems = ("codebook", "hadamard", "canonical", "canonical_search")
    files = [path for path in cpp_files() if path.parent.name == "csrc" and path.stem in stems]
    assert {path.stem for path in files} == set(stems)
    assert {relative(path): name for path in files for name in includes(path) if "/" in name} == {}


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (["pvq_vllm"], ["torch", "vllm", "transformers"]),
        (
            [
                "pvq_vllm.ops",
                "pvq_vllm.quantizer_ops",
                "pvq_vllm.canonical_ops",
                "pvq_vllm.codec.*",
                "offline_quant.*",
            ],
            ["vllm", "server"],
        ),
    ],
    ids=["package", "codec_and_quantizer"],
)
def test_a_fresh_interpreter_does_not_load(modules, absent):
    names = [
        name
        for module in modules
        for name in (
            [
                f"{module[:-2]}.{path.stem}"
                for path in sorted((ROOT / module[:-2].replace(".", "/")).glob("*.py"))
            ]
            if module.endswith(".*")
            else [module]
        )
    ]
    script = (
        f"import importlib, sys; [importlib.import_module(name) for name in {names}];"
        f"found = set({absent}) & set(sys.modules); sys.exit(f'imported {{found}}' if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
