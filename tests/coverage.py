#!/usr/bin/env python3
"""The lines and branches of exfusion.h that the test programs execute, by section.

  python3 tests/coverage.py [--missing SECTION]

Compiles every tests/test_*.c with gcc's counters at -O0, without OpenMP, runs it, and
adds up what gcov says. A line or branch counts when any program took it, and a line of
the fast kernels when any instruction set did. --missing: the lines nobody executed and
the branches nobody took. What only AVX-512, NEON or another system compiles is left out.
"""
import argparse
import glob
import gzip
import json
import os
import re
import shutil
import subprocess
import sys

OUT = "build/coverage"
FLAGS = ["-std=c99", "-w", "-O0", "-g", "--coverage", "-pthread"]
EXTRA = {"test_core": [["-DEXF_NO_SIMD"]]}   # programs once more, with these flags


def run_programs(cc):
    """Compiles and runs all; each has a folder of its own for the counters."""
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs("build/tmp", exist_ok=True)
    for source in sorted(glob.glob("tests/test_*.c")) + ["tests/golden_hash.c"]:
        name = os.path.basename(source)[:-2]
        for k, extra in enumerate([[]] + EXTRA.get(name, [])):
            folder = f"{OUT}/{name}.{k}"
            os.makedirs(folder)
            exe = f"{folder}/{name}"
            subprocess.run([cc, *FLAGS, *extra, '-DTEST_TMP="build/tmp"', source, "-o",
                            exe, "-lm"], check=True)
            for args in [["ref"], ["sse2"], []] if name == "golden_hash" else [[]]:
                done = subprocess.run([exe, *args], stdout=subprocess.PIPE, text=True)
                print(f"{name:18} {done.stdout.strip().splitlines()[-1][:40]}",
                      flush=True)


def counts():
    """line -> was it executed; (line, index) -> was the branch taken"""
    lines, branches = {}, {}
    for data in glob.glob(f"{OUT}/*/*.gcda"):
        folder = os.path.dirname(data)
        subprocess.run(["gcov", "--json-format", "--branch-probabilities",
                        os.path.basename(data)], cwd=folder, check=True,
                       stdout=subprocess.DEVNULL)
        for path in glob.glob(f"{folder}/*.gcov.json.gz"):
            with gzip.open(path, "rt") as f:
                report = json.load(f)
            for file in report["files"]:
                if not file["file"].endswith("exfusion.h"):
                    continue
                for line in file["lines"]:
                    if line.get("function_name", "").endswith("_avx512"):
                        continue
                    n = line["line_number"]
                    lines[n] = lines.get(n, False) or line["count"] > 0
                    for i, b in enumerate(line["branches"]):
                        branches[n, i] = branches.get((n, i), False) or b["count"] > 0
    return lines, branches


def sections(path):
    """[(name, first line)] of the implementation"""
    found = []
    with open(path, encoding="utf-8") as f:
        for n, line in enumerate(f, 1):
            tag = re.match(r"/\* [-=]{4}.*>>([\w-]+)", line)
            if tag:
                found.append((tag.group(1), n))
    start = [name for name, _ in found].index("impl")
    return found[start:]


def percent(values):
    values = list(values)
    if not values:
        return "        -"
    return f"{100 * sum(values) / len(values):6.2f} % of {len(values):5}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--missing", metavar="SECTION", help="list what is not covered")
    args = parser.parse_args()
    if args.missing is None:
        run_programs(os.environ.get("CC", "gcc"))
    lines, branches = counts()
    if not lines:
        sys.exit("no counters: run it without --missing first, with gcc and gcov")
    tags = sections("exfusion.h")
    with open("exfusion.h", encoding="utf-8") as f:
        text = f.read().split("\n")
    print(f"{'section':16} {'lines':>18} {'branches':>20}")
    for (name, first), (_, last) in zip(tags, tags[1:] + [("", len(text) + 1)]):
        ln = {n: v for n, v in lines.items() if first <= n < last}
        br = {k: v for k, v in branches.items() if first <= k[0] < last}
        if ln:
            print(f"{name:16} {percent(ln.values())}  {percent(br.values())}")
        if name == args.missing:
            for n in sorted(ln):
                never = [i for (m, i), v in sorted(br.items()) if m == n and not v]
                if not ln[n] or never:
                    what = f"branches {never}" if ln[n] else "never"
                    print(f"  {n:5} {what:16} {text[n - 1].strip()}")
    print(f"{'all':16} {percent(lines.values())}  {percent(branches.values())}")


if __name__ == "__main__":
    main()
