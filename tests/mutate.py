#!/usr/bin/env python3
"""Changes exfusion.h in one place at a time and asks a quick subset of the tests whether
they notice. Operators, comparisons and constants of the kernels, the loaders and savers,
and the optimizers; the choice is a function of the seed.

  python3 tests/mutate.py [-n 200] [--seed 1] [--section NAME] [--line LINE]

Prints one line per mutant, the survivors again at the end, and N of N caught. A change
that does not compile, or in lines for another system, is drawn anew; a test that runs
longer than a minute has noticed.
"""
import argparse
import os
import random
import re
import resource
import subprocess
import sys

OUT = "build/mutate"
CC = os.environ.get("CC", "cc")
FLAGS = ["-std=c99", "-w", "-O1", "-pthread", '-DTEST_TMP="build/tmp"']

# Sections of the header, by their tags; the programs that are asked, the likeliest first.
# A program with a - is linked to an implementation without fast kernels, with a * it has
# its own, with a + its own with fast kernels.
SECTIONS = {
    "kernels": ("-golden", "-exfusion", "-optim", "+kernels"),
    "fast": ("+kernels",),
    "optim_impl": ("-optim", "-golden", "-resume", "-exfusion"),
    "schedule": ("-optim", "-resume", "-exfusion"),
    "merged": ("-exfusion", "-resume", "-optim"),
    "files": ("*safetensors", "-resume"),
    "safetensors": ("*safetensors",),
    "st-writer": ("*safetensors", "-resume"),
    "checkpoint": ("-resume", "*safetensors", "-exfusion"),
}
WEIGHT = {"kernels": 4, "fast": 4, "optim_impl": 3, "safetensors": 4, "st-writer": 2,
          "checkpoint": 2, "files": 1, "schedule": 1, "merged": 1}

CHANGES = [
    (r"(?<=[\w\])] )\+(?= [\w(])", "-"), (r"(?<=[\w\])] )-(?= [\w(])", "+"),
    (r"(?<=[\w\])] )\*(?= [\w(])", "+"), (r"(?<=[\w\])] )/(?= [\w(])", "*"),
    (r" \+= ", " -= "), (r" -= ", " += "), (r" \*= ", " += "),
    (r" < ", " <= "), (r" <= ", " < "), (r" > ", " >= "), (r" >= ", " > "),
    (r" < ", " > "), (r" == ", " != "), (r" != ", " == "),
    (r" && ", " || "), (r" \|\| ", " && "), (r"(?<=[( ])!(?=[\w(])", ""),
    (r"(?<![\w.])0(?![\w.])", "1"), (r"(?<![\w.])1(?![\w.])", "2"),
    (r"(?<![\w.])(\d*\.\d+|[2-9]\d*|1\d+)(?=[fu]?\b)(?![\w.])", None),  # plus one
    (r"EXF__FMA\(-", "EXF__FMA("), (r"EXF__MIN\(", "EXF__MAX("), (r"EXF__MAX\(",
                                                                  "EXF__MIN("),
    (r"\bcontinue;", ";"), (r"\bacc \? ", "!acc ? "),
]


def code_only(line):
    """The line with strings and comments blanked out, of the same length."""
    blank = lambda m: " " * len(m.group())
    line = re.sub(r'"(\\.|[^"\\])*"|\'(\\.|[^\'\\])*\'', blank, line)
    return re.sub(r"/\*.*?\*/|//.*", blank, line)


def sites(lines):
    """section -> [(line number, start, end, text instead)]"""
    found = {name: [] for name in SECTIONS}
    name, comment, implementation, here = None, False, False, True
    for i, line in enumerate(lines):
        if line.startswith("#"):   # AVX-512 and NEON: not on every machine
            here = re.match(r"#(if|elif) EXF__INSTANCE == [45]", line) is None
        tag = re.match(r"/\* ----.*>>([\w-]+) ", line)
        implementation = implementation or ">>impl " in line
        if tag and implementation:
            name = tag.group(1) if tag.group(1) in SECTIONS else None
        code = code_only(line)
        if comment:
            end = code.find("*/")
            code = " " * (end + 2) + code[end + 2:] if end >= 0 else ""
            comment = end < 0
        start = code.find("/*")
        if start >= 0:
            code, comment = code[:start], True
        if name is None or not here or code.lstrip().startswith("#"):
            continue
        for pattern, text in CHANGES:
            for m in re.finditer(pattern, code):
                new = text
                if new is None:
                    number = m.group(1)
                    new = (repr(float(number) + 1) if "." in number
                           else str(int(number) + 1))
                found[name].append((i, m.start(), m.end(), new))
    return found


