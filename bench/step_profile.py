"""Where every 5 % of a step goes: bench/results/step_profile.md.

    pip install py-spy
    python bench/step_profile.py [--models smollm2 5m] [--steps 4] [--out FILE]

A GRPO step as bench/peers.py takes it, all cores, sampled a hundred times a second by py-spy from outside;
the first step counts too, what is no step does not. A line is a function with all that it calls; one that
only hands on to a single other is left out.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.peers import finish, make_5m, overrides

SHOWN = 0.05  # of all samples
PASSED_ON = 0.97  # of a function's samples are in one callee: it is no line of its own
STEP = "Trainer.train_step"
_HANDS_ON = re.compile(
    r"<(listcomp|genexpr|lambda)>|_call_impl|__call__|decorate_|Function\.apply|torch/_ops"
)


@dataclass
class Node:
    """A function called in one place, with the samples taken in it and below it."""

    name: str
    samples: int = 0
    callees: dict[str, Node] = field(default_factory=dict)

    def add(self, stack: list[str], count: int) -> None:
        self.samples += count
        if stack:
            self.callees.setdefault(stack[0], Node(stack[0])).add(stack[1:], count)

    def lines(self, total: int, depth: int = 0) -> list[str]:
        """The tree below, indented, as far as it is SHOWN; what a function does itself is a line too."""
        big = [one for one in self.callees.values() if one.samples >= SHOWN * total]
        big.sort(key=lambda one: -one.samples)
        if len(big) == 1 and big[0].samples >= PASSED_ON * self.samples:
            return big[0].lines(total, depth)
        found = [f"{'  ' * depth}{self.samples / total:6.1%}  {self.name}"]
        for one in big:
            found += one.lines(total, depth + 1)
        rest = self.samples - sum(one.samples for one in big)
        if big and rest >= SHOWN * total:
            found.append(f"{'  ' * (depth + 1)}{rest / total:6.1%}  (itself, and what is smaller)")
        return found


def tree(folded: str) -> Node:
    """Of py-spy's raw lines, `frame;frame;... count`, those that are in a step."""
    root = Node(STEP)
    for line in folded.splitlines():
        frames, _, count = line.rpartition(" ")
        stack = [frame.partition(" (")[0] for frame in frames.split(";") if not _HANDS_ON.search(frame)]
        if STEP in stack:
            root.add(stack[stack.index(STEP) + 1 :], int(count))
    return root


def leaves(folded: str) -> Counter[str]:
    """Samples in a step by the running line; torch's kernels count for the line that calls them."""
    found: Counter[str] = Counter()
    for line in folded.splitlines():
        frames, _, count = line.rpartition(" ")
        if f"{STEP} (" in frames:
            found[frames.rpartition(";")[2]] += int(count)
    return found


def profile(model: str, steps: int) -> list[str]:
    """The section of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if model == "5m":
            make_5m(folder)
        raw = folder / "stacks"
        command = [
            "py-spy",
            "record",
            "--subprocesses",
            "--rate",
            "100",
            "--format",
            "raw",
            "--output",
            str(raw),
        ]
        run = [sys.executable, "-m", "hpt_mega.cli", "train", *overrides(model, folder), "algorithm=grpo"]
        run += [f"trainer.steps={steps}", f"run_dir={folder / 'run'}"]
        finish([*command, "--", *run], folder)
        folded = raw.read_text()
    root = tree(folded)
    shares = leaves(folded).most_common(12)
    return [
        f"\n## {model}: {root.samples} samples\n",
        "```",
        *root.lines(root.samples),
        "```",
        "\n| running line | share |",
        "|---|---|",
        *(f"| {name} | {count / root.samples:.1%} |" for name, count in shares),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("smollm2", "5m"), default=["smollm2", "5m"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("bench/results/step_profile.md"))
    options = parser.parse_args()
    lines = [
        "# Where a step's time goes",
        "",
        f"`python bench/step_profile.py --steps {options.steps}`: a GRPO step",
    ]
    lines += ["of bench/peers.py by py-spy; functions and lines with 5 % of it or more."]
    for model in options.models:
        lines += profile(model, options.steps)
    options.out.write_text("\n".join(lines) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
