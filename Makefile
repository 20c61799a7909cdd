# exfusion.h - examples, tests, and the table of variants. `make help` lists the targets.

CC ?= cc
CXX ?= c++
CFLAGS ?= -O2
PREFIX ?= /usr/local
PYTHON ?= python3
JOBS ?= 2
ROWS = .
N = 200
SEED = 1
KILLS = 2000
STATES = 200000
FILES = 100000
SECONDS = 60

# OpenMP when this compiler can link it; without, everything runs on one thread.
OPENMP := $(shell mkdir -p build && \
  printf '\043include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n' \
    > build/openmp.c && \
  $(CC) $(CFLAGS) -fopenmp build/openmp.c -o build/openmp.out 2>/dev/null \
  && echo -fopenmp)

# stb_image for PNG, JPEG, BMP and gzip: make STB=FOLDER, or where the compiler finds it.
STB_FLAGS := $(if $(STB),-isystem "$(abspath $(STB))" '-DSTB_IMAGE=<stb_image.h>',$(shell \
  printf '\043include <stb/stb_image.h>\n' | $(CC) -E -x c - > /dev/null 2>&1 \
  && echo "'-DSTB_IMAGE=<stb/stb_image.h>'"))

WARN = -std=c99 -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wvla \
  -Wundef -Wstrict-prototypes -Wmissing-prototypes
COMPILE = $(CC) $(CFLAGS) $(WARN) $(OPENMP)

