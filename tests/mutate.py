#!/usr/bin/env python3
"""Changes exfusion.h in one place at a time and asks a quick subset of the tests whether
they notice. Operators, comparisons and constants of the kernels, the loaders and savers,
and the optimizers; the choice is a function of the seed.

  python3 tests/mutate.py [-n 200] [--seed 1] [--section NAME] [--line LINE]

Prints one line per mutant, the survivors again at the end, and N of N caught. A change
that does not compile, or compiles to the same machine code, is drawn anew; a test that
runs longer than 40 seconds of processor time has noticed. What a program said of a
header is kept in build/mutate/said: only what changed is asked again.
"""
import argparse
import glob
import hashlib
import os
import random
import re
import resource
import subprocess
import sys

OUT = "build/mutate"
CC = os.environ.get("CC", "cc")
FLAGS = ["-std=c99", "-w", "-O1", "-pthread", "-DTEST_STOP", f'-DTEST_TMP="{OUT}/tmp"']
TRAP = "-fsanitize-undefined-trap-on-error"
PLAIN = ["-DEXF_NO_SIMD", "-fsanitize=undefined", TRAP]
FAST = ["-fsanitize=bounds,shift", TRAP]   # all checks would take minutes to compile
SECONDS = 40

# Sections of the header, by their tags; the programs that are asked, the quickest first.
# A program with a - is linked to an implementation without fast kernels, with a * it has
# its own, with a ! that with AddressSanitizer, with a + its own with fast kernels. All
# trap where behaviour is undefined.
SECTIONS = {
    "kernels": ("-optim", "-exfusion", "*ops", "-golden", "+kernels"),
    "fast": ("+kernels",),
    "bodies": ("-optim", "-exfusion", "*ops", "-golden", "+kernels"),
    "optim_impl": ("-optim", "-exfusion", "-misuse", "*algebra", "-golden", "*faults",
                   "-resume"),
    "schedule": ("-optim", "-exfusion", "-misuse"),
    "ema_impl": ("-optim", "-exfusion", "-misuse", "*algebra", "*faults", "!optim"),
    "system": ("*safetensors", "-power", "-misuse", "*faults"),
    "save": ("*safetensors", "-power", "-misuse", "*faults"),
    "safetensors": ("*safetensors", "-malicious", "!safetensors"),
    "st-writer": ("*safetensors", "-power", "*faults", "!safetensors"),
    "checkpoint": ("-power", "-exfusion", "-misuse", "*safetensors", "*faults",
                   "-resume"),
}
WEIGHT = {"kernels": 2, "fast": 2, "bodies": 4, "optim_impl": 3, "safetensors": 4,
          "st-writer": 2, "checkpoint": 2, "system": 1, "save": 1, "schedule": 1,
          "ema_impl": 1}

CHANGES = [
    (r"(?<=[\w\])] )\+(?= [\w(])", "-"), (r"(?<=[\w\])] )-(?= [\w(])", "+"),
    (r"(?<=[\w\])] )\*(?= [\w(])", "+"), (r"(?<=[\w\])] )/(?= [\w(])", "*"),
    (r" \+= ", " -= "), (r" -= ", " += "), (r" \*= ", " += "),
    (r" < ", " <= "), (r" <= ", " < "), (r" > ", " >= "), (r" >= ", " > "),
    (r" < ", " > "), (r" == ", " != "), (r" != ", " == "),
    (r" && ", " || "), (r" \|\| ", " && "), (r"(?<=[( ])!(?=[\w(])", ""),
    (r"(?<![\w.])0(?![\w.])", "1"), (r"(?<![\w.])1(?![\w.])", "0"),
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
        if re.match("#(if|elif|else|endif)", line):   # AVX-512, NEON: not everywhere
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
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))


def command(*words):
    """True when it ends with 0 within its processor time."""
    try:
        return subprocess.run(words, stdout=subprocess.DEVNULL, timeout=3600,
                              stderr=subprocess.DEVNULL, preexec_fn=limit).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def read(path):
    with open(path, "rb") as f:
        return f.read()


def exe_of(program):
    return f"{OUT}/{program[1:]}{'.asan' * (program[0] == '!')}"


def source_of(program):
    return f"{OUT}/tests/test_{program[1:]}.c"


FIRST = {}   # program -> what it is without any change; with .o: without the header


