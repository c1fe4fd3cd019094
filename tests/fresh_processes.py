"""New processes for tests' scripts, forked from one that has imported a backend already.

Importing TensorFlow or PyTorch takes some ten seconds of a core, a fork none. What was imported
computed nothing, so that a script finds what it would find in a process of its own: no threads, no
model, and nothing of the test's. Where a system does not fork, every script is started afresh.
"""

import atexit
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
SERVER = """
import json, os, signal, sys, types, warnings
import keras, tf_lyapunov
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    signal.alarm(job["seconds"])
    for number, path in enumerate((os.devnull, *job["files"])):
        file = os.open(path, os.O_RDWR)
        os.dup2(file, number)
        os.close(file)
    os.chdir(job["folder"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv, sys.path[:0] = ["-c", *job["arguments"]], job["path"]
    warnings.resetwarnings()
    warnings.simplefilter(job["warnings"])
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    code = 0
    try:
        exec(compile(job["code"], "<script>", "exec"), main.__dict__)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        import traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
"""
# A script that lasts longer is ended.
SECONDS = 900
_SERVERS = {}


def run(
    code, *arguments, backend="tensorflow", folder=ROOT, path=(), warnings="default", **environment
):
    """The finished process of `python -c CODE ARGUMENTS` with a backend of Keras.

    Args:
        code: the script.
        arguments: of the script, as `sys.argv[1:]`.
        backend: its `KERAS_BACKEND`.
        folder: the working directory.
        path: folders that modules are found in.
        warnings: what is done about them: "default", "ignore", "error".
        environment: variables that are read after the imports.

    Returns:
        `subprocess.CompletedProcess` with text.
    """
    variables = {
        **os.environ,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([*map(str, path), str(ROOT)]),
        "KERAS_BACKEND": backend,
        **environment,
    }
    variables.pop("JAX_ENABLE_X64", None)
    arguments = [str(argument) for argument in arguments]
    if not hasattr(os, "fork"):
        command = [sys.executable, "-W", warnings, "-c", code, *arguments]
        return subprocess.run(
            command,
            env=variables,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    with tempfile.TemporaryDirectory() as kept:
        files = [pathlib.Path(kept, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        job = {
            "code": code,
            "arguments": arguments,
            "folder": str(folder),
            "path": [str(part) for part in path],
            "seconds": SECONDS,
            "environment": variables,
            "warnings": warnings,
            "files": [str(file) for file in files],
        }
        server = _server(backend, variables)
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = (file.read_text() for file in files)
    return subprocess.CompletedProcess(["python", "-c", *arguments], code, out, err)


def output(code, *arguments, **options):
    """What a script printed, as text; fails with its last messages where it fails."""
    done = run(code, *arguments, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _server(backend, variables):
    if backend not in _SERVERS:
        _SERVERS[backend] = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        atexit.register(_SERVERS[backend].kill)
    return _SERVERS[backend]
