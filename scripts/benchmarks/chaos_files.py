"""Damaged files for `chaos.py`: which, how, and what the commands that read them may do."""

import sys

# What is damaged: (file, the command that reads it).
READERS = {
    "configuration": ("tiny.yaml", ["plan", "tiny.yaml"]),
    "run.json": ("r/run.json", ["report", "r"]),
    "attack.json": ("r/attack.json", ["report", "r"]),
    "certificate.json": ("r/certificate.json", ["report", "r"]),
    "design.json": ("r/design.json", ["report", "r"]),
    "metrics.json": ("r/metrics.json", ["report", "r"]),
    "version.json": ("r/version.json", ["report", "r"]),
    "results.json": ("r/results.json", ["report", "r"]),
    "config.yaml": ("r/config.yaml", ["evaluate", "r"]),
    "proof": ("q.npz", ["verify", "q.npz", "r/model.keras"]),
    "model to verify": ("r/model.keras", ["verify", "q.npz", "r/model.keras"]),
    "model to certify": ("r/model.keras", ["certify", "r", "--samples", "4"]),
    "matrices": ("y.mat", ["import-mat", "y.mat", "--model", "r/model.keras", "--out", "n.keras"]),
    "state of certify": (
        "s0", ["certify", "r", "--samples", "4", "--method", "linear", "--state", "s0"]
    ),
    "state of bracket": ("b0", ["bracket", "r", "--samples", "3", "--state", "b0"]),
}  # fmt: skip


def damaged(path, rng):
    """Damages a file in one of several ways; says which."""
    data = bytearray(path.read_bytes())
    place = rng.randrange(len(data) or 1)
    ways = ("bits", "bytes", "cut", "hole", "doubled", "removed", "number", "empty")
    way = rng.choices(ways, weights=(6, 3, 2, 1, 2, 2, 6, 0.2))[0]
    if way == "bits":
        for _ in range(rng.choice((1, 1, 1, 4, 32))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif way == "bytes":
        data[place : place + 8] = rng.randbytes(8)
    elif way == "cut":
        del data[place:]
    elif way == "hole":
        size = rng.randrange(1, 4096)
        data[place : place + size] = bytes(min(size, len(data) - place))
    elif way == "doubled":
        size = rng.randrange(1, 4096)
        data[place:place] = data[place : place + size]
    elif way == "removed":
        del data[place : place + rng.randrange(1, 64)]
    elif way == "number":
        digits = [i for i, byte in enumerate(data) if 48 <= byte < 58]
        if digits:
            data[rng.choice(digits)] = rng.choice(b"0123456789-.eE")
    else:
        data.clear()
    path.write_bytes(bytes(data))
    return way


def outcome(name, code, text, found, whole):
    """A fault in words, or None."""
    if code not in (0, 1, 2):
        return f"exit code {code}: {text[-300:]}"
    if "Traceback" in text:
        return f"a traceback: {text[-300:]}"
    if name in ("proof", "model to verify") and code == 0:
        return _more(found, whole)
    return None


def _more(found, whole):
    """Whether a damaged proof, or a proof of a damaged model, verifies more than the whole one."""
    if not isinstance(found, dict) or not found.get("holds"):
        return None
    if found["examples"] > whole["examples"]:
        return "more examples are verified"
    if found["gain_upper_bound"] < whole["gain_upper_bound"] * (1 - 1e-12):
        return f"a smaller gain is verified: {found['gain_upper_bound']}"
    return None


_STARTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class")


def watch(sentinel):
    """From now on, this process leaves a file where it starts a program."""

    def hook(event, arguments):
        if event in (
            "os.system",
            "subprocess.Popen",
            "os.exec",
            "os.posix_spawn",
            "pickle.find_class",
        ):
            with open(sentinel, "a", encoding="utf-8") as file:
                file.write(f"{event} {arguments!r}\n")

    sys.addaudithook(hook)
