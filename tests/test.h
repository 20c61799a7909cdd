/* tests/test.h - a small assert header.

     #include "test.h"
     TEST(adds) { CHECK(1 + 1 == 2); CHECK_NEAR(0.1 + 0.2, 0.3, 1e-15); }
     int main(void) { RUN(adds); TEST_MAIN_END; }

   A test is one function. It fails when a check fails, and also when it ran no check at
   all: a test that cannot fail is a bug. SKIP("why") leaves a test early and says so;
   a skipped test counts neither as passed nor as failed. TEST_MAIN_END prints
   `N passed, N failed` and returns 1 from main when a test failed or none ran.
   With TEST_STOP defined the first test that fails ends the program.
   CHECK_ERR needs exfusion.h to be included before it is used. */
#ifndef TEST_H
#define TEST_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define TEST_UNUSED __attribute__((unused))
#else
#define TEST_UNUSED
#endif

typedef struct test_state {
  int checks, failures;      /* of the test that is running */
  int passed, failed, skipped;
  const char *skip;
} test_state;
static test_state test_now TEST_UNUSED = {0, 0, 0, 0, 0, NULL};

/* At most this many failures of one test are printed. */
#define TEST_SHOWN 12

static TEST_UNUSED int test_check(int ok, const char *file, int line, const char *text) {
  test_now.checks++;
  if (ok) return 1;
  if (++test_now.failures <= TEST_SHOWN)
    printf("  %s:%d: failed: %s\n", file, line, text);
  else if (test_now.failures == TEST_SHOWN + 1)
    printf("  ... more failures of this test are not shown\n");
  return 0;
}

/* NaN is near nothing. */
static TEST_UNUSED int test_near(double a, double b, double tol, const char *file,
                                 int line, const char *text) {
  double d = a > b ? a - b : b - a;
  if (d <= tol) return test_check(1, file, line, text);
  if (test_now.failures < TEST_SHOWN)
    printf("  %.17g and %.17g differ by %.3g, allowed %.3g\n", a, b, d, tol);
  return test_check(0, file, line, text);
}

static TEST_UNUSED int test_has(const char *message, const char *part, const char *file,
                                int line, const char *text) {
  if (message != NULL && strstr(message, part) != NULL)
    return test_check(1, file, line, text);
  if (test_now.failures < TEST_SHOWN)
    printf("  expected \"%s\" in \"%s\"\n", part, message ? message : "(null)");
  return test_check(0, file, line, text);
}

/* Each yields 1 when it held, so that a test may stop: if (!CHECK(p != NULL)) return; */
#define CHECK(cond) test_check((cond) ? 1 : 0, __FILE__, __LINE__, #cond)
#define CHECK_NEAR(a, b, tol) \
  test_near((double)(a), (double)(b), (double)(tol), __FILE__, __LINE__, \
            #a " near " #b " within " #tol)
#define CHECK_HAS(message, part) \
  test_has((message), (part), __FILE__, __LINE__, #message " contains " #part)
#define CHECK_STR(a, b) \
  test_check(strcmp((a), (b)) == 0, __FILE__, __LINE__, #a " is " #b)

/* The context's first error has this status and a message with this text; clears it. */
#define CHECK_ERR(ctx, status, part) \
  do { \
    if (exf_ctx_status(ctx) != (status)) \
      printf("  status is %s: %s\n", exf_status_name(exf_ctx_status(ctx)), \
             exf_error(ctx)); \
    test_check(exf_ctx_status(ctx) == (status), __FILE__, __LINE__, \
               "status is " #status); \
    test_has(exf_error(ctx), (part), __FILE__, __LINE__, "message contains " #part); \
    exf_error_clear(ctx); \
  } while (0)

/* The context has no error. */
#define CHECK_OK(ctx) \
  do { \
    if (exf_ctx_status(ctx) != EXF_OK) printf("  error: %s\n", exf_error(ctx)); \
    test_check(exf_ctx_status(ctx) == EXF_OK, __FILE__, __LINE__, "no error"); \
  } while (0)

#define TEST(name) static void name(void)
#define SKIP(why) \
  do { \
    test_now.skip = (why); \
    return; \
  } while (0)

static TEST_UNUSED void test_run(void (*run)(void), const char *name) {
  test_now.checks = 0;
  test_now.failures = 0;
  test_now.skip = NULL;
  run();
  if (test_now.skip != NULL && test_now.failures == 0) {
    test_now.skipped++;
    printf("skipped %s: %s\n", name, test_now.skip);
  } else if (test_now.failures == 0 && test_now.checks > 0) {
    test_now.passed++;
  } else {
    test_now.failed++;
    if (test_now.checks == 0) printf("FAILED %s: it checked nothing\n", name);
    else printf("FAILED %s: %d of %d checks\n", name, test_now.failures, test_now.checks);
#ifdef TEST_STOP
    exit(1);
#endif
  }
  fflush(stdout);
}
#define RUN(name) test_run(name, #name)

static TEST_UNUSED int test_end(void) {
  if (test_now.passed + test_now.failed == 0 && test_now.skipped == 0) {
    printf("FAILED: no test was executed\n");
    test_now.failed = 1;
  }
  printf("%d passed, %d failed\n", test_now.passed, test_now.failed);
  return test_now.failed > 0;
}
#define TEST_MAIN_END return test_end()

#endif /* TEST_H */
