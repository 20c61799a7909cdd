#!/usr/bin/env python3
"""How exfusion.h and the examples are built: sizes, order, and what belongs together.

  python3 tests/house.py [HEADER [FOLDER OF EXAMPLES]]

Every rule is one check; what breaks it is printed as FILE:LINE: what. First each rule is
shown a small header that keeps it and one that breaks it.
"""
import pathlib
import re
import sys

LINES, COLUMNS, FUNCTION, PARAMETERS, PRODUCT = 9000, 90, 60, 8, 10
PUBLIC, COMMENTS, EXAMPLES, EXAMPLE = 140, 0.12, 3000, {"gpt.c": 150, "hello.c": 45}

COMMA = r"\s*,\s*(?![^()]*\))"                 # outside parentheses
INNER = r"(?:[^(){};]|\((?:[^(){};]|\([^(){};]*\))*\))*"      # balanced parentheses
# A function: at the left margin, or static in a macro. EXF__KERNEL(name) is one, too.
HEAD = (r"^(?:(?=\w)|[ ]+(?=static |EXF_API |EXF__KERNEL))(?!typedef\b|extern\b)"
        rf"(?:[\w# *\n]*?[ *\n])?([\w#]+(?:\(\w+\))?)\(({INNER})\)\s*")
USE = r"(?<![\w.])(?<!->)(?<!struct )(exf_\w+)(?![\w#])"


class House:
    def __init__(self, header, examples, path="exfusion.h"):
        self.path, self.text, self.files = path, header, examples
        blank = lambda m: re.sub(r"[^\n]", " ", m[0])
        # Code alone, at the places it had: without comments, strings and directives,
        # but with the text that a macro stands for.
        code = re.sub(r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'",
                      blank, header, flags=re.S)
        self.macros = {m[1]: (m[2].split(", "), m[3]) for m in re.finditer(
            r"^#define (\w+)\(([^)]*)\)((?:.*\\\n)*.*)$", code, re.M)}
        code = re.sub(r"^#define \w+(\([^)]*\))?", blank, code, flags=re.M)
        code = re.sub(r"^#(?:.*\\\n)*.*$", blank, code, flags=re.M)
        self.code = code.replace("\\\n", " \n")
        self.start = max(header.rfind("/* ==== C. IMPLEMENTATION"), 0)
        self.manual = header[:header.find("*/")]
        self.tags = [(m[1], m.start()) for m in re.finditer(
            r"^(?:/\* |   )(?:----|====).*[ -]>>([\w-]+)(?: \*/)?$", header, re.M)]
        self.public = {m[1]: m.start(1) for m in re.finditer(
            r"^EXF_API [^;{}]*?\b(exf_\w+)\([^;{}]*\);", self.code[:self.start], re.M)}
        self.functions = []           # (name, begin, lines, parameters)
        for m in re.finditer(HEAD + r"\{", self.code, re.M):
            depth, end = 1, m.end()
            while depth and end < len(self.code):
                depth += {"{": 1, "}": -1}.get(self.code[end], 0)
                end += 1
            name = m[2 if re.fullmatch("EXF__[A-Z]+", m[1]) else 1]
            n = self.code.count("\n", m.start(), end) + 1
            self.functions.append((name, m.start(), n, len(re.split(COMMA, m[2]))))

    def expand(self, text):
        def body(use):
            if use[1] not in self.macros:
                return use[0]
            params, text = self.macros[use[1]]
            given = dict(zip(params, re.split(COMMA, use[2])))
            text = re.sub(r"\w+", lambda m: given.get(m[0], m[0]), text)
            return self.expand(re.sub(r"\s*##\s*", "", text).replace("\\\n", "\n"))
        return re.sub(rf"\b(\w+)\(({INNER})\)", body, text)

    def made(self, pattern):
        """name -> its first place: what the code defines, itself and by its macros"""
        found = [(m[1], m.start()) for m in pattern.finditer(self.code)]
        for use in re.finditer(rf"^EXF__\w+\({INNER}\)(?!\s*\{{)", self.code, re.M):
            found += [(m[1], use.start()) for m in pattern.finditer(self.expand(use[0]))]
        return dict(sorted(found, key=lambda pair: -pair[1]))

    # Rules: what breaks them, and where: a place in the header, or FILE:LINE.
    def header_lines(self):
        if (n := self.text.count("\n")) > LINES:
            yield 0, f"{n} lines, the limit is {LINES}"

    def columns(self):
        return [(f"{path}:{n}", f"{len(line)} columns, the limit is {COLUMNS}")
                for path, text in [(self.path, self.text), *sorted(self.files.items())]
                for n, line in enumerate(text.split("\n"), 1) if len(line) > COLUMNS]

    def long_functions(self):
        return [(at, f"{name} has {n} lines") for name, at, n, _ in self.functions
                if n > FUNCTION]

    def wide_functions(self):
        product = lambda name: re.search("gemm|tile|panel|product", name)
        return [(at, f"{name} has {n} parameters") for name, at, _, n in self.functions
                if n > (PRODUCT if product(name) else PARAMETERS)]

    def forward_declarations(self):
        return [(m.start(), f"{m[1]} is declared ahead")
                for m in re.finditer(HEAD + ";", self.code, re.M)
                if m.start() > self.start and re.match(r" *(static|EXF_API) ", m[0])]

    def calls_upwards(self):
        section = lambda at: sum(begin <= at for _, begin in self.tags) - 1
        home = self.made(re.compile(HEAD + r"\{", re.M))
        home.update((name, at) for name, at, _, _ in reversed(self.functions))
        for m in re.compile(USE).finditer(self.code, self.start):
            down = section(home.get(m[1], 0))
            if section(m.start()) < down:
                yield m.start(), f"{m[1]} is defined in >>{self.tags[down][0]}"

    def comment_lines(self):
        comments, total, inside = 0, 0, False
        for line in filter(None, map(str.strip, self.text[self.start:].split("\n"))):
            total += 1
            comments += inside or line.startswith(("/*", "//"))
            inside = (inside or line.startswith("/*")) and "*/" not in line
        if comments < COMMENTS * total:
            yield self.start, f"{100 * comments / total:.1f} % of the lines are comments"

    def public_functions(self):
        if not 0 < (n := len(self.public)) <= PUBLIC:
            yield 0, f"{n} public functions, the limit is {PUBLIC}"

    def shown(self):
        seen = re.findall(r"\bexf_\w+", self.manual + "".join(self.files.values()))
        return [(at, f"{name}: in no example, and not in the manual")
                for name, at in self.public.items() if name not in seen]

    def contents(self):
        part = re.search(r"---- CONTENTS [^\n]*\n(.*?)(\n   ---- |\Z)", self.manual, re.S)
        listed = re.findall(r">>([\w-]+)", part.group(1)) if part else []
        heads = [tag for tag, _ in self.tags]
        for tag in sorted({*heads, *listed}):
            if heads.count(tag) != 1 or listed.count(tag) != 1:
                yield (dict(self.tags).get(tag, 0), f">>{tag} heads {heads.count(tag)} "
                       f"sections and is {listed.count(tag)} times in the contents")

    def op_rows(self):
        rows = self.made(re.compile(r"static const exf__op exf__op_(\w+) ="))
        listed = re.findall(r"\bX\((\w+)", self.macros.get("EXF__OPS", ("", ""))[1])
        for name in sorted({*rows, *listed}) or ["any op"]:
            if name not in rows or name not in listed:
                yield rows.get(name, 0), f"exf__op_{name}, or X({name}) in EXF__OPS?"

    def examples(self):
        sizes = {pathlib.Path(p).name: t.count("\n") for p, t in self.files.items()}
        if sum(sizes.values()) > EXAMPLES:
            yield "examples", f"{sum(sizes.values())} lines, the limit is {EXAMPLES}"
        for name, most in EXAMPLE.items():
            if sizes.get(name, most + 1) > most:
                yield f"{name}:{most + 1}", f"it is missing, or has over {most} lines"

    def self_test(self):
        good = House(GOOD, {"gpt.c": "", "hello.c": ""})
        for rule in RULES[1:]:
            old, new = BAD.get(rule, ("", ""))
            bad = House(GOOD.replace(old, new, 1), good.files if rule in BAD else {})
            if [*getattr(good, rule)()] or not [*getattr(bad, rule)()]:
                yield "tests/house.py:1", f"{rule} does not know good from bad"


