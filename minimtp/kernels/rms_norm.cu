// rms_norm, rms_norm_gated: the norms between the products, with what is added or multiplied beside them.
// Twins: layers.rms_norm, add_normed and gated_norm.
//
//   rms_norm        out = [residual +] norm(x) [* weight]   Gemma: a sub-layer's output, normed and added
//   rms_norm_gated  out = norm(x) * weight * silu(gate)     rows of a head's width: the DeltaNet's output
//
// norm(x) = x / sqrt(mean(x²) + eps). What stands in brackets is left out where its pointer is null.
//
// In the first a block makes a row, of a token: the row is read once, waits in shared memory, and each thread touches
// only its own columns there, so only the sum needs barriers. In the gated one a warp makes a row. The order of a sum
// depends on the block's size and on nothing else. out may be residual or x: each element is read before it is written,
// by the thread that writes it.
//
// Grid: rows; gated: rows / (block / 32), rounded up. Block: any whole warps (columns / 4 or so, at most 1024).
// Dynamic shared memory: 4 * columns bytes; gated: none. No alignment beyond float's.

__device__ float block_sum(float x) {
    __shared__ float parts[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    x = warp_sum(x);
    if (lane == 0) parts[warp] = x;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? parts[lane] : 0.0f);
}

extern "C" __global__ void rms_norm(float* out_TD, const float* x_TD, const float* __restrict__ weight_D,
                                    const float* residual_TD, int columns, float eps) {
    DYNAMIC_SHARED(float, row_D);
    long long row = (long long)blockIdx.x * columns;
    float squares = 0;
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        float x = row_D[i] = x_TD[row + i];
        squares = fmaf(x, x, squares);
    }
    float root = sqrtf(block_sum(squares) / columns + eps);
    for (int i = threadIdx.x; i < columns; i += blockDim.x) {
        float x = row_D[i] / root;
        if (weight_D) x *= weight_D[i];
        out_TD[row + i] = residual_TD ? residual_TD[row + i] + x : x;
    }
}

extern "C" __global__ void rms_norm_gated(float* out_RV, const float* x_RV, const float* __restrict__ weight_V,
                                          const float* gate_RV, int rows, int columns, float eps) {
    int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    if (row >= rows) return;  // a whole warp
    long long first = (long long)row * columns;
    float squares = 0;
    for (int i = lane; i < columns; i += 32) squares = fmaf(x_RV[first + i], x_RV[first + i], squares);
    float root = sqrtf(warp_sum(squares) / columns + eps);
    for (int i = lane; i < columns; i += 32)
        out_RV[first + i] = x_RV[first + i] / root * weight_V[i] * silu(gate_RV[first + i]);
}
