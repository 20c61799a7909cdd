#!/usr/bin/env python3
"""The lines and branches of exfusion.h that the test programs execute, by section.

  python3 tests/coverage.py [--missing SECTION|all]

Compiles every tests/test_*.c with clang's source counters, without OpenMP, runs it, and
adds up. A line counts when any program executed any of its code. Every condition counts
as two branches, true and false, also each operand of && and || and each use of a macro;
a condition that the compiler folds to a constant counts none. Of the fast kernels, any
instruction set counts; AVX-512 is left out, like all that another system compiles.
--missing: what was not executed in the last run.
"""
import argparse
import glob
import json
import os
import re
import shutil
import subprocess
import sys

OUT = "build/coverage"
CC = os.environ.get("CLANG", "clang")
FLAGS = ["-std=c99", "-w", "-O1", "-pthread", '-DTEST_TMP="build/tmp"',
         "-fprofile-instr-generate", "-fcoverage-mapping"]
# Once more, as the Makefile builds them: in double, and without the fast kernels.
EXTRA = {"test_core": "-DEXF_NO_SIMD", "test_ops": "-DEXF_DOUBLE",
         "test_optim": "-DEXF_DOUBLE", "test_golden": "-DEXF_DOUBLE"}
CODE, EXPANSION, SKIPPED, GAP = 0, 1, 2, 3


def tool(name):
    """llvm-NAME of the version of this clang, or as it is called here."""
    version = subprocess.run([CC, "-dumpversion"], stdout=subprocess.PIPE, text=True,
                             check=True).stdout.split(".")[0]
    return shutil.which(f"llvm-{name}-{version}") or f"llvm-{name}"


def compile_implementation():
    source = f"{OUT}/exfusion.c"
    with open(source, "w", encoding="utf-8") as f:
        f.write('#define EXFUSION_IMPLEMENTATION\n#include "../../exfusion.h"\n')
    subprocess.run([CC, *FLAGS, "-c", source, "-o", f"{OUT}/exfusion.o"], check=True)


def run(name, source, *more):
    """Compiles and runs a program; its counters go to NAME.json."""
    exe = f"{OUT}/{name}"
    subprocess.run([CC, *FLAGS, source, *more, "-o", exe, "-lm"], check=True)
    done = subprocess.run([exe], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "LLVM_PROFILE_FILE": f"{exe}.%p.profraw"})
    print(f"{name:18} {done.stdout.strip().splitlines()[-1][:40]}", flush=True)
    subprocess.run([tool("profdata"), "merge", "-o", f"{exe}.profdata",
                    *glob.glob(f"{exe}.*.profraw")], check=True)
    with open(f"{exe}.json", "w", encoding="utf-8") as f:
        subprocess.run([tool("cov"), "export", exe, f"-instr-profile={exe}.profdata"],
                       check=True, stdout=f)


def run_programs():
    """All of tests/test_*.c; most are linked to one implementation."""
    shutil.rmtree(OUT, ignore_errors=True)
    os.makedirs(OUT)
    os.makedirs("build/tmp", exist_ok=True)
    compile_implementation()
    for source in sorted(glob.glob("tests/test_*.c")):
        name = os.path.basename(source)[:-2]
        with open(source, encoding="utf-8") as f:
            linked = ["-DTEST_LINKED", f"{OUT}/exfusion.o"] if "TEST_LINKED" in f.read() \
                else []
        run(name, source, *linked)
        if name in EXTRA:
            run(name + "_more", source, EXTRA[name])


def code_lines(text):
    """The numbers of the lines with a letter or digit outside comments and directives."""
    blank = lambda m: re.sub(r"[^\n]", " ", m.group())
    text = re.sub(r"/\*.*?\*/", blank, text, flags=re.S)
    text = re.sub(r"^#.*?(?<!\\)$", blank, text, flags=re.S | re.M)
    return {n for n, line in enumerate(text.split("\n"), 1) if re.search(r"\w", line)}