GOOD = r"""/* ---- CONTENTS ---- >>contents
   >>contents >>api >>impl >>low >>high
   ---- TOUR: exf_run */
/* ==== B. PUBLIC API ==== >>api */
EXF_API int exf_run(int a);
/* ==== C. IMPLEMENTATION ==== >>impl */
/* ---- low ---- >>low */
/* exf__up(1) is no call, nor is "exf__up". */
#define EXF__OP(name, sign)                                                     \
  static int exf__##name(int a, int b) { return a sign b; }                     \
  static const exf__op exf__op_##name = {#name};
EXF__OP(add, +)
int a;
static const exf__op exf__op_mul = {"exf__up()"};
EXF__KERNEL(exf__low) { exf__add(1, 2); a.exf_run(1); }
/* ---- high ---- >>high */
static int exf__up(int (*f)(int, int)) { return EXF__F(low)(1); }
EXF_API int exf_run(int a) { return exf__up(a); }
#define EXF__OPS(X) X(add) X(mul)
"""
BAD = {   # rule -> the text of GOOD that goes, and what comes instead
    "header_lines": ("int a;\n", "int a;\n" * LINES), "columns": ("TOUR", "-" * COLUMNS),
    "long_functions": ("return a sign", "\\\n" * FUNCTION + "return a sign"),
    "wide_functions": ("##name(int a", "##name(int" + ", int" * PARAMETERS),
    "forward_declarations": ("int a;", "static int exf__up(int (*f)(int, int));"),
    "calls_upwards": ("a.exf_run(1)", "exf_run(1)"), "op_rows": ("X(mul)", "X(sub)"),
    "comment_lines": ("int a;\n", "int a;\n" * 40), "shown": ("TOUR: ", "x"),
    "public_functions": ("exf_run(int a);", "run(int a);"), "contents": (">>low ", "")}
RULES = ["self_test", *BAD, "examples"]


def main():
    path, folder = (sys.argv[1:] + ["exfusion.h", "examples"][len(sys.argv) - 1:])[:2]
    files = [pathlib.Path(path), *sorted(pathlib.Path(folder).glob("*.[ch]"))]
    texts = {str(f): f.read_text(encoding="utf-8") for f in files}
    house, failed = House(texts.pop(str(files[0])), texts, path), 0
    for name in RULES:
        failed += bool(found := [*getattr(house, name)()])
        for where, what in found:
            line = house.text[:where].count("\n") + 1 if isinstance(where, int) else 0
            print(f"FAILED {name}: {f'{path}:{line}' if line else where}: {what}")
    print(f"{len(RULES) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
