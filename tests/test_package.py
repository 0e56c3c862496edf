"""The package as a whole: what importing costs, which backends there are and why not, what it reports."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import logitloss as ll


def python(program, **environment):
    """Run a program in a fresh interpreter and return its standard output."""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_import_imports_nothing_heavy():
    python(
        "import logitloss, sys\n"
        "assert not {'numba', 'scipy', 'click', 'rich', 'torch', 'ml_dtypes'} & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith('logitloss._kernels')]"
    )


def test_a_call_imports_nothing_heavy():
    python(
        "import logitloss, sys, numpy\n"
        "logitloss.cross_entropy(numpy.zeros((2, 3)), [0, 1], backend='reference')\n"
        "logitloss.backends()\n"
        "assert not {'numba', 'scipy', 'click', 'rich', 'torch', 'ml_dtypes'} & set(sys.modules)"
    )


def test_kernels_refuse_a_second_name():
    """At the root of the repository `import _kernels` would make a second copy of every kernel."""
    root = Path(__file__).parent.parent
    if not (root / "_kernels").is_dir():
        pytest.skip("not a checkout: there is no folder _kernels to import from")
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r})\n"
        "try:\n    import _kernels\nexcept ImportError as error:\n    print(error)"
    )
    assert "import it under that name" in python(program)


def test_every_public_name_is_there_and_documented():
    names = {
        *("cross_entropy", "cross_entropy_and_lse", "cross_entropy_grad", "cross_entropy_value_and_grad"),
        *("binary_cross_entropy_with_logits", "binary_cross_entropy_with_logits_grad"),
        *("binary_cross_entropy_with_logits_value_and_grad", "binary_cross_entropy"),
        *("logistic_loss", "logistic_loss_grad", "logistic_loss_value_and_grad"),
        *("nll_loss", "kl_div", "entropy", "logsumexp", "log_softmax", "softmax", "sigmoid", "log_sigmoid"),
        *("LinearLogits", "linear_cross_entropy", "linear_cross_entropy_value_and_grad"),
        *("set_num_threads", "get_num_threads", "backends", "raise_deferred", "show_versions"),
    }
    assert names == set(ll.__all__)
    for name in names:
        assert getattr(ll, name).__doc__.strip()


def test_numba_that_compiles_nothing_is_missing():
    program = (
        "import logitloss, numpy\n"
        "print(logitloss.backends()['numba'])\n"
        "try:\n    logitloss.cross_entropy(numpy.zeros((2, 3)), [0, 1], backend='numba')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    reason, error = done.stdout.splitlines()
    assert reason == error
    assert "NUMBA_DISABLE_JIT is set" in error


def test_backends_lists_each_name_with_its_reason():
    table = ll.backends()
    assert set(table) == {
        "cython",
        "cython-avx512",
        "cython-avx2",
        "cython-baseline",
        "numba",
        "cuda",
        "reference",
    }
    assert table["reference"] is None
    for name, reason in table.items():
        if reason is None:
            assert ll.cross_entropy(np.zeros((1, 2)), [0], backend=name) == pytest.approx(np.log(2))
        else:
            assert len(reason) > 10
            with pytest.raises(ImportError) as caught:
                ll.cross_entropy(np.zeros((1, 2)), [0], backend=name)
            assert str(caught.value) == reason


def test_a_missing_extension_is_an_error_that_says_how_to_build():
    program = (
        "import sys; sys.modules['logitloss._kernels.cython_cpu'] = None\n"
        "import logitloss\n"
        "try:\n    logitloss.cross_entropy([[0.0, 1.0]], [0])\n"
        "except ImportError as error:\n    print(error)\n"
        "assert logitloss.cross_entropy([[0.0, 0.0]], [0], backend='reference') > 0.69\n"
        "assert logitloss.backends()['reference'] is None\n"
        "assert 'pip install' in logitloss.backends()['cython-baseline']"
    )
    message = python(program)
    assert message.startswith("backend 'cython' is missing:")
    assert "pip install" in message


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_an_instruction_set_can_be_forced(isa):
    reason = ll.backends()[f"cython-{isa}"]
    if reason is not None:
        pytest.skip(reason)
    program = (
        "import logitloss, io, contextlib\n"
        "logitloss.cross_entropy([[0.0, 1.0]], [0])\n"
        "with contextlib.redirect_stdout(io.StringIO()) as text:\n    logitloss.show_versions()\n"
        "print([line for line in text.getvalue().splitlines() if line.startswith('backend cython:')][0])"
    )
    assert python(program, LOGITLOSS_ISA=isa) == f"backend cython: usable, is cython-{isa}"


def test_an_unknown_instruction_set_is_refused_by_name():
    reason = ll.backends()["cython"]
    if reason is not None:
        pytest.skip(reason)
    program = (
        "import logitloss\n"
        "try:\n    logitloss.cross_entropy([[0.0, 1.0]], [0])\n"
        "except (ImportError, ValueError) as error:\n    print(error)"
    )
    message = python(program, LOGITLOSS_ISA="sse9")
    assert "LOGITLOSS_ISA" in message
    assert "'sse9'" in message
    assert "baseline" in message


def test_show_versions(capsys):
    ll.show_versions()
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["numpy"] == np.__version__
    assert lines["threads"] == str(ll.get_num_threads())
    assert lines["backend reference"] == "usable, is reference"
    for name, reason in ll.backends().items():
        assert lines[f"backend {name}"].startswith("usable" if reason is None else reason[:20])
    if ll.backends()["cython"] is None:
        assert "instruction sets" in lines
        assert {"kernels' openmp", "kernels' compiler", "kernels' cython"} <= set(lines)


def test_worked_numbers_of_the_readme(backend):
    logits = np.array([[0.1234, 0.5555, 0.3211]] * 3)
    assert round(ll.cross_entropy(logits, [0, 1, 2], backend=backend), 4) == 1.1142
    assert ll.softmax(np.array([1.0, 2.0, 3.0]), backend=backend).round(2).tolist() == [0.09, 0.24, 0.67]
    held = ll.nll_loss(np.log([[0.6, 0.3, 0.1]] * 3), [0, 1, 2], reduction="none", backend=backend)
    assert held.tolist() == pytest.approx([-np.log(0.6), -np.log(0.3), -np.log(0.1)])
    x = np.full(3, -0.0381)
    with_logits = ll.binary_cross_entropy_with_logits(x, [1, 1, 0], backend=backend)
    p = ll.sigmoid(x, backend=backend)
    assert round(with_logits, 4) == round(ll.binary_cross_entropy(p, [1, 1, 0], backend=backend), 4) == 0.6997
