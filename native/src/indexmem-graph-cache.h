#pragma once

#include "llama-graph.h"

#include "ggml-cpp.h"

#include <array>
#include <functional>
#include <map>

struct llama_memory_context_i;
struct llama_ubatch;

//
// Graphs of decode that come back
//
// A context reuses its last graph, and an eviction is three changes of graph: scoring, evicting, and back; recurrent states with
// a way back are written to each of two places in turn. Drafts, and sequences that are written together, come in numbers that
// change from batch to batch. Building and allocating a graph takes a quarter of the time of a small model's token. So graphs of
// few tokens are put aside with their scheduler, which holds the plan of one graph, when another kind is needed.
//
// Invariants
//   - the context holds the graph and the scheduler of the kind that was taken last, here lie the others
//   - kind 0 has the scheduler that was reserved for the largest graph
//   - twelve kinds lie here at most: the one that was not needed for the longest time goes, but for kind 0
//   - on a device, too: a graph that is not built again is the one that it has captured, if it captures graphs
//   - not where devices work on several ubatches at once (pipelines): a scheduler then holds copies of its inputs for each
//
class indexmem_graph_cache {
public:
    typedef std::array<llm_graph_result_ptr, 2> results;

    // of the next ubatch
    static int kind_of(const llama_memory_context_i * mctx, bool pipelines, const llama_ubatch & ubatch);

    // puts the kind into the hands of the context; `make` makes a scheduler for one that was not there yet
    void take(int kind, ggml_backend_sched_ptr & sched, results & res, llm_graph_result *& active,
            const std::function<ggml_backend_sched_t()> & make);

    // bytes of the compute buffers of the kinds that lie here
    size_t size(ggml_backend_t backend) const;

    // the context makes what it holds anew, as kind 0
    void clear();

private:
    struct aside {
        ggml_backend_sched_ptr sched;
        results                res;
        llm_graph_result     * active = nullptr;
        uint64_t               put    = 0; // when, in changes of kind
    };

    std::map<int, aside> kinds;
    int      current   = 0;
    uint64_t n_changes = 0;
};