class Said:
    """What every program said of every header so far."""
    def __init__(self):
        self.path, self.answers = f"{OUT}/said", {}
        if os.path.exists(self.path):
            self.answers = dict(line.split() for line in read(self.path).decode()
                                .splitlines())
        tests = b"".join(read(p) for p in sorted(glob.glob(f"{OUT}/tests/*.h")
                                                 + glob.glob(f"{OUT}/examples/*")))
        self.common = hashlib.sha256(tests + repr((CC, FLAGS, PLAIN, FAST)).encode())

    def key(self, program, header):
        h = self.common.copy()
        h.update(header.encode() + program.encode() + read(source_of(program)))
        return h.hexdigest()

    def ask(self, program, header, ask):
        """"fails", "passes", "same" code as the original's, or "broken": no code"""
        key = self.key(program, header)
        if key not in self.answers:
            self.answers[key] = ask(program)
            with open(self.path, "a", encoding="utf-8") as f:
                f.write(f"{key} {self.answers[key]}\n")
        return self.answers[key]


def build(program):
    """Makes the program of the header in OUT; False: it does not compile."""
    kind, name = program[0], program[1:]
    more = {"+": FAST, "!": PLAIN + ["-fsanitize=address"]}.get(kind, PLAIN)
    source = [source_of(program)]
    if kind == "-":
        source = [f"{FIRST[program]}.o", f"{OUT}/impl.o"]
        if not os.path.exists(source[1]) and not command(
                CC, *FLAGS, *more, "-c", f"{OUT}/impl.c", "-o", source[1]):
            return False
    return command(CC, *FLAGS, *more, *source, "-o", exe_of(program), "-lm")


def ask(program):
    exe = exe_of(program)
    if not build(program):
        return "broken"
    if read(exe) == read(FIRST[program]):
        return "same"
    return "passes" if command(exe) else "fails"


def noticed(said, programs, header):
    """The first program that fails; None: none does; "broken" or "same": no mutant."""
    with open(f"{OUT}/exfusion.h", "w", encoding="utf-8") as f:
        f.write(header)
    if os.path.exists(f"{OUT}/impl.o"):
        os.unlink(f"{OUT}/impl.o")
    for program in programs:
        answer = said.ask(program, header, ask)
        if answer == "fails":
            return program[1:]
        if answer != "passes":
            return answer
    return None


def optimized(header):
    """The machine code that users compile. Where it is the same, nothing was changed."""
    with open(f"{OUT}/exfusion.h", "w", encoding="utf-8") as f:
        f.write(header)
    made = command(CC, "-std=c99", "-w", "-O2", "-c", f"{OUT}/impl.c", "-o",
                   f"{OUT}/optimized.o")
    return read(f"{OUT}/optimized.o") if made else None


def first(program):
    """The same of the header as it is."""
    return "passes" if command(FIRST[program]) else "fails"


def prepare(lines, sections):
    """The folder OUT, with the programs as they are; they have to pass."""
    os.makedirs(f"{OUT}/tmp", exist_ok=True)
    subprocess.run(["cp", "-r", "tests", "examples", OUT], check=True)
    with open(f"{OUT}/impl.c", "w", encoding="utf-8") as f:
        f.write('#define EXFUSION_IMPLEMENTATION\n#include "exfusion.h"\n')
    with open(f"{OUT}/exfusion.h", "w", encoding="utf-8") as f:
        f.write("\n".join(lines))
    if os.path.exists(f"{OUT}/impl.o"):
        os.unlink(f"{OUT}/impl.o")
    said, header = Said(), "\n".join(lines)
    for program in sorted({p for name in sections for p in SECTIONS[name]}):
        exe = FIRST[program] = f"{exe_of(program)}.{said.key(program, header)[:16]}"
        if not os.path.exists(exe):
            if program[0] == "-":
                command(CC, *FLAGS, "-DTEST_LINKED", "-c", source_of(program), "-o",
                        f"{exe}.o")
            if not build(program):
                sys.exit(f"{source_of(program)} does not compile")
            os.rename(exe_of(program), exe)
        if said.ask(program, header, first) != "passes":
            sys.exit(f"test_{program[1:]} fails without any change")
    return said


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--section", choices=sorted(SECTIONS))
    parser.add_argument("--line", type=int, help="only changes of this line")
    args = parser.parse_args()
    with open("exfusion.h", encoding="utf-8") as f:
        lines = f.read().split("\n")
    said = prepare(lines, [args.section] if args.section else SECTIONS)
    plain = optimized("\n".join(lines))
    survivors, n = [], 0
    counts = {name: [0, 0] for name in SECTIONS}
    for section, (i, start, end, text) in choose(sites(lines), args.seed,
                                                 args.section, args.line):
        if n == args.n:
            break
        mutant = lines[i][:start] + text + lines[i][end:]
        header = "\n".join(lines[:i] + [mutant] + lines[i + 1:])
        by = noticed(said, SECTIONS[section], header)
        if by in ("broken", "same"):
            continue
        if by is None and optimized(header) == plain:
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
