"""Everything that needs a GPU, in one command: tests of this folder and of kernels, then the tables of benchmarks/gpu.py.

    make gpu                                           # or
    python3 tests/gpu/run.py --output gpu.json

Made for a machine that has torch 2.11 or later, transformers 5.17 or later, accelerate and peft, and no network: packages
that are missing are taken from the folder that tests/gpu/wheels.py fills. Each part has a time limit, all of them together
nine minutes. The JSON has the machine, what failed and the tables; failures are also printed as a list for an issue.
"""

import argparse
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


ROOT = Path(__file__).parents[2]
KERNELS = "tests/rollout/group/test_kernels.py", "tests/logprobs/test_kernels.py"
"""Which run in an interpreter elsewhere."""
RESULT = re.compile(r"\] (PASSED|FAILED|ERROR|SKIPPED) (tests/.*?)\s*$")
SUMMARY = re.compile(r"^(?:FAILED|ERROR) (tests/.*?) - (.*)$")


def installed(wheels: Path) -> str:
    """Install the packages of `wheels` that are missing, and return the folder they are in."""
    site = tempfile.mkdtemp(prefix="gpu-site-")
    missing = [str(wheel) for wheel in sorted(wheels.glob("*.whl")) if not _is_there(wheel.name.split("-")[0])]
    if missing:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", site, *missing], check=True)
    return site


def _is_there(name: str) -> bool:
    try:
        importlib.metadata.version(name.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def ran(command: list[str], environment: dict[str, str], seconds: float) -> str:
    """Return what a command prints within `seconds`; then it is ended, with all that it has started."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0] + f"\nended after {seconds:.0f} s\n"


def tests(environment: dict[str, str], seconds: float, workers: int, log: Path) -> dict:
    """Run the tests; see `outcomes`."""
    options = f"-v -n {workers} --maxschedchunk 1 --tb short -rf --durations 15 -p no:cacheprovider".split()
    printed = ran(["-m", "pytest", *options, "tests/gpu", *KERNELS], environment, seconds)
    log.write_text(printed)
    return outcomes(printed)


def outcomes(printed: str) -> dict:
    """From what pytest prints, also if it was ended: how many tests passed, and the message of each that failed."""
    kinds, messages = {}, {}
    for line in printed.splitlines():
        if found := RESULT.search(line):
            kinds[found[2]] = found[1]
        if found := SUMMARY.search(line):
            messages[found[1]] = found[2]
    failed = {name: messages.get(name, "") for name, kind in kinds.items() if kind in ("FAILED", "ERROR")}
    counts = {kind.lower(): list(kinds.values()).count(kind) for kind in ("PASSED", "SKIPPED")}
    return counts | {"failed": failed, "last line": printed.strip().splitlines()[-1:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=ROOT / "build" / "gpu-wheels")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--test_seconds", type=float, default=180, help="for the tests, of these")
    parser.add_argument("--workers", type=int, default=8, help="tests at a time")
    parser.add_argument("--models", nargs="+", default=["0.5b", "1.5b"], help="of the tables")
    args = parser.parse_args()
    start = time.perf_counter()
    path = [str(ROOT / "src"), installed(args.wheels), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    log = args.output.with_suffix(".tests.log")
    result = {"tests": tests(environment, args.test_seconds, args.workers, log)}
    print(failures(result["tests"]), flush=True)
    args.output.write_text(json.dumps(result, indent=1))
    tables = args.output.with_suffix(".tables.json")
    left = args.seconds - (time.perf_counter() - start)
    command = ["benchmarks/gpu.py", "--output", str(tables), "--models", *args.models, "--limit", "60"]
    print(ran(command, environment, left))
    result |= json.loads(tables.read_text()) if tables.exists() else {}
    args.output.write_text(json.dumps(result, indent=1))
    print(f"{args.output}: {time.perf_counter() - start:.0f} s")


def failures(found: dict) -> str:
    """What failed, as a list for an issue."""
    lines = [f"- `{name}`: {message}" for name, message in sorted(found["failed"].items())]
    title = f"{len(lines)} GPU tests failed, {found['passed']} passed, {found['skipped']} were skipped."
    return "\n".join([title, *found["last line"], *lines])


if __name__ == "__main__":
    main()
