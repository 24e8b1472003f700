// The sum of a row's terms in a fixed binary tree over leaves, which come in ascending order. A leaf without terms is zero, and
// adding it changes nothing, so it is left out; two neighbours are added once no nearer relative can come.
#pragma once
#include "simd.h"

// Which sums of a row wait, one for each level at most.
struct TreeOrder {
  static constexpr int MOST = 16;  // one more than the tree has levels
  // Where terms of a leaf are added: at place `at`, after as many sums from there on were added to those before them; a first term
  // finds nothing there.
  struct Step { uint8_t at, merges; bool first; };

  int32_t leaf[MOST];
  int depth = 0;

  static int levels(long leaves) {
    int n = 0;
    while ((1L << n) < leaves) n++;
    return n;
  }
  Step next(int32_t of) {
    if (depth && leaf[depth - 1] == of) return {(uint8_t)(depth - 1), 0, false};
    uint8_t merges = 0;
    for (; depth > 1 && (leaf[depth - 2] ^ leaf[depth - 1]) < (leaf[depth - 1] ^ of); depth--, merges++) leaf[depth - 2] = leaf[depth - 1];
    leaf[depth] = of;
    return {(uint8_t)depth++, merges, true};
  }
};

// Adds the sums from place `at` on, so many, each to the one before it, the last one first.
static inline void merge_sums(float* sums, long width, int at, int merges) {
  for (int i = at + merges - 1; i >= at; i--)
    for (long j = 0; j < width; j++) sums[(i - 1) * width + j] += sums[i * width + j];
}
// The whole sum, of `depth` that wait.
static inline void close_sums(float* sums, long width, int depth, float* out, long wide) {
  merge_sums(sums, width, 1, depth - 1);
  if (depth) memcpy(out, sums, wide * sizeof(float));
  else memset(out, 0, wide * sizeof(float));
}