def choose(found, seed, section, line):
    """All sites in a fixed random order, sections by weight."""
    rng = random.Random(seed)
    pools = {k: rng.sample(v, len(v)) for k, v in sorted(found.items())
             if section in (None, k)}
    pools = {k: [s for s in v if line in (None, s[0] + 1)] for k, v in pools.items()}
    pools = {k: v for k, v in pools.items() if v}
    while pools:
        name = rng.choices(sorted(pools), [WEIGHT[k] for k in sorted(pools)])[0]
        yield name, pools[name].pop()
        if not pools[name]:
            del pools[name]


def limit():
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))


def command(*words):
    """True when it ends with 0 within a minute of processor time."""
    try:
        return subprocess.run(words, stdout=subprocess.DEVNULL, timeout=600,
                              stderr=subprocess.DEVNULL, preexec_fn=limit).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def compile_users():
    """The programs that do not look behind the public functions, once."""
    for name in ("exfusion", "golden", "optim", "resume"):
        if not command(CC, *FLAGS, "-DTEST_LINKED", "-c", f"tests/test_{name}.c",
                       "-o", f"{OUT}/{name}.o"):
            sys.exit(f"tests/test_{name}.c does not compile")


def compiled(programs):
    """What the compiler sees of the header in OUT."""
    simd = [] if programs[0][0] == "+" else ["-DEXF_NO_SIMD"]
    return subprocess.run([CC, *FLAGS, *simd, "-E", "-P", f"{OUT}/impl.c"], check=True,
                          stdout=subprocess.PIPE).stdout


def noticed(programs):
    """The first program that fails on the header in OUT; None: none does. "broken" when
    the header does not compile."""
    implementation = None
    for program in programs:
        kind, name = program[0], program[1:]
        exe = f"{OUT}/{name}"
        if kind == "-":
            if implementation is None:
                implementation = command(CC, *FLAGS, "-DEXF_NO_SIMD", "-c",
                                         f"{OUT}/impl.c", "-o", f"{OUT}/impl.o")
                if not implementation:
                    return "broken"
            built = command(CC, *FLAGS, f"{OUT}/{name}.o", f"{OUT}/impl.o", "-o", exe,
                            "-lm")
        else:
            simd = ["-DEXF_NO_SIMD"] if kind == "*" else []
            built = command(CC, *FLAGS, *simd, f"{OUT}/tests/test_{name}.c", "-o", exe,
                            "-lm")
        if not built:
            return "broken"
        if not command(exe):
            return name
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--section", choices=sorted(SECTIONS))
    parser.add_argument("--line", type=int, help="only changes of this line")
    args = parser.parse_args()
    os.makedirs(f"{OUT}/tests", exist_ok=True)
    os.makedirs("build/tmp", exist_ok=True)
    with open("exfusion.h", encoding="utf-8") as f:
        lines = f.read().split("\n")
    with open(f"{OUT}/impl.c", "w", encoding="utf-8") as f:
        f.write('#define EXFUSION_IMPLEMENTATION\n#include "exfusion.h"\n')
    subprocess.run(["cp", "-r", "tests", "examples", OUT], check=True)
    compile_users()
    programs = sorted({p for name, asked in SECTIONS.items() for p in asked
                       if args.section in (None, name)})
    subprocess.run(["cp", "exfusion.h", OUT], check=True)
    if args.line is None and noticed(programs) is not None:
        sys.exit(f"test_{noticed(programs)} fails without any change")
    whole = {name: compiled(programs) for name, programs in SECTIONS.items()}
    survivors, counts, n = [], {name: [0, 0] for name in SECTIONS}, 0
    for section, (i, start, end, text) in choose(sites(lines), args.seed,
                                                 args.section, args.line):
        if n == args.n:
            break
        mutant = lines[i][:start] + text + lines[i][end:]
        with open(f"{OUT}/exfusion.h", "w", encoding="utf-8") as f:
            f.write("\n".join(lines[:i] + [mutant] + lines[i + 1:]))
        if compiled(SECTIONS[section]) == whole[section]:
            continue               # for another system
        by = noticed(SECTIONS[section])
        if by == "broken":
            continue
        n += 1
        counts[section][0] += by is not None
        counts[section][1] += 1
        line = (f"{n:4} {section:11} {i + 1:5} {by or 'SURVIVED':11} "
                f"{lines[i].strip()}  ->  {mutant.strip()}")
        print(line, flush=True)
        if by is None:
            survivors.append(line)
    print("\nsurvivors:" if survivors else "\nno survivors")
    print("\n".join(survivors))
    for name, (caught, total) in counts.items():
        if total:
            print(f"{name:11} {caught:4} of {total}")
    caught = sum(c[0] for c in counts.values())
    print(f"{caught} of {n} mutants caught, {100 * caught / max(n, 1):.1f} %")


if __name__ == "__main__":
    main()
