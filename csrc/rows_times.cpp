// out [M,r] = a [M,K] · b [K,r], accumulated in fp32, for a tall a of float, bf16 or fp16 and a narrow fp32 b.
//
// ROWS rows of a are widened into a panel, PANEL columns at a time, and the sums of these rows with up to 32 columns of
// b stay in registers along the panel: a is read once for every 32 columns of b, out once for every panel. Beside the
// arithmetic the next panel is fetched, and b AHEAD rows before its use.
// Every sum is taken in the order of K, whatever the number of threads; that of a panel by itself, since rounding errors
// of one long sum would be larger.
#include "lanes.h"

namespace neat {
namespace {

// 24 registers hold sums: enough to cover the latency of two FMA units, and 8 are left for operands.
constexpr int64_t ROWS = 12;
// 12 KiB of panel, as much of the next one at most and what is fetched of b fit in a first-level cache of 32 KiB.
constexpr int64_t PANEL = 256;
// 4 KiB of b at r = 16, a page: beyond it the hardware fetches nothing by itself.
constexpr int64_t AHEAD = 64;

template <typename T>
void widen(const T* a, int64_t stride_a, int64_t rows, int64_t columns, float* panel) {
  for (int64_t i = 0; i < rows; i++)
    for (int64_t k = 0; k < columns; k += LANES)
      _mm512_store_ps(panel + i * PANEL + k, load(a + i * stride_a + k, first(columns - k)));
}

// out [rows, VECTORS·16] from row m and column j on; rows and columns beyond those of out are not stored.
template <typename T, int VECTORS>
void tile(const T* a, const Product& p, int64_t rows, int64_t j, int64_t m, float* panel) {
  __mmask16 mask[VECTORS];
  for (int v = 0; v < VECTORS; v++) mask[v] = first(p.r - j - v * LANES);
  // Once where a has no column, since a sum of nothing is zero.
  for (int64_t k0 = 0; k0 == 0 || k0 < p.K; k0 += PANEL) {
    const int64_t columns = p.K - k0 < PANEL ? p.K - k0 : PANEL;
    widen(a + k0, p.stride_a, rows, columns, panel);
    const T* next = k0 + PANEL < p.K ? a + k0 + PANEL : a + ROWS * p.stride_a;
    __m512 acc[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
      for (int v = 0; v < VECTORS; v++) acc[i][v] = _mm512_setzero_ps();
    for (int64_t k = 0; k < columns; k++) {
      if (k % LANES == 0)
        for (int i = 0; i < ROWS; i++) fetch(next + i * p.stride_a + k);
      const float* b = p.narrow + (k0 + k) * p.r + j;
      __m512 row[VECTORS];
      for (int v = 0; v < VECTORS; v++) {
        row[v] = load(b + v * LANES, mask[v]);
        fetch(b + AHEAD * p.r + v * LANES);
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; i++) {
        const __m512 element = _mm512_set1_ps(panel[i * PANEL + k]);
        for (int v = 0; v < VECTORS; v++) acc[i][v] = _mm512_fmadd_ps(element, row[v], acc[i][v]);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; i++)
      if (i < rows)
        for (int v = 0; v < VECTORS; v++) add_to(p.out + (m + i) * p.r + j + v * LANES, mask[v], acc[i][v], k0 == 0);
  }
}

template <typename T>
void tiles(int64_t begin, int64_t end, void* context) {
  const Product& p = *static_cast<const Product*>(context);
  // Rows of the panel beyond those of a are multiplied too, and their sums dropped.
  alignas(64) float panel[ROWS * PANEL] = {};
  for (int64_t m = begin * ROWS; m < end * ROWS && m < p.M; m += ROWS) {
    const T* a = static_cast<const T*>(p.a) + m * p.stride_a;
    const int64_t rows = p.M - m < ROWS ? p.M - m : ROWS;
    for (int64_t j = 0; j < p.r; j += 2 * LANES) {
      if (p.r - j > LANES)
        tile<T, 2>(a, p, rows, j, m, panel);
      else
        tile<T, 1>(a, p, rows, j, m, panel);
    }
  }
}

}  // namespace
}  // namespace neat

extern "C" int32_t neat_rows_times(neat::ParallelFor parallel_for, int32_t dtype, const void* a, int64_t stride_a,
                                   int64_t M, int64_t K, const float* b, int64_t r, float* out) {
  using namespace neat;
  Product p{a, stride_a, M, K, b, r, out};
  return parallel_for(0, (M + ROWS - 1) / ROWS, 1, of_dtype(dtype, tiles<float>, tiles<bf16>, tiles<fp16>), &p);
}
