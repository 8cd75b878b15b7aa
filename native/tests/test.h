#pragma once

// a few lines of test harness: named cases, checks that say where they failed; main() unless TEST_NO_MAIN is defined, which
// further files of a program do

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

struct test_case {
    std::string name;
    std::function<void()> run;
};

inline std::vector<test_case> & test_cases() {
    static std::vector<test_case> cases;
    return cases;
}

inline int & test_failures() {
    static int n = 0;
    return n;
}

struct test_register {
    test_register(const char * name, std::function<void()> run) { test_cases().push_back({ name, std::move(run) }); }
};

#define TEST(name) \
    static void test_##name(); \
    static test_register register_##name(#name, test_##name); \
    static void test_##name()

#define CHECK(cond) \
    do { \
        if (!(cond)) { \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #cond); \
            test_failures()++; \
        } \
    } while (0)

#define CHECK_MSG(cond, ...) \
    do { \
        if (!(cond)) { \
            fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #cond); \
            fprintf(stderr, __VA_ARGS__); \
            fputc('\n', stderr); \
            test_failures()++; \
        } \
    } while (0)

// What the tests of a program need and this machine lacks, or null; a lambda that main calls.
inline std::function<const char *()> & test_lacks() {
    static std::function<const char *()> lacks = [] { return nullptr; };
    return lacks;
}

struct test_needs {
    explicit test_needs(std::function<const char *()> lacks) { test_lacks() = std::move(lacks); }
};

constexpr int TEST_SKIPPED = 77; // SKIP_RETURN_CODE of ctest

#if !defined(TEST_NO_MAIN)
int main() {
    if (const char * lacks = test_lacks()()) {
        printf("skipped: %s\n", lacks);
        return TEST_SKIPPED;
    }
    for (auto & c : test_cases()) {
        const int before = test_failures();
        c.run();
        printf("%-48s %s\n", c.name.c_str(), test_failures() == before ? "ok" : "FAILED");
    }
    return test_failures() == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
#endif
