// matvec_int8: out = x times the transpose of an int8 weight, for 1 to 8 tokens. Twin: backend.matmul, ggml's Q8_0.
//
// A weight is code * scale, with a float16 scale for every 32 columns: Q8_0, taken apart by device_layout.int8. A warp
// makes ROWS rows for all tokens; a lane takes 4 of every 128 columns (a warp reads 128 consecutive bytes of each row,
// 512 of x), and AHEAD times that is loaded before it is multiplied. Weights are read once, past the cache, and become
// floats once for all tokens, without rounding: 8 bits times 11. x comes from the cache, and what a lane reads of it
// serves ROWS rows.
//
// Each token has a sum of its own in the lane, and last the 32 lanes' sums meet in warp_sum: for a token the same
// operations in the same order, alone or as one of eight.
//
// Grid: rows / (ROWS * WARPS), rounded up. Block: 32 * WARPS threads (128). columns: a multiple of 32; codes begin at 4
// bytes, x at 16. Compiled with TOKENS (1 … 8).

constexpr int ROWS = 4, AHEAD = 2;

__device__ inline float4 scaled(float4 codes, float scale) {
    return make_float4(codes.x * scale, codes.y * scale, codes.z * scale, codes.w * scale);
}

extern "C" __global__ void matvec_int8(float* __restrict__ out_TO, const float* __restrict__ x_TI,
                                       const unsigned* __restrict__ codes_OW, const f16* __restrict__ scales_OG,
                                       int rows, int columns) {
    int lane = threadIdx.x % 32, first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    if (first >= rows) return;  // a whole warp
    const unsigned* codes_RW[ROWS];
    const f16* scales_RG[ROWS];
    for (int r = 0; r < ROWS; r++) {
        long long row = min(first + r, rows - 1);  // beyond the last: that one once more, and not written
        codes_RW[r] = codes_OW + row * (columns / 4), scales_RG[r] = scales_OG + row * (columns / 32);
    }
    float sum_RT[ROWS][TOKENS] = {};
    for (int start = 4 * lane; start < columns; start += 128 * AHEAD) {
        unsigned word_AR[AHEAD][ROWS];
        f16 scale_AR[AHEAD][ROWS];
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (int column = start + 128 * a; column < columns)
                for (int r = 0; r < ROWS; r++) {
                    word_AR[a][r] = __ldcs(codes_RW[r] + column / 4);
                    scale_AR[a][r] = scales_RG[r][column / 32];
                }
#pragma unroll
        for (int a = 0; a < AHEAD; a++)
            if (int column = start + 128 * a; column < columns) {
                float4 w_R[ROWS];
                for (int r = 0; r < ROWS; r++)  // signed bytes become unsigned ones, 128 more
                    w_R[r] = scaled(four_bytes(word_AR[a][r] ^ 0x80808080, 128), widen(scale_AR[a][r]));
                for (int t = 0; t < TOKENS; t++) {
                    float4 x = *reinterpret_cast<const float4*>(x_TI + (long long)t * columns + column);
                    for (int r = 0; r < ROWS; r++) sum_RT[r][t] = dot4(x, w_R[r], sum_RT[r][t]);
                }
            }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) {
            float sum = warp_sum(sum_RT[r][t]);
            if (lane == 0 && first + r < rows) out_TO[(long long)t * rows + first + r] = sum;
        }
}
