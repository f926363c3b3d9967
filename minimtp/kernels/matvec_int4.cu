// matvec_int4: out = x times the transpose of an int4 weight, for 1 to 8 tokens. Twin: backend.matmul, quant.Quantized.
// gated_int4: out = ACTIVATION(gate x) * (up x), two weights in one pass over x. Twin: layers.gated_mlp's start.
//
// A weight row is packed two codes a byte, the even column in the low half, and has one scale for every `group`
// columns; a weight is (code - 8) * scale. A warp makes ROWS rows for all tokens (gated: half of them of each weight),
// a lane takes 32 columns of every 1024: 16 bytes of each row, loaded one tile ahead, so that they come while the tile
// before is multiplied. Weights are read once, past the cache; a code becomes a float once for all tokens; what a lane
// reads of x serves ROWS rows.
//
// x goes through shared memory by tiles of 1024 columns, which the whole block uses. Not for want of a cache, but of
// its banks: lanes that read 128 bytes apart would wait for one another. The tile has the lanes' quads side by side.
//
// SPAN products of codes are summed, then scaled; each token has a sum of its own in the lane, and last the 32 lanes'
// sums meet in warp_sum: for a token the same operations in the same order, alone or as one of eight.
//
// Grid: rows / (ROWS * WARPS) (gated: / (ROWS / 2 * WARPS)), rounded up. Block: 32 * WARPS threads, at most 256; fewer
// where rows are few. Shared: 4224 * TOKENS bytes. columns: a multiple of 32; group: of 8. x, rows: begin at 16 bytes.
// Compiled with TOKENS (1 … 8), SCALE (f16, bf16 or f32), SPAN (32 where group is a multiple of it, else 8) and, for
// gated_int4, ACTIVATION (gelu or silu).

constexpr int ROWS = 4, TILE = 1024, SPANS = 32 / SPAN;
constexpr int BLOCKS = TOKENS * SPANS == 1 ? 4 : TOKENS * SPANS < 7 ? 2 : 1;  // of 256 threads: what registers allow

struct Row {
    const uint4* packed_W;
    const SCALE* scales_G;
};

struct Piece {  // a lane's 32 columns of a row
    uint4 codes;
    SCALE scale_S[SPANS];
};

__device__ inline Row find_row(const uint4* packed_OW, const SCALE* scales_OG, long long row, int columns, int group) {
    return {packed_OW + row * (columns / 32), scales_OG + row * (columns / group)};
}

__device__ inline void load(Piece (&piece_R)[ROWS], const Row (&row_R)[ROWS], int column, int group) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        piece_R[r].codes = __ldcs(row_R[r].packed_W + column / 32);
#pragma unroll
        for (int s = 0; s < SPANS; s++) piece_R[r].scale_S[s] = row_R[r].scales_G[(column + s * SPAN) / group];
    }
}

__device__ inline unsigned word(uint4 codes, int i) {
    return i == 0 ? codes.x : i == 1 ? codes.y : i == 2 ? codes.z : codes.w;
}

// The products of a warp's rows and all tokens -> sum_RT, each in all lanes. All threads of the block come here.
static __device__ __forceinline__ void multiply(float (&sum_RT)[ROWS][TOKENS], const float4* __restrict__ x_TQ,
                                                const Row (&row_R)[ROWS], int columns, int group) {
    __shared__ float4 tile_TQL[TOKENS][8][33];  // 33: lanes that fill it write to different banks
    int lane = threadIdx.x % 32;
    Piece piece_R[ROWS], next_R[ROWS];
    if (32 * lane < columns) load(next_R, row_R, 32 * lane, group);
    for (int start = 0; start < columns; start += TILE) {
        int column = start + 32 * lane;
        for (int t = 0; t < TOKENS; t++)
            for (int q = threadIdx.x; q < min(TILE, columns - start) / 4; q += blockDim.x)
                tile_TQL[t][q % 8][q / 8] = x_TQ[(t * (long long)columns + start) / 4 + q];
        for (int r = 0; r < ROWS; r++) piece_R[r] = next_R[r];
        __syncthreads();
        if (column + TILE < columns) load(next_R, row_R, column + TILE, group);
        if (column < columns)
#pragma unroll
            for (int s = 0; s < SPANS; s++) {
                float part_RT[ROWS][TOKENS] = {};
#pragma unroll
                for (int q = s * SPAN / 4; q < (s + 1) * SPAN / 4; q++) {
                    float4 w_R[ROWS];
                    for (int r = 0; r < ROWS; r++) w_R[r] = four_nibbles(word(piece_R[r].codes, q / 2) >> 16 * (q % 2));
                    for (int t = 0; t < TOKENS; t++) {
                        float4 x = tile_TQL[t][q][lane];
                        for (int r = 0; r < ROWS; r++) part_RT[r][t] = dot4(x, w_R[r], part_RT[r][t]);
                    }
                }
                for (int r = 0; r < ROWS; r++)
                    for (int t = 0; t < TOKENS; t++)
                        sum_RT[r][t] = fmaf(part_RT[r][t], widen(piece_R[r].scale_S[s]), sum_RT[r][t]);
            }
        __syncthreads();  // before the next tile takes this one's place
    }
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++) sum_RT[r][t] = warp_sum(sum_RT[r][t]);
}

// A warp's row beyond the last is the last once more: computed, since all come to the barriers, and not written.

extern "C" __global__ void __launch_bounds__(256, BLOCKS) matvec_int4(
    float* __restrict__ out_TO, const float4* __restrict__ x_TQ, const uint4* __restrict__ packed_OW,
    const SCALE* __restrict__ scales_OG, int rows, int columns, int group) {
    int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
    Row row_R[ROWS];
    for (int r = 0; r < ROWS; r++) row_R[r] = find_row(packed_OW, scales_OG, min(first + r, rows - 1), columns, group);
    float sum_RT[ROWS][TOKENS] = {};
    multiply(sum_RT, x_TQ, row_R, columns, group);
    for (int r = 0; r < ROWS; r++)
        for (int t = 0; t < TOKENS; t++)
            if (threadIdx.x % 32 == 0 && first + r < rows) out_TO[(long long)t * rows + first + r] = sum_RT[r][t];
}

#ifndef ACTIVATION
#define ACTIVATION silu
#endif

extern "C" __global__ void __launch_bounds__(256, BLOCKS) gated_int4(
    float* __restrict__ out_TO, const float4* __restrict__ x_TQ, const uint4* __restrict__ gate_OW,
    const SCALE* __restrict__ gate_scales_OG, const uint4* __restrict__ up_OW, const SCALE* __restrict__ up_scales_OG,
    int rows, int columns, int group) {
    constexpr int HALF = ROWS / 2;
    int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * HALF;
    Row row_R[ROWS];
    for (int r = 0; r < HALF; r++) {
        row_R[r] = find_row(gate_OW, gate_scales_OG, min(first + r, rows - 1), columns, group);
        row_R[HALF + r] = find_row(up_OW, up_scales_OG, min(first + r, rows - 1), columns, group);
    }
    float sum_RT[ROWS][TOKENS] = {};
    multiply(sum_RT, x_TQ, row_R, columns, group);
    for (int r = 0; r < HALF; r++)
        for (int t = 0; t < TOKENS; t++)
            if (threadIdx.x % 32 == 0 && first + r < rows)
                out_TO[(long long)t * rows + first + r] = ACTIVATION(sum_RT[r][t]) * sum_RT[HALF + r][t];
}
