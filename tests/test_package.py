"""The package itself: import, version guard, command line, the programs that its pages show."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from conftest import raises

import jaxsparse as js
from jaxsparse import __main__ as report
from jaxsparse import _ffi, _native

ROOT = pathlib.Path(__file__).parents[1]


def run_python(code, **environment):
    """Runs code in a fresh interpreter on the CPU."""
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        check=False,
    )


def test_every_target_has_a_handler_and_only_those():
    assert set(_native.cpu_handlers()) == set(_ffi.TARGETS)
    assert set(_native.cuda_handlers()) in (set(), set(_ffi.TARGETS + _ffi.CUDA_TARGETS))


def test_newer_headers_than_the_runtime_are_refused_before_anything_is_registered(monkeypatch):
    monkeypatch.setattr(_ffi, "_runtime_ffi_version", lambda: (0, 1))
    with raises(ImportError, _native.jaxlib_version(), "FFI API 0.1", "install jaxlib"):
        _ffi._check_versions()


def test_refused_import_leaves_jax_usable():
    code = (
        "import jaxlib, pathlib; read = pathlib.Path.read_text\n"
        "pathlib.Path.read_text = lambda p, *a, **k: "
        "'define XLA_FFI_API_MAJOR 0\\ndefine XLA_FFI_API_MINOR 0' if p.name == 'c_api.h' else read(p, *a, **k)\n"
        "try:\n    import jaxsparse\nexcept ImportError as e:\n    print('refused', e)\n"
        "import jax.numpy as jnp; print(jnp.ones(3).sum())"
    )
    out = run_python(code)
    assert "refused" in out.stdout, out.stderr
    assert "3.0" in out.stdout


def test_report_names_versions_and_devices():
    out = subprocess.run([sys.executable, "-m", "jaxsparse"], capture_output=True, text=True, check=True)
    assert f"jaxsparse {js.__version__}" in out.stdout
    assert "float64" in out.stdout
    assert " no" not in re.sub("CUDA kernels: no|gpu: no device", "", out.stdout), out.stdout + out.stderr


def test_report_says_no_and_why_where_not_even_a_tensor_can_be_made(monkeypatch, capsys):
    def fails(*args):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(js, "SparseTensor", fails)
    monkeypatch.setattr(sys, "argv", ["jaxsparse"])
    report.main()
    printed = capsys.readouterr()
    assert " yes" not in printed.out
    assert "float64: no such kernel" in printed.err


def test_version_is_that_of_the_project_file():
    assert f'version = "{js.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/concepts.md"])
def test_python_in_the_docs_runs_as_shown(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
    assert blocks, f"{page} shows no Python"
    for block in blocks:
        out = run_python(block)
        assert out.returncode == 0, out.stderr


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_files_that_a_page_names_exist(page):
    text = page.read_text()
    named = set(re.findall(r"\b(?:jaxsparse|bindings|cuda|tests|examples|benchmarks|docs)/[\w./*]*[\w*]", text))
    assert len(named) > (20 if page.name == "internals.md" else 0)
    assert [name for name in named if not list(ROOT.glob(name))] == []
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_public_names_have_docstrings():
    for module in (js, js.nn, js.ops, js.models):
        for name in module.__all__:
            documented = getattr(module, name)
            if not isinstance(documented, list):
                assert documented.__doc__, f"{module.__name__}.{name} has no docstring"


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="jaxsparse_nothing"):
        _ffi.call("jaxsparse_nothing", [])