EXAMPLES = $(patsubst examples/%.c,build/%,$(wildcard examples/*.c))
TESTS = $(patsubst tests/%.c,build/tests/%,$(wildcard tests/test_*.c))
# Tests of the public functions share one compiled implementation; the others, which look
# behind them, include it. Some are built a second time with EXF_DOUBLE.
LINKED = $(addprefix build/tests/, test_core test_exfusion test_fuzz test_golden \
  test_images test_malicious test_misuse test_numbers test_optim test_power test_resume \
  test_rules test_vit_golden torture)
DOUBLES = build/tests/test_ops_double build/tests/test_optim_double \
  build/tests/test_golden_double
SCRIPTS = $(wildcard tests/test_*.sh)
HEADERS = exfusion.h $(wildcard tests/*.h)
# What reads pictures.
PICTURES = build/vit build/tests/test_fuzz build/tests/test_images \
  build/tests/test_vit_golden

all: $(EXAMPLES)

$(PICTURES): COMPILE += $(STB_FLAGS)
build/tests/test_images build/tests/test_vit_golden: $(wildcard examples/*.h)

build/%: examples/%.c exfusion.h $(wildcard examples/*.h)
	@mkdir -p build
	$(COMPILE) $< -o $@ -lm

build/tests/%: tests/%.c $(HEADERS)
	@mkdir -p build/tests
	$(COMPILE) -pthread $< -o $@ -lm

build/tests/%_double: tests/%.c $(HEADERS)
	@mkdir -p build/tests
	$(COMPILE) -DEXF_DOUBLE -pthread $< -o $@ -lm

build/tests/exfusion.o: exfusion.h
	@mkdir -p build/tests
	printf '\043define EXFUSION_IMPLEMENTATION\n\043include "../../exfusion.h"\n' \
	  > build/tests/exfusion.c
	$(COMPILE) -c build/tests/exfusion.c -o $@ 2> build/tests/exfusion.warnings \
	  || { cat build/tests/exfusion.warnings; exit 1; }

build/tests/test_resume: $(wildcard examples/*.h) examples/charlm.c

$(LINKED): build/tests/%: tests/%.c build/tests/exfusion.o $(HEADERS)
	@mkdir -p build/tests
	$(COMPILE) -DTEST_LINKED -pthread $< build/tests/exfusion.o -o $@ -lm

build/tests/test_fuzz: $(wildcard tests/fuzz/*.[ch] examples/*.[ch])

# A character model with memory-bank FFNs learns the text of exfusion.h, is merged, and
# writes.
demo: build/charlm
	build/charlm train --data exfusion.h --out runs/demo --ffn mb --experts 4 \
	  --steps 700 --lr 4e-3 --min-lr 4e-4 --warmup 50 --eval-every 100 --save-every 0
	build/charlm info runs/demo/model.safetensors
	build/charlm sample runs/demo -n 400 --temperature 0.7 --seed 1

# The same with pictures: Fashion-MNIST where it is installed, else generated ones.
demo-vit: build/vit
	build/vit train --out runs/demo-vit --ffn mb --experts 4 --patch 7 --steps 600 \
	  --eval-every 200 --save-every 0
	build/vit info runs/demo-vit/model.safetensors
	build/vit eval runs/demo-vit --split val

# Each test leaves its counts in build/tests; the sum is the last line. Long ones first.
NAMES = $(notdir $(SCRIPTS:.sh=) $(TESTS) $(DOUBLES))
test:
	@mkdir -p build/tests && rm -f build/tests/*.result
	@$(MAKE) -s -k -j$(JOBS) $(NAMES:%=build/tests/%.result) || true
	@sh tests/run.sh sum $(NAMES)

# The programs are kept, to be run by hand.
.SECONDARY:

build/tests/%.result: build/tests/%
	@sh tests/run.sh one $<

build/tests/test_vit.result: build/tests/test_images
build/tests/%.result: tests/%.sh $(EXAMPLES) build/tests/exfusion.o
	@CC="$(CC)" JOBS=1 sh tests/run.sh one $<

# All variants x seeds 1-3 at two learning rates. Finished runs are kept in
# build/quality, so it may be stopped and called again. JOBS=2: two runs at a time.
quality: build/charlm
	@sh tests/quality.sh "$(DATA)" $(JOBS)

# The ViT's default configuration, dense and mb, seeds 1-3, on DATA or Fashion-MNIST.
# Finished runs are kept in build/quality-vit.
quality-vit: build/vit
	@sh tests/quality_vit.sh "$(DATA)"

# Speed on this machine: tables and build/bench.csv. PARTS="gemm step" runs some of it.
build/bench: tests/bench/bench.c exfusion.h $(wildcard tests/bench/*.h)
	@mkdir -p build
	$(COMPILE) $< -o $@ -lm -ldl
bench: build/bench
	@build/bench $(PARTS)

# The same steps in PyTorch, in turn with ours. PYTHON="python3 venv/bin/python"
bench-torch: build/bench
	@PYTHON="$(PYTHON)" sh tests/bench/compare.sh

# Files exchanged with the reference safetensors package and with timm, where Python has
# them.
interop: build/tests/test_safetensors build/vit
	$(PYTHON) tests/interop_safetensors.py build/tests/test_safetensors
	$(PYTHON) tests/interop_timm.py build/vit

# A child that saves is killed KILLS times; the power is cut at STATES states of a disk.
torture: build/tests/torture build/tests/test_power
	build/tests/torture $(KILLS)
	build/tests/test_power $(STATES)

# libFuzzer for SECONDS per target of FUZZ, with both sanitizers; what it finds stays in
# build/fuzz as crash-*. make build/fuzz/NAME-replay is the target with a plain main, for
# a corpus or AFL++.
FUZZ_CC ?= clang
TARGETS = $(patsubst tests/fuzz/fuzz_%.c,%,$(wildcard tests/fuzz/fuzz_*.c))
FUZZ = $(TARGETS)
FUZZ_FLAGS = -O1 -g -DEXF_NO_SIMD $(WARN)
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all
fuzz: build/tests/test_malicious build/tests/test_fuzz $(FUZZ:%=build/fuzz/%)
	@mkdir -p $(TARGETS:%=build/fuzz/corpus/%) $(TARGETS:%=build/fuzz/seeds/%)
	@build/tests/test_malicious --write build/fuzz/seeds/safetensors
	@build/tests/test_fuzz --write build/fuzz/seeds
	@for t in $(FUZZ); do echo "$$t:"; \
	  build/fuzz/$$t -max_total_time=$(SECONDS) -max_len=4096 -timeout=60 \
	    -artifact_prefix=build/fuzz/crash-$$t- -print_final_stats=1 \
	    build/fuzz/corpus/$$t build/fuzz/seeds/$$t 2> build/fuzz/$$t.log \
	    || { tail -n 40 build/fuzz/$$t.log; exit 1; }; \
	  grep -E 'executed_units|exec_per_sec' build/fuzz/$$t.log; done

build/fuzz/%-replay: tests/fuzz/fuzz_%.c tests/fuzz/main.c $(HEADERS) \
  $(wildcard tests/fuzz/*.h examples/*.[ch])
	@mkdir -p build/fuzz
	$(CC) $(FUZZ_FLAGS) $(SANITIZE) $< tests/fuzz/main.c -o $@ -lm

# The loops over code tables would spend four fifths of the time tracing comparisons.
build/fuzz/idx: FUZZ_FLAGS += -fno-sanitize-coverage=trace-cmp
build/fuzz/idx build/fuzz/idx-replay: FUZZ_FLAGS += $(STB_FLAGS)
build/fuzz/%: tests/fuzz/fuzz_%.c $(HEADERS) $(wildcard tests/fuzz/*.h examples/*.[ch])
	@mkdir -p build/fuzz
	$(FUZZ_CC) $(FUZZ_FLAGS) -DFUZZ_LIBFUZZER -fsanitize=fuzzer $(SANITIZE) $< -o $@ -lm

# The same damaged files to this reader and to the reference package. PYTHON has it.
differential: build/tests/test_malicious
	@mkdir -p build/fuzz/seeds/safetensors
	@build/tests/test_malicious --write build/fuzz/seeds/safetensors
	$(COMPILE) -shared -fPIC tests/differential.c -o build/tests/differential.so -lm
	$(PYTHON) tests/differential_safetensors.py build/tests/differential.so \
	  build/fuzz/seeds/safetensors $(FILES)

# Every configuration compiles tests/golden_hash.c, runs it, and gets the same hash.
# ROWS: a pattern of rows.
matrix:
	@sh tests/matrix.sh "$(ROWS)"
print-doubles:
	@echo $(notdir $(DOUBLES))
print-stb:
	@echo $(STB_FLAGS)

# All test programs under ASan with LSan, UBSan, MSan and TSan, without OpenMP; the quick
# ones under valgrind. No suppressions.
sanitize:
	@sh tests/sanitize.sh

# gcc -fanalyzer, clang-tidy, cppcheck; what is switched off stands in the script.
analyze:
	@CC="$(CC)" sh tests/analyze.sh

# Lines and branches of exfusion.h that `make test` executes, by section.
coverage:
	@$(PYTHON) tests/coverage.py

# N small changes to exfusion.h, one at a time: how many do the tests notice?
mutate:
	@$(PYTHON) tests/mutate.py -n $(N) --seed $(SEED)

clean:
	rm -rf build

install:
	mkdir -p "$(DESTDIR)$(PREFIX)/include"
	cp exfusion.h "$(DESTDIR)$(PREFIX)/include/exfusion.h"

help:
	@echo 'make              build/hello, gpt, charlm and vit (STB=FOLDER of stb_image.h)'
	@echo 'make demo         train on the text of exfusion.h, merge, sample (a minute)'
	@echo 'make demo-vit     the same with pictures (a minute and a half)'
	@echo 'make test         all tests; the last line is: N passed, N failed'
	@echo 'make quality DATA=FILE   the table of variants, seeds 1-3, two learning rates'
	@echo 'make quality-vit  accuracy of the ViT, dense and mb, seeds 1-3'
	@echo 'make bench        speed: products, ops, steps, phases ... (PARTS="gemm step")'
	@echo 'make bench-torch  the steps beside PyTorch (PYTHON="python3 venv/bin/python")'
	@echo 'make interop      files exchanged with the safetensors package and with timm'
	@echo 'make fuzz         libFuzzer, SECONDS for each target'
	@echo 'make differential   100,000 damaged files, compared with the reference (FILES)'
	@echo 'make torture      kill -9 and power cuts while saving (KILLS, STATES)'
	@echo 'make matrix       compilers, options, platforms: one hash everywhere (long)'
	@echo 'make sanitize     all tests under ASan, UBSan, MSan, TSan; some under valgrind'
	@echo 'make analyze      gcc -fanalyzer, clang-tidy, cppcheck'
	@echo 'make coverage     lines and branches of exfusion.h, by section'
	@echo 'make mutate N=200 how many small changes to exfusion.h the tests notice'
	@echo 'make install      exfusion.h to $$(DESTDIR)$$(PREFIX)/include'
	@echo 'make clean        remove build/'
	@echo 'make help         this list'
	@echo 'Variables: CC CXX CFLAGS PREFIX DESTDIR JOBS STB PYTHON'

.PHONY: all demo demo-vit test quality quality-vit bench bench-torch interop fuzz \
  torture differential matrix print-doubles print-stb sanitize analyze coverage \
  mutate clean install help
