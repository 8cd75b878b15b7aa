#pragma once

// What becomes of a request while llama_init_from_model() runs: a hook of llama-context.cpp, made when that begins

struct llama_model;

class indexmem_creation {
public:
    // can_stop: whether the context has a callback that stops what is computed
    indexmem_creation(const llama_model * model, bool can_stop);

    // Uses up the request, unless this was a dry run. A bounded context that was asked for and not made leaves an error, also
    // when llama.cpp refused it before it came to its cache.
    ~indexmem_creation();

    void succeeded() { done = true; }

    // an exception; if it was one of ours, its error stays
    void failed(const char * why);

private:
    const bool requested;
    const bool dry; // of a model loaded without its weights: the request is for the context that comes after it

    bool done = false;
};
