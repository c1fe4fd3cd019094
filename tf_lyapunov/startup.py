"""Quiet start of the command line.

TensorFlow writes to stderr while it is imported, whatever TF_CPP_MIN_LOG_LEVEL says, and Keras
imports it before any code of the command line runs.
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import pathlib
import sys
import tempfile


def is_command_line():
    """Whether this process was started as `tf-lyapunov` or `python -m tf_lyapunov.cli`."""
    started = list(getattr(sys, "orig_argv", ()))
    as_module = "-m" in started and "tf_lyapunov.cli" in started[started.index("-m") + 1 :][:1]
    return as_module or pathlib.Path(sys.argv[0] if sys.argv else "").stem == "tf-lyapunov"


@contextlib.contextmanager
def quiet():
    """Within it, the command line's stderr is held back, and shown only if the block fails.

    So it is while TensorFlow is imported later: Keras with another backend imports it, where it is
    installed, when it first writes the configuration of a layer. Whoever sets TF_CPP_MIN_LOG_LEVEL
    (to 0, for example) sees what TensorFlow says; other programs are left alone.
    """
    if not is_command_line() or "TF_CPP_MIN_LOG_LEVEL" in os.environ:
        yield
        return
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # "2" reports missing GPUs as errors
    with _held_back():
        yield
    if "tensorflow" not in sys.modules:
        sys.meta_path.insert(0, _QuietTensorFlow)


@contextlib.contextmanager
def _held_back():
    with contextlib.ExitStack() as stack:
        try:
            stderr = os.dup(2)
        except OSError:  # stderr is closed
            yield
            return
        stack.callback(os.close, stderr)
        held = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(held.fileno(), 2)
        try:
            yield
        except Exception:
            held.seek(0)
            os.write(stderr, held.read())
            raise
        finally:
            if sys.stderr is not None:
                sys.stderr.flush()
            os.dup2(stderr, 2)


class _QuietTensorFlow:
    """Finds TensorFlow as Python does, and holds back what it writes while it is imported."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "tensorflow":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def quietly(module):
                with _held_back():
                    execute(module)

            spec.loader.exec_module = quietly
        return spec


# What Keras imports beside its backend, and a command that only calls a network has no use for.
_UNUSED = ("tensorflow", "sklearn", "matplotlib", "IPython")


def light():
    """Lets the command line's Keras compute with NumPy, which starts in half the time.

    For commands about an ONNX file: its network is bounded by NumPy whatever the backend, and its
    answers are replayed by onnxruntime. Keras's NumPy backend needs parts of JAX; without it, and
    where KERAS_BACKEND names another backend, nothing changes but that scikit-learn, Matplotlib
    and IPython are not imported. Other programs are left alone.
    """
    if not is_command_line() or "keras" in sys.modules:
        return
    unused = _UNUSED[1:]
    if "KERAS_BACKEND" not in os.environ and importlib.util.find_spec("jax") is not None:
        os.environ["KERAS_BACKEND"], unused = "numpy", _UNUSED
    for name in unused:
        # What is None here is not to be found, as if it were not installed.
        sys.modules.setdefault(name, None)
