#include "indexmem-bench.h"

#include "arg.h"
#include "common.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

static const char BUDGET[] = "--kv-budget";

static common_params         taken; // the options of the cache that were given, the budget aside
static std::vector<uint32_t> budgets = { 0 };

static std::vector<common_arg> options_of_cache() {
    common_params_context context(taken);
    indexmem_add_options(context);
    return context.options;
}

void indexmem_bench_usage() {
    printf("\nbounded cache:\n");
    for (const common_arg & option : options_of_cache()) {
        const std::string name = std::string(option.args.front()) + " " + option.value_hint;
        const bool is_list = strcmp(option.args.front(), BUDGET) == 0;
        const std::string help = option.help.substr(0, option.help.find("\n(env:")); // llama-bench does not read the environment
        printf("  %-40s %s%s\n", name.c_str(), help.c_str(), is_list ? "; a list such as 0,1024,4096 for one after the other" : "");
    }
    printf("\n");
}

// Handlers of options throw what is wrong with them.
static void take(const common_arg & option, const char * value) {
    if (strcmp(option.args.front(), BUDGET) != 0) {
        option.handler_string(taken, value);
        return;
    }
    budgets.clear();
    for (const std::string & part : string_split<std::string>(value, ',')) {
        option.handler_string(taken, part);
        budgets.push_back(taken.indexmem.budget);
    }
}

void indexmem_bench_take(int & argc, char ** argv) {
    const auto options = options_of_cache();
    int n = 1;
    for (int i = 1; i < argc; ++i) {
        const common_arg * found = nullptr;
        for (const common_arg & option : options) {
            if (strcmp(argv[i], option.args.front()) == 0) {
                found = &option;
            }
        }
        if (!found) {
            argv[n++] = argv[i];
            continue;
        }
        try {
            if (i + 1 == argc) {
                throw std::invalid_argument(std::string(argv[i]) + " needs a value");
            }
            take(*found, argv[i + 1]);
        } catch (const std::invalid_argument & error) {
            fprintf(stderr, "error: %s\n", error.what());
            exit(1);
        }
        ++i;
    }
    argc = n;
    argv[argc] = nullptr;
}

const std::vector<uint32_t> & indexmem_bench_budgets() {
    return budgets;
}

bool indexmem_bench_has_budgets() {
    return budgets != std::vector<uint32_t>{ 0 };
}

void indexmem_bench_prepare(uint32_t budget, llama_context_params & params) {
    indexmem_options options = taken.indexmem;
    options.budget = budget;
    if (budget > 0 || !indexmem_bench_has_budgets()) {
        indexmem_ask(options, params.flash_attn_type);
    }
}
