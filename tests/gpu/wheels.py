"""Fill a folder with what `make gpu` may miss on a machine without network; at most 60 MiB.

    python tests/gpu/wheels.py [--python 3.12] [--output build/gpu-wheels]

Run it where a package index can be reached. The machine itself has torch, transformers, accelerate and peft.
"""

import argparse
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("trl", "datasets", "dill", "multiprocess", "math-verify", "latex2sympy2-extended", "antlr4-python3-runtime"),
    *("pytest", "pluggy", "iniconfig", "pytest-xdist", "execnet", "hypothesis", "rich", "markdown-it-py", "mdurl"),
    *("deepspeed", "hjson", "ninja", "msgpack", "einops", "pydantic", "typing-inspection", "annotated-types"),
)
"""Not their dependencies, of which torch alone would be too large."""
MOST_BYTES = 60 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", help="of the machine")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-wheels")
    args = parser.parse_args()
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(args.output)]
    machine = ["--only-binary", ":all:", "--python-version", args.python]
    for platform in ("manylinux_2_28_x86_64", "manylinux2014_x86_64", "manylinux_2_17_x86_64"):
        machine += ["--platform", platform]
    subprocess.run([*pip, *machine, "-c", str(ROOT / "constraints.txt"), *PACKAGES], check=True)
    core = _requirement(args.output)
    subprocess.run([*pip, *machine, core], check=True)
    size = sum(wheel.stat().st_size for wheel in args.output.glob("*.whl"))
    assert size <= MOST_BYTES, f"{size / 2**20:.0f} MiB"
    print(f"{args.output}: {len(list(args.output.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB")


def _requirement(folder: Path) -> str:
    """Return which pydantic-core the pydantic in `folder` needs, which is exact."""
    import email
    import zipfile

    wheel = next(folder.glob("pydantic-*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        headers = email.message_from_bytes(archive.read(name)).get_all("Requires-Dist", [])
    return next(header for header in headers if header.startswith("pydantic-core"))


if __name__ == "__main__":
    main()
