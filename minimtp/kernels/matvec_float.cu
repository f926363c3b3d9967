// matvec_float: out = x times the transpose of a float weight, for 1 to 8 tokens. Twin: backend.matmul, quant.Plain.
//
// A block makes ROWS rows for all tokens, and its WARPS share the columns: routers and gates have few rows, and there
// would be few warps otherwise. Where columns are a multiple of 8 a thread takes 4 of every 512 (16 or 8 bytes of each
// row; a warp reads consecutive bytes, of x too), two of its turns at once; else one of every 128. Weights are read
// once, past the cache; x comes from the cache, and what a lane reads of it serves ROWS rows.
//
// Each token has a sum of its own in the lane; the lanes' sums meet in warp_sum, the warps' in shared memory, first to
// last: for a token the same operations in the same order, alone or as one of eight.
//
// Grid: rows / ROWS, rounded up. Block: 32 * WARPS = 128 threads. Any columns; x and the weight begin at 16 bytes.
// Compiled with TOKENS (1 … 8) and WEIGHT (f32, f16 or bf16).

constexpr int ROWS = 4, WARPS = 4;

__device__ inline float4 four(const f32* w) { return __ldcs(reinterpret_cast<const float4*>(w)); }
__device__ inline float4 four(const f16* w) {
    uint2 pairs = __ldcs(reinterpret_cast<const uint2*>(w));
    return make_float4(half_to_float(pairs.x), half_to_float(pairs.x >> 16),
                       half_to_float(pairs.y), half_to_float(pairs.y >> 16));
}
__device__ inline float4 four(const bf16* w) {
    uint2 pairs = __ldcs(reinterpret_cast<const uint2*>(w));
    return make_float4(bf16_to_float(pairs.x), bf16_to_float(pairs.x >> 16),
                       bf16_to_float(pairs.y), bf16_to_float(pairs.y >> 16));
}

extern "C" __global__ void matvec_float(float* __restrict__ out_TO, const float* __restrict__ x_TI,
                                        const WEIGHT* __restrict__ w_OI, int rows, int columns) {
    __shared__ float sum_WRT[WARPS][ROWS][TOKENS];
    int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, first = blockIdx.x * ROWS;
    const WEIGHT* w_R[ROWS];
    for (int r = 0; r < ROWS; r++)  // what is beyond the last row is the last once more, and not written
        w_R[r] = w_OI + (long long)min(first + r, rows - 1) * columns;
    float sum_RT[ROWS][TOKENS] = {};
    if (columns % 8 == 0) {
#pragma unroll 2
        for (int column = 4 * thread; column < columns; column += 4 * 32 * WARPS) {
            float4 four_R[ROWS];
            for (int r = 0; r < ROWS; r++) four_R[r] = four(w_R[r] + column);
            for (int t = 0; t < TOKENS; t++) {
                float4 x = *reinterpret_cast<const float4*>(x_TI + (long long)t * columns + column);
                for (int r = 0; r < ROWS; r++) sum_RT[r][t] = dot4(x, four_R[r], sum_RT[r][t]);
            }
        }
    } else {
        for (int column = thread; column < columns; column += 32 * WARPS)
            for (int t = 0; t < TOKENS; t++) {
                float x = x_TI[(long long)t * columns + column];
                for (int r = 0; r < ROWS; r++) sum_RT[r][t] = fmaf(x, widen(w_R[r][column]), sum_RT[r][t]);
            }
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) {
            float sum = warp_sum(sum_RT[r][t]);
            if (lane == 0) sum_WRT[warp][r][t] = sum;
        }
    __syncthreads();
    int r = thread % ROWS, t = thread / ROWS;
    if (t < TOKENS && first + r < rows) {
        float sum = 0;
        for (int w = 0; w < WARPS; w++) sum += sum_WRT[w][r][t];
        out_TO[(long long)t * rows + first + r] = sum;
    }
}
