// Sixteen fp32 lanes out of a float, bf16 or fp16 row, and the work that torch's threads share.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace neat {

constexpr int64_t LANES = 16;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// The first n lanes, n possibly beyond 16 or negative.
inline __mmask16 first(int64_t n) {
  if (n >= LANES) return 0xffff;
  return n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1);
}

// Lanes outside of the mask are zero, and their memory is not read.
inline __m512 load(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
inline __m512 load(const bf16* p, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
inline __m512 load(const fp16* p, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, p)); }

// Fetch a line of memory ahead of its use, so that memory works beside the arithmetic; a wrong address does no harm.
inline void fetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// sum += acc in the masked lanes, or sum = acc where it is the first.
inline void add_to(float* sum, __mmask16 mask, __m512 acc, bool is_first) {
  _mm512_mask_storeu_ps(sum, mask, _mm512_add_ps(load(sum, is_first ? 0 : mask), acc));
}

// torch_parallel_for of torch's stable C interface: body(begin, end, context) on disjoint ranges that cover the whole.
using Body = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);

// A tall a [M,K] of any of the dtypes, rows `stride_a` apart, its narrow partner of r columns, and the fp32 result.
struct Product {
  const void* a;
  int64_t stride_a, M, K;
  const float* narrow;
  int64_t r;
  float* out;
};

// The body for dtype 0 (float), 1 (bf16) or 2 (fp16).
inline Body of_dtype(int32_t dtype, Body of_float, Body of_bf16, Body of_fp16) {
  return dtype == 0 ? of_float : dtype == 1 ? of_bf16 : of_fp16;
}

}  // namespace neat
