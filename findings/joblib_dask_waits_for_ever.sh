#!/usr/bin/env bash
# joblib 1.6.0 with dask and distributed 2026.8.0: `Parallel` waits for ever for a task that dask gave up.
#
# Expected: an error in the caller, as with loky, when a task ends every worker that it meets.
# Seen: dask reports the task as an error (`KilledWorker`), and joblib's backend stores it in the future
# without calling its callback, which alone tells `Parallel` that anything has happened. The same goes
# for tasks that no worker can unpickle, such as those of a package that workers do not have.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check \
  joblib==1.6.0 dask==2026.8.0 distributed==2026.8.0
cd "$folder"
cat > shown.py <<'END'
import os
import threading

import dask
import joblib
from distributed import Client, LocalCluster


def deadly(number):
    os.kill(os.getpid(), 9)


def call(found):
    with joblib.parallel_config(backend="dask"):
        try:
            found.append(joblib.Parallel(n_jobs=2)(joblib.delayed(deadly)(i) for i in range(2)))
        except Exception as error:
            found.append(error)


if __name__ == "__main__":
    dask.config.set({"distributed.scheduler.allowed-failures": 0})
    with LocalCluster(2, threads_per_worker=1, silence_logs=50, dashboard_address=None) as cluster:
        with Client(cluster) as client:
            for way in ("dask", "joblib"):
                found = []
                if way == "dask":
                    found = [f.exception() for f in client.map(deadly, range(2), pure=False)]
                else:
                    thread = threading.Thread(target=call, args=(found,), daemon=True)
                    thread.start()
                    thread.join(30)
                print(way, [type(error).__name__ for error in found] or "still waits after 30 s")
                assert bool(found) == (way == "dask"), "changed"
            os._exit(0)
END
"$folder/env/bin/python" shown.py
