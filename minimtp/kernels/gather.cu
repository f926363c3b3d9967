// gather: rows of an embedding, by ids that lie in device memory, as floats. Twin: backend.gather, bit for bit.
//
// As there a weight is rounded once, when its scale is applied (most never are). A thread makes one column of one token:
// lanes of a warp read neighbouring columns, and no row is more than some kilobytes.
//
// What the arrays are depends on STORAGE:
//   FLOATS  stored: SCALE floats [V, D]; scales, high and steps null
//   INT4    stored: codes as in matvec_int4; scales: SCALE [V, D / group]
//   CODES8  stored: codes as in matvec_int8; scales: SCALE [V, D / group]
//   Q6K     stored: the low halves as in matvec_q6k; high; scales: its int8 ones; steps
//
// Grid: (columns / threads, rounded up; tokens). Block: any (256). Any columns, any alignment that the types have.
// Compiled with STORAGE and SCALE (f16, bf16 or f32; of Q6K, which has its own: f16).

#define FLOATS 0
#define INT4 1
#define CODES8 2
#define Q6K 3

// Code and scale of Q6_K's column, by the same places as in matvec_q6k.
__device__ inline float q6k_weight(const uint8* low, const uint8* high, const int8* scales, const f16* steps,
                                   long long row, int column, int columns) {
    long long block = row * (columns / 256) + column / 256;
    int q = column % 256 / 64, m = column % 64 / 4, i = column % 4;
    int code = low[block * 128 + 8 * m + 4 * (q / 2) + i] >> 4 * (q % 2) & 15;
    code |= (high[block * 64 + 4 * m + i] >> 2 * q & 3) << 4;
    return (code - 32) * (widen(steps[block]) * scales[block * 16 + 4 * (m / 4) + q]);
}

extern "C" __global__ void gather(float* __restrict__ out_TD, const int* __restrict__ ids_T,
                                  const void* __restrict__ stored, const void* __restrict__ scales,
                                  const uint8* __restrict__ high, const f16* __restrict__ steps, int columns,
                                  int group) {
    int t = blockIdx.y, column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    long long row = ids_T[t];
#if STORAGE == FLOATS
    float weight = widen(static_cast<const SCALE*>(stored)[row * columns + column]);
#elif STORAGE == Q6K
    float weight = q6k_weight(static_cast<const uint8*>(stored), high, static_cast<const int8*>(scales), steps, row,
                              column, columns);
#else
    float scale = widen(static_cast<const SCALE*>(scales)[row * (columns / group) + column / group]);
    long long at = row * columns + column;
#if STORAGE == INT4
    int code = (static_cast<const uint8*>(stored)[at / 2] >> 4 * (at % 2) & 15) - 8;
#else
    int code = static_cast<const int8*>(stored)[at];
#endif
    float weight = code * scale;
#endif
    out_TD[(long long)t * columns + column] = weight;
}
