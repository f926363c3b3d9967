// causal_conv: each channel's weighted sum of its last WIDTH inputs, then silu. Twin: silu(layers.causal_conv(...)).
//
// The memory is two arrays: the window, the last WIDTH - 1 inputs that are final, and behind it the log, the inputs
// read since, of which `logged` (in device memory) count. A pass of TOKENS reads the last WIDTH - 1 rows of the two
// together, and writes its own inputs to the log behind those that count. The window stays as it is.
//   To un-read tokens, lower `logged`: the next pass overwrites their rows.
//   To commit n of them, causal_conv_commit: the last WIDTH - 1 of the window and the log's first n are the new window.
// Who starts a pass raises `logged` after it, by the tokens to keep, and sees to it that the log has room.
//
// A thread makes one channel for all tokens, from registers: each input, weight and logged row is read once, neighbours
// of a row by neighbouring threads. An output is one chain of products in the order of its inputs, oldest first.
//
// Grid: channels / block, rounded up. Block: any size (128, say). No shared memory, no alignment beyond float's.
// Compiled with TOKENS (1 … 8) and WIDTH (2 …), the width of the convolution.

// An input of a channel, counted from the oldest in the window. The column is where the channel's inputs are.
__device__ inline float remembered(const float* window_column, const float* log_column, int index, long long channels) {
    return index < WIDTH - 1 ? window_column[index * channels] : log_column[(index - (WIDTH - 1)) * channels];
}

extern "C" __global__ void causal_conv(float* __restrict__ out_TC, float* log_LC, const float* __restrict__ x_TC,
                                       const float* __restrict__ weight_CW, const float* __restrict__ window_WC,
                                       const int* __restrict__ logged, int channels) {
    int channel = blockIdx.x * blockDim.x + threadIdx.x, before = *logged;
    if (channel >= channels) return;
    float inputs[WIDTH - 1 + TOKENS], weights[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; j++) weights[j] = weight_CW[(long long)channel * WIDTH + j];
#pragma unroll
    for (int j = 0; j < WIDTH - 1; j++)
        inputs[j] = remembered(window_WC + channel, log_LC + channel, before + j, channels);
#pragma unroll
    for (int t = 0; t < TOKENS; t++) inputs[WIDTH - 1 + t] = x_TC[(long long)t * channels + channel];
#pragma unroll
    for (int t = 0; t < TOKENS; t++) {
        float sum = 0;
        for (int j = 0; j < WIDTH; j++) sum = fmaf(inputs[t + j], weights[j], sum);
        out_TC[(long long)t * channels + channel] = sum / (1.0f + expf(-sum));
        log_LC[(long long)(before + t) * channels + channel] = inputs[WIDTH - 1 + t];
    }
}

extern "C" __global__ void causal_conv_commit(float* window_WC, const float* __restrict__ log_LC,
                                              const int* __restrict__ count, int channels) {
    int channel = blockIdx.x * blockDim.x + threadIdx.x;
    if (channel >= channels) return;
    float inputs[WIDTH - 1];  // all of them, before the first is overwritten
#pragma unroll
    for (int j = 0; j < WIDTH - 1; j++)
        inputs[j] = remembered(window_WC + channel, log_LC + channel, *count + j, channels);
#pragma unroll
    for (int j = 0; j < WIDTH - 1; j++) window_WC[(long long)j * channels + channel] = inputs[j];
}