def innermost(regions, at):
    """The count of the innermost region around a position; None: none."""
    inside = [r for r in regions if (r[0], r[1]) <= at < (r[2], r[3])]
    return max(inside, key=lambda r: (r[0], r[1], -r[2], -r[3]))[4] if inside else None


def function_lines(regions, code, lines):
    """As llvm-cov has it: a line counts by the code that starts on it and by what
    reaches over from above."""
    plain = [r for r in regions if r[5] == 0 and r[7] == CODE]
    around = plain + [r for r in regions if r[5] == 0 and r[7] == GAP]
    skipped = [r for r in regions if r[5] == 0 and r[7] == SKIPPED]
    for n in range(min(r[0] for r in plain), max(r[2] for r in plain) + 1):
        if n not in code or any(r[0] <= n <= r[2] for r in skipped):
            continue
        counts = [r[4] for r in plain if r[0] == n] + [innermost(around, (n, 1))]
        lines[n] = lines.get(n, False) or any(counts)


def function_branches(function, branches, folded):
    """(position, ..., truth) -> taken; the position begins with the line where the
    outermost macro is used."""
    regions = function["regions"]
    parent = {r[6]: r for r in regions if r[7] == EXPANSION}
    for l1, c1, l2, c2, true, false, file, *_ in function["branches"]:
        around = [r for r in regions if r[5] == file and r[7] == CODE]
        key, at = (l1, c1), file
        while at in parent:
            key = (parent[at][0], parent[at][1]) + key
            at = parent[at][5]
        if true == false == 0 and innermost(around, (l1, c1)):
            folded.add(key)
        for truth, count in ((True, true), (False, false)):
            branches[key + (truth,)] = branches.get(key + (truth,), False) or count > 0


def counts(text):
    """line -> was it executed; position and truth -> was the branch taken"""
    lines, branches, folded, code = {}, {}, set(), code_lines(text)
    for path in glob.glob(f"{OUT}/*.json"):
        with open(path, encoding="utf-8") as f:
            report = json.load(f)
        for function in report["data"][0]["functions"]:
            if (function["filenames"][0].endswith("exfusion.h")
                    and not function["name"].endswith("_avx512")):
                function_lines(function["regions"], code, lines)
                function_branches(function, branches, folded)
    for key in folded:
        if not branches[key + (True,)] and not branches[key + (False,)]:
            del branches[key + (True,)], branches[key + (False,)]
    return lines, branches


def sections(text):
    """[(name, first line)] of the implementation"""
    found = []
    for n, line in enumerate(text.split("\n"), 1):
        tag = re.match(r"/\* [-=]{4}.*>>([\w-]+)", line)
        if tag:
            found.append((tag.group(1), n))
    return found[[name for name, _ in found].index("impl"):]


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
        run_programs()
    with open("exfusion.h", encoding="utf-8") as f:
        text = f.read()
    lines, branches = counts(text)
    if not lines:
        sys.exit("no counters: run it without --missing first, with clang and llvm-cov")
    tags, text = sections(text), text.split("\n")
    print(f"{'section':16} {'lines':>18} {'branches':>20}")
    for (name, first), (_, last) in zip(tags, tags[1:] + [("", len(text) + 1)]):
        ln = {n: v for n, v in lines.items() if first <= n < last}
        br = {k: v for k, v in branches.items() if first <= k[0] < last}
        if ln:
            print(f"{name:16} {percent(ln.values())}  {percent(br.values())}")
        for n in sorted(ln) if args.missing in (name, "all") else []:
            never = [f"{k[1]}{'tf'[not k[-1]]}" for k, v in sorted(br.items())
                     if k[0] == n and not v]
            if not ln[n] or never:
                what = " ".join(never) if ln[n] else "never"
                print(f"  {n:5} {what:16} {text[n - 1].strip()}")
    print(f"{'all':16} {percent(lines.values())}  {percent(branches.values())}")


if __name__ == "__main__":
    main()
