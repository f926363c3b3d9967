// rms_norm and its kin: the norms between the products, with the additions beside them. Twin: layers.rms_norm.
//
//   rms_norm        out = ([residual +] norm(x) [* weight]) [* scale]   Gemma: a sub-layer's output, normed and added
//   add_rms_norm    out = residual + x                                  Qwen: a sub-layer's output, added as it is
//   rms_norm_gated  out = norm(x) [* weight] [* silu(gate)]             rows of a head's width: the DeltaNet's output
//
// norm(x) = x / sqrt(mean(x²) + eps). The first two can also make `next`, the norm of `out` [* next_weight]: what the
// next sub-layer reads, without another launch. What stands in brackets is left out where its pointer is null, and so
// is `next`; scale is one number (Gemma's layer scalar).
//
// In the first two a block makes a row, of a token: the row is read once, waits in shared memory, and each thread
// touches only its own columns there, so only the sums need barriers. In the gated one a warp makes a row. The order of
// a sum depends on the block's size and on nothing else. out may be residual or x: each element is read before it is
// written, by the thread that writes it.
//
// Grid: rows; gated: rows / (block / 32), rounded up. Block: any whole warps (columns / 4 or so, at most 1024).
// Dynamic shared memory: 4 * columns bytes; gated: none. No alignment beyond float's.

__device__ float block_sum(float x) {
    __shared__ float parts[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_sum(x);
    __syncthreads();  // the parts of the sum before this one have been read
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? parts[lane] : 0.0f);
}

// The row in shared memory, normed, into next_D; squares: this thread's part of the sum. For all threads of the block.
__device__ void norm_row(float* next_D, const float* row_D, const float* weight_D, float squares, int columns,
                         float eps) {
    float root = sqrtf(block_sum(squares) / columns + eps);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        float x = row_D[i] / root;
        next_D[i] = weight_D ? x * weight_D[i] : x;
    }
}

extern "C" __global__ void rms_norm(float* out_TD, float* __restrict__ next_TD, const float* x_TD,
                                    const float* __restrict__ weight_D, const float* residual_TD,
                                    const float* __restrict__ scale, const float* __restrict__ next_weight_D,
                                    int columns, float eps) {
    DYNAMIC_SHARED(float, row_D);
    long long row = (long long)blockIdx.x * columns;
    float squares = 0, factor = scale ? *scale : 1.0f;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        float x = row_D[i] = x_TD[row + i];
        squares = fmaf(x, x, squares);
    }
    float root = sqrtf(block_sum(squares) / columns + eps);
    squares = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        float x = row_D[i] / root;
        if (weight_D) x *= weight_D[i];
        if (residual_TD) x = residual_TD[row + i] + x;
        row_D[i] = out_TD[row + i] = x *= factor;
        squares = fmaf(x, x, squares);
    }
    if (next_TD) norm_row(next_TD + row, row_D, next_weight_D, squares, columns, eps);
}

extern "C" __global__ void add_rms_norm(float* out_TD, float* __restrict__ next_TD, const float* x_TD,
                                        const float* residual_TD, const float* __restrict__ next_weight_D, int columns,
                                        float eps) {
    DYNAMIC_SHARED(float, row_D);
    long long row = (long long)blockIdx.x * columns;
    float squares = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        float x = residual_TD[row + i] + x_TD[row + i];
        row_D[i] = out_TD[row + i] = x;
        squares = fmaf(x, x, squares);
    }
    if (next_TD) norm_row(next_TD + row, row_D, next_weight_D, squares, columns, eps);
}

extern "C" __global__ void rms_norm_gated(float* out_RV, const float* x_RV, const float* __restrict__ weight_V,
                                          const float* gate_RV, int rows, int columns, float eps) {
    int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;  // a whole warp
    long long first = (long long)row * columns;
    float squares = 0;
    for (int i = lane; i < columns; i += 32) squares = fmaf(x_RV[first + i], x_RV[first + i], squares);
    float root = sqrtf(warp_sum(squares) / columns + eps);
    for (int i = lane; i < columns; i += 32) {
        float x = x_RV[first + i] / root;
        if (weight_V) x *= weight_V[i];
        if (gate_RV) x *= gate_RV[first + i] / (1.0f + expf(-gate_RV[first + i]));
        out_RV[first + i] = x;
    }
}
