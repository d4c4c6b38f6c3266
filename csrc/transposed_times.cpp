// out [r,K] = pᵀ · a, accumulated in fp32, for a tall a [M,K] of float, bf16 or fp16 and a narrow fp32 p [M,r].
//
// A thread owns strips of STRIP columns of a. A panel of them is widened PANEL rows at a time, and the sums of up to
// TALL rows of out with it stay in registers down the panel: a is read once, out once for every panel. Beside the
// arithmetic the next strip is fetched.
// Every sum is taken in the order of M, whatever the number of threads; that of a panel by itself, since rounding errors
// of one long sum would be larger.
#include "lanes.h"

namespace neat {
namespace {

constexpr int VECTORS = 4;
constexpr int64_t STRIP = VECTORS * LANES;
// 16 KiB of panel, 8 KiB of the next one in half precision and 4 KiB of p at r = 16 fit in a first-level cache of 32 KiB.
constexpr int64_t PANEL = 64;
// 16 registers hold sums: enough to cover the latency of two FMA units.
constexpr int64_t TALL = 4;

// With masks made once for a strip: with the loop of rows_times.cpp the product took longer (AMD EPYC with AVX-512).
template <typename T>
void widen(const T* a, int64_t stride_a, int64_t rows, const __mmask16 (&mask)[VECTORS], float* panel) {
  for (int64_t m = 0; m < rows; m++)
    for (int v = 0; v < VECTORS; v++)
      _mm512_store_ps(panel + m * STRIP + v * LANES, load(a + m * stride_a + v * LANES, mask[v]));
}

// J rows of out, added to what stands there unless this is the first panel. `next` is the strip to fetch.
template <typename T, int J>
void tile(const float* panel, int64_t rows, const float* p, const Product& g, float* out,
          const __mmask16 (&mask)[VECTORS], bool is_first, const T* next) {
  __m512 acc[J][VECTORS];
#pragma GCC unroll 16
  for (int j = 0; j < J; j++)
    for (int v = 0; v < VECTORS; v++) acc[j][v] = _mm512_setzero_ps();
  for (int64_t m = 0; m < rows; m++) {
    for (int v = 0; v < VECTORS; v++) fetch(next + m * g.stride_a + v * LANES);
    __m512 row[VECTORS];
    for (int v = 0; v < VECTORS; v++) row[v] = _mm512_load_ps(panel + m * STRIP + v * LANES);
#pragma GCC unroll 16
    for (int j = 0; j < J; j++) {
      const __m512 element = _mm512_set1_ps(p[m * g.r + j]);
      for (int v = 0; v < VECTORS; v++) acc[j][v] = _mm512_fmadd_ps(element, row[v], acc[j][v]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < J; j++)
    for (int v = 0; v < VECTORS; v++) add_to(out + j * g.K + v * LANES, mask[v], acc[j][v], is_first);
}

template <typename T>
using Tile = void (*)(const float*, int64_t, const float*, const Product&, float*, const __mmask16 (&)[VECTORS], bool,
                      const T*);
template <typename T>
constexpr Tile<T> TILES[] = {nullptr, tile<T, 1>, tile<T, 2>, tile<T, 3>, tile<T, TALL>};

template <typename T>
void strips(int64_t begin, int64_t end, void* context) {
  const Product& g = *static_cast<const Product*>(context);
  alignas(64) float panel[PANEL * STRIP];
  // The first panel is written even where a has no row, since a sum of nothing is zero.
  for (int64_t m = 0; m == 0 || m < g.M; m += PANEL) {
    const int64_t rows = g.M - m < PANEL ? g.M - m : PANEL;
    for (int64_t k = begin * STRIP; k < end * STRIP && k < g.K; k += STRIP) {
      __mmask16 mask[VECTORS];
      for (int v = 0; v < VECTORS; v++) mask[v] = first(g.K - k - v * LANES);
      const T* a = static_cast<const T*>(g.a) + m * g.stride_a + k;
      const T* next = k + STRIP < end * STRIP ? a + STRIP : a - k + begin * STRIP + PANEL * g.stride_a;
      widen(a, g.stride_a, rows, mask, panel);
      for (int64_t j = 0; j < g.r; j += TALL) {
        const int64_t tall = g.r - j < TALL ? g.r - j : TALL;
        TILES<T>[tall](panel, rows, g.narrow + m * g.r + j, g, g.out + j * g.K + k, mask, m == 0, next);
      }
    }
  }
}

}  // namespace
}  // namespace neat

extern "C" int32_t neat_transposed_times(neat::ParallelFor parallel_for, int32_t dtype, const void* a,
                                         int64_t stride_a, int64_t M, int64_t K, const float* p, int64_t r,
                                         float* out) {
  using namespace neat;
  Product g{a, stride_a, M, K, p, r, out};
  return parallel_for(0, (K + STRIP - 1) / STRIP, 1, of_dtype(dtype, strips<float>, strips<bf16>, strips<fp16>), &g);
}
