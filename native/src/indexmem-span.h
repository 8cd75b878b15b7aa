#pragma once

#include <cstdint>
#include <vector>

//
// Positions that stay inside a span
//
// A model knows distances up to the length it was trained for. The tokens of an endless text have ever larger indices; what
// their keys are rotated by, their rotary positions, are therefore numbers of their own: equal to the indices until the span
// is full. Then the entries that are held, far fewer than the span has positions, move together (a rebase), and new tokens
// go on behind them.
//
// Invariants, of each KV head, which holds tokens of its own
//   - the order of the entries stays, and no two of them have the same position
//   - the protected prefix keeps its positions, so its keys keep their bits
//   - all heads end at the same position: the next token has one position for all of them
//   - of the others, those that were neighbours stay neighbours, and no distance grows. What is far may come closer
//

// where entries end after a rebase, at most budget and n_tokens below the span
int32_t indexmem_span_end(uint32_t span, uint32_t n_used, uint32_t n_tokens);

// New rotary positions. rotary: those of a KV head, ascending, of which the first n_protected keep theirs and the last n_window
// are neighbours; end: from indexmem_span_end()
std::vector<int32_t> indexmem_span_rebase(const std::vector<int32_t> & rotary, uint32_t n_protected, uint32_t n_window, int32_t end);
