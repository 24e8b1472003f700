// The sum of a row's terms in a fixed binary tree over leaves, which come in ascending order. A leaf without terms is zero, and
// adding it changes nothing, so it is left out; two neighbours are added once no nearer relative can come.
#pragma once
#include "simd.h"

struct TreeSum {
  static constexpr int MOST = 16;  // rows that wait at once: one more than the tree has levels
  int32_t leaf[MOST];
  int depth = 0;

  static int levels(long leaves) {
    int n = 0;
    while ((1L << n) < leaves) n++;
    return n;
  }
  // Where terms of the leaf are to be added, in memory for levels + 1 rows of `width`.
  float* open(float* rows, long width, int32_t next) {
    if (depth && leaf[depth - 1] == next) return rows + (depth - 1) * width;
    while (depth > 1 && (leaf[depth - 2] ^ leaf[depth - 1]) < (leaf[depth - 1] ^ next)) merge(rows, width);
    leaf[depth] = next;
    float* row = rows + depth++ * width;
    memset(row, 0, width * sizeof(float));
    return row;
  }
  // Copies the whole sum.
  void close(float* rows, long width, float* out, long wide) {
    while (depth > 1) merge(rows, width);
    if (depth) memcpy(out, rows, wide * sizeof(float));
    else memset(out, 0, wide * sizeof(float));
  }

 private:
  void merge(float* rows, long width) {
    float *left = rows + (depth - 2) * width, *right = left + width;
    for (long j = 0; j < width; j++) left[j] += right[j];
    leaf[depth - 2] = leaf[depth - 1];
    depth--;
  }
};
