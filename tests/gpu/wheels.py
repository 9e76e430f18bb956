"""Fill a folder with what `make gpu` may miss on a machine without network; at most 60 MiB.

    python tests/gpu/wheels.py [--python 3.12] [--output build/gpu-wheels]

Run it where a package index can be reached. The machine itself has torch, transformers, accelerate and peft.
"""

import argparse
import email
import os
import subprocess
import sys
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("trl", "datasets", "dill", "multiprocess", "math-verify", "latex2sympy2-extended", "antlr4-python3-runtime"),
    *("pytest", "pluggy", "iniconfig", "pytest-xdist", "execnet", "hypothesis", "rich", "markdown-it-py", "mdurl"),
    *("hjson", "ninja", "msgpack", "einops", "py-cpuinfo", "pydantic", "typing-inspection", "annotated-types"),
)
"""Not their dependencies, of which torch alone would be too large."""
BUILT = "deepspeed"
"""Which has no wheel; its own build wants torch here."""
MOST_BYTES = 60 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="of the machine")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-wheels")
    args = parser.parse_args()
    constraints = ["-c", str(ROOT / "constraints.txt")]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(args.output)]
    machine = ["--only-binary", ":all:", "--python-version", args.python]
    for platform in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64"):
        machine += ["--platform", platform]
    subprocess.run([*pip, *machine, *constraints, *PACKAGES], check=True)
    subprocess.run([*pip, *machine, _core_of_pydantic(args.output)], check=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    environment = os.environ | {"DS_BUILD_OPS": "0"}
    subprocess.run([*build, *constraints, "--wheel-dir", str(args.output), BUILT], check=True, env=environment)
    size = sum(wheel.stat().st_size for wheel in args.output.glob("*.whl"))
    assert size <= MOST_BYTES, f"{size / 2**20:.0f} MiB"
    print(f"{args.output}: {len(list(args.output.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB")


def _core_of_pydantic(folder: Path) -> str:
    """Return the one pydantic-core that the pydantic in `folder` works with."""
    wheel = next(folder.glob("pydantic-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        headers = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    return next(header for header in headers if header.startswith("pydantic-core"))


if __name__ == "__main__":
    main()
