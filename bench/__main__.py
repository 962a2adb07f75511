"""All benchmarks, or some, by one command; each rewrites its page in bench/results.

python -m bench [NAME...]     # the demo model must be there (make demo); all of them take many hours
python -m bench --list
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import time
from pathlib import Path

from bench._gpu import SKIPPED

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def scripts() -> dict[str, Path]:
    """The benchmarks by name."""
    return {path.stem: path for path in sorted(HERE.glob("*.py")) if not path.stem.startswith("_")}


def summary(script: Path) -> str:
    """The first line of what it says of itself."""
    return (ast.get_docstring(ast.parse(script.read_text())) or "").partition("\n")[0]


def run(name: str, script: Path) -> bool:
    """Whether it came to its end, or said that this machine lacks what it needs."""
    begun = time.monotonic()
    root = str(HERE.parent)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, str(script), "--out", str(RESULTS / f"{name}.md")]
    code = subprocess.run(command, cwd=root, env=os.environ | {"PYTHONPATH": paths}).returncode
    minutes = (time.monotonic() - begun) / 60
    verdict = {0: "done", SKIPPED: "skipped"}.get(code, f"FAILED, exit code {code}")
    print(f"{name}: {verdict}, {minutes:.1f} min", flush=True)
    return code in (0, SKIPPED)


def main() -> int:
    known = scripts()
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Run benchmarks one after the other; each rewrites its page in bench/results.",
        epilog="example: python -m bench layouts packing",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--list", action="store_true", help="name them, run none")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in known]:
        parser.error(f"no benchmark is called {unknown[0]}; known: {', '.join(known)}")
    chosen = {name: known[name] for name in options.names or known}
    if options.list:
        for name, script in chosen.items():
            print(f"{name:20}{summary(script)}")
        return 0
    failed = [name for name, script in chosen.items() if not run(name, script)]
    if failed:
        print(f"{len(failed)} of {len(chosen)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
