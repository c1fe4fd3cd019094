"""Processes of a run."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = """
import json, os, sys
from tf_lyapunov import cli, models
from tf_lyapunov.experiments import runner, execution
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitpid(job["wait"], 0)[1], flush=True)
        continue
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os.environ.update(job["environment"])
        try:
            code = cli.main(job["arguments"]) if "arguments" in job else exec(job["code"], {}) or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    print(child, flush=True)
"""


class Processes:
    """Starts, kills and awaits processes of the command line; they are forked after the imports."""

    def __init__(self, folder, **environment):
        self.folder = folder
        self.zygote = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env=dict(os.environ, PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="3", **environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.running = set()
        self.count = 0

    def _ask(self, **job):
        self.zygote.stdin.write(json.dumps(job) + "\n")
        self.zygote.stdin.flush()
        return int(self.zygote.stdout.readline())

    def start(self, *arguments, code=None, **environment):
        """Starts `tf-lyapunov ARGUMENTS`, or `code`; returns its number and its log's path."""
        self.count += 1
        log = self.folder / f"log-{self.count}.txt"
        what = {"code": code} if code else {"arguments": [str(a) for a in arguments]}
        child = self._ask(log=str(log), environment=environment, **what)
        self.running.add(child)
        return child, log

    def wait(self, child):
        """Exit code, or minus the number of the signal."""
        status = self._ask(wait=child)
        self.running.discard(child)
        return os.waitstatus_to_exitcode(status)

    def run(self, *arguments, code=None, **environment):
        child, log = self.start(*arguments, code=code, **environment)
        return self.wait(child), log.read_text()

    def cluster(self, *arguments, workers=2, **environment):
        """Starts one process per worker; returns them in order."""
        addresses = [f"localhost:{port}" for port in free_ports(workers)]
        return [
            self.start(
                *arguments,
                TF_CONFIG=json.dumps(
                    {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
                ),
                **environment,
            )
            for i in range(workers)
        ]

    def close(self):
        for child in self.running:
            os.kill(child, 9)
        self.zygote.kill()
        self.zygote.communicate()


def start(log, *arguments, **environment):
    """Starts `tf-lyapunov ARGUMENTS` afresh: not every backend survives a fork."""
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "tf_lyapunov.cli", *map(str, arguments)],
            env=dict(os.environ, PYTHONPATH=str(ROOT), TF_CPP_MIN_LOG_LEVEL="3", **environment),
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("localhost", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def until(condition, seconds=120, pause=0.005):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(pause)
