// matvec_q6k: out = x times the transpose of a Q6_K weight, for 1 to 8 tokens. Twin: backend.matmul, ggml's Q6_K.
//
// A weight is (code - 32) * scale * step: 6-bit codes, an int8 scale for 16 columns, a float16 step for a block of 256.
// device_layout.q6k has taken the blocks apart, so that lane m of 16 needs of a block 8 consecutive bytes of low halves
// (two words), 4 of high bits (one word) and 4 of scales, for its columns 64 q + 4 m + i, q and i from 0 to 3: byte i
// of the low word q / 2 has the low four bits, from bit 4 (q % 2); byte i of the high word the other two, from bit 2 q;
// byte q of the scales is theirs. So a warp reads two blocks at once, and its lanes' quads of x lie side by side.
//
// A warp makes ROWS rows for all tokens. Weights are read once, past the cache, and become floats once for all tokens,
// without rounding: 11 bits times 7 times 5. x comes from the cache, and what a lane reads of it serves ROWS rows. Each
// token has a sum of its own in the lane, and last the 32 lanes' sums meet in warp_sum: for a token the same operations
// in the same order, alone or as one of eight.
//
// Grid: rows / (ROWS * WARPS), rounded up. Block: 32 * WARPS threads, at most 128. columns: a multiple of 256; arrays
// begin at 16 bytes. Compiled with TOKENS (1 … 8).

constexpr int ROWS = 4;
constexpr int BLOCKS = TOKENS == 1 ? 5 : TOKENS < 6 ? 4 : TOKENS == 6 ? 2 : 3;  // what registers allow without spills

struct Piece {  // a lane's 16 columns of a row
    uint2 low;
    unsigned high, scales;
    f16 step;
};

// The codes q of a lane, a byte each.
__device__ inline unsigned four_codes(const Piece& piece, int q) {
    unsigned low = q < 2 ? piece.low.x : piece.low.y;
    return low >> 4 * (q % 2) & 0x0F0F0F0F | (q < 2 ? piece.high << 4 - 2 * q : piece.high >> 2 * q - 4) & 0x30303030;
}

extern "C" __global__ void __launch_bounds__(128, BLOCKS) matvec_q6k(
    float* __restrict__ out_TO, const float4* __restrict__ x_TQ, const uint2* __restrict__ low_ON,
    const unsigned* __restrict__ scales_OS, const unsigned* __restrict__ high_ON, const f16* __restrict__ steps_OB,
    int rows, int columns) {
    int lane = threadIdx.x % 32, first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    if (first >= rows) return;  // a whole warp
    int blocks = columns / 256, m = lane % 16;
    float sum_RT[ROWS][TOKENS] = {};
    for (int b = lane / 16; b < blocks; b += 2) {
        Piece piece_R[ROWS];
        for (int r = 0; r < ROWS; r++) {
            long long block = (long long)min(first + r, rows - 1) * blocks + b;  // beyond the last row: that once more
            piece_R[r] = {__ldcs(low_ON + block * 16 + m), __ldcs(high_ON + block * 16 + m),
                          scales_OS[block * 4 + m / 4], steps_OB[block]};
        }
#pragma unroll
        for (int q = 0; q < 4; q++) {
            float4 w_R[ROWS];
            for (int r = 0; r < ROWS; r++) {
                float scale = widen(piece_R[r].step) * int8(piece_R[r].scales >> 8 * q);
                float4 codes = four_bytes(four_codes(piece_R[r], q), 32);
                w_R[r] = make_float4(codes.x * scale, codes.y * scale, codes.z * scale, codes.w * scale);
            }
            for (int t = 0; t < TOKENS; t++) {
                float4 x = x_TQ[(long long)t * (columns / 4) + 64 * b + 16 * q + m];
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
