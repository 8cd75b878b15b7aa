// What the host tells the kernels. Read by both, hence no includes: fixed sizes, 8 byte members first.

#ifndef INDEXMEM_METAL_ARGS
#define INDEXMEM_METAL_ARGS

#define INDEXMEM_METAL_THREADS 256 // of every group
#define INDEXMEM_METAL_SIMD    8   // simdgroups in it

// function constants: the types that keys and values are read from, numbers of ggml
#define INDEXMEM_METAL_TYPE_K 9000
#define INDEXMEM_METAL_TYPE_V 9001

#define INDEXMEM_METAL_N_SRC 6
#define INDEXMEM_METAL_FEATURED 16 // entries whose features are held at once

struct indexmem_metal_tensor {
    uint64_t nb[4];
    int32_t  ne[4];
};

struct indexmem_metal_args {
    indexmem_metal_tensor src[INDEXMEM_METAL_N_SRC];
    indexmem_metal_tensor dst;

    uint64_t seed;
    uint64_t row_size;    // bytes of a row of dst
    uint64_t scratch_row; // floats of scratch for each (KV head, sequence)

    int32_t  il;
    int32_t  n_queries;   // latest queries that are looked at
    int32_t  n_head;      // of a pairwise indexer
    int32_t  maximum;     // of its queries; else the mean
    int32_t  smooth;      // attention goes on to be smoothed
    int32_t  copy_size;   // bytes that a thread moves at once

    float    scale;
    float    softcap;
    float    pos_slope;
    float    age_scale;
    float    rate;
    float    decay;
};

// a row of the tensor `ctl`, in the order of enum indexmem_ctl
struct indexmem_metal_ctl {
    int32_t n_used;
    int32_t n_evict;
    int32_t n_fixed;
    int32_t pos_tail;
    int32_t keep_lo;
    int32_t keep_hi;
    int32_t pos_last;
    int32_t unused;
};

#endif
