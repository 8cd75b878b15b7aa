#pragma once

// The selection and the compaction of one KV head, written to be read. The kernels of every backend are tested against
// this; nothing here runs in the product.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

struct indexmem_reference_plan {
    std::vector<int32_t> evicted; // slots, ascending
    std::vector<int32_t> dst;     // moves[i]: slot src[i] -> slot dst[i]
    std::vector<int32_t> src;
};

// rank, pos: one value for each slot in use. If fewer entries may leave than n_evict, those leave.
inline indexmem_reference_plan indexmem_reference_select(
        const std::vector<float>   & rank,
        const std::vector<int32_t> & pos,
        int32_t n_evict, int32_t keep_lo, int32_t keep_hi) {
    const int32_t n_used = (int32_t) rank.size();

    std::vector<int32_t> candidates;
    for (int32_t i = 0; i < n_used; ++i) {
        if (pos[i] >= keep_lo && pos[i] < keep_hi) {
            candidates.push_back(i);
        }
    }

    // first to leave comes first
    std::sort(candidates.begin(), candidates.end(), [&](int32_t a, int32_t b) {
        const bool nan_a = std::isnan(rank[a]);
        const bool nan_b = std::isnan(rank[b]);
        if (nan_a != nan_b) {
            return nan_a;
        }
        if (!nan_a && rank[a] != rank[b]) {
            return rank[a] < rank[b];
        }
        return pos[a] > pos[b];
    });

    n_evict = std::min(n_evict, (int32_t) candidates.size());

    indexmem_reference_plan plan;
    plan.evicted.assign(candidates.begin(), candidates.begin() + n_evict);
    std::sort(plan.evicted.begin(), plan.evicted.end());

    const int32_t n_left = n_used - n_evict;
    for (int32_t slot : plan.evicted) {
        if (slot < n_left) {
            plan.dst.push_back(slot);
        }
    }
    for (int32_t slot = n_left; slot < n_used; ++slot) {
        if (!std::binary_search(plan.evicted.begin(), plan.evicted.end(), slot)) {
            plan.src.push_back(slot);
        }
    }
    return plan;
}

// Pairwise scores of the entries of one sequence. keys [n][n_embd]; queries: the latest ones, each n_head*n_embd values of
// q followed by n_head weights.
inline std::vector<double> indexmem_reference_pairwise(
        const std::vector<std::vector<float>> & keys,
        const std::vector<std::vector<float>> & queries,
        size_t n_head, bool maximum) {
    std::vector<double> score;
    for (const auto & k : keys) {
        double total = maximum ? -INFINITY : 0.0;
        for (const auto & q : queries) {
            double a = 0.0;
            for (size_t h = 0; h < n_head; ++h) {
                double dot = 0.0;
                for (size_t d = 0; d < k.size(); ++d) {
                    dot += (double) q[h*k.size() + d]*k[d];
                }
                a += q[n_head*k.size() + h]*std::max(dot, 0.0);
            }
            total = maximum ? std::max(total, a) : total + a;
        }
        score.push_back(maximum ? total : total/(double) queries.size());
    }
    return score;
}

// Rank of an entry at position j from the terms of an indexer, when the newest position is i.
inline float indexmem_reference_rank_terms(const std::vector<float> & terms, int32_t j, int32_t i, float pos_slope, float age_scale) {
    double rank = (double) terms[0] + (double) pos_slope*j;
    if (terms.size() > 1) {
        rank += (double) terms[1]*(i - j)/age_scale;
    }
    return (float) rank;
}

// The centroid memory of one KV head: means [R][keys, then values], counts [R]. `entries` are those that leave together, in
// the order of the plan; one at a time this is the rule of the method.
struct indexmem_reference_centroid {
    std::vector<std::vector<double>> means;
    std::vector<double>              counts;

    void absorb(const std::vector<std::vector<float>> & entries, size_t n_embd_k) {
        size_t i = 0;
        for (size_t r = 0; r < counts.size() && i < entries.size(); ++r) {
            if (counts[r] == 0.0) {
                means[r].assign(entries[i].begin(), entries[i].end());
                counts[r] = 1.0;
                ++i;
            }
        }
        std::vector<size_t> nearest(entries.size(), 0);
        for (size_t j = i; j < entries.size(); ++j) {
            double best = INFINITY;
            for (size_t r = 0; r < counts.size(); ++r) {
                double distance = 0.0;
                for (size_t d = 0; d < n_embd_k; ++d) {
                    distance += (entries[j][d] - means[r][d])*(entries[j][d] - means[r][d]);
                }
                if (distance < best) {
                    best = distance;
                    nearest[j] = r;
                }
            }
        }
        for (size_t j = i; j < entries.size(); ++j) {
            const size_t r = nearest[j];
            counts[r] += 1.0;
            for (size_t d = 0; d < means[r].size(); ++d) {
                means[r][d] += (entries[j][d] - means[r][d])/counts[r];
            }
        }
    }
};

// The residual memory of one KV head: state [n_embd_v + 1][n_feature], the last row is the normaliser.
struct indexmem_reference_residual {
    std::vector<std::vector<double>> state;

    // keys [n][n_embd_k], values [n][n_embd_v] of the entries that leave together; phi [n_feature][n_embd_k]
    void absorb(
            const std::vector<std::vector<float>> & keys,
            const std::vector<std::vector<float>> & values,
            const std::vector<std::vector<float>> & phi,
            double rate, double decay) {
        if (keys.empty()) {
            return;
        }
        for (auto & row : state) {
            for (auto & x : row) {
                x *= decay;
            }
        }
        for (size_t i = 0; i < keys.size(); ++i) {
            for (size_t j = 0; j < phi.size(); ++j) {
                double f = 0.0;
                for (size_t d = 0; d < keys[i].size(); ++d) {
                    f += (double) phi[j][d]*keys[i][d];
                }
                for (size_t d = 0; d < values[i].size(); ++d) {
                    state[d][j] += rate*f*values[i][d];
                }
                state.back()[j] += rate*f*f;
            }
        }
    }
};

template <typename T>
void indexmem_reference_compact(const indexmem_reference_plan & plan, std::vector<T> & slots) {
    for (size_t i = 0; i < plan.dst.size(); ++i) {
        slots[plan.dst[i]] = slots[plan.src[i]];
    }
}
