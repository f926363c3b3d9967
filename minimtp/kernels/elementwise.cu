// elementwise: out = EXPRESSION of a, b and s, number by number. Twins: the one-line functions of layers.py, and + and *.
//
// Arrays are rows x columns with a stride of their own between rows (0: the same row for all), so that a part of
// every row can be taken, or filled. b may also have one number a row, or one in all (step 0). b is null where
// the expression has none. One thread makes one number; neighbours read neighbours.
//
// Grid: (columns / 256 rounded up, rows). Block: 256 threads. Compiled with EXPRESSION.

__device__ inline float value(float x, float y, float s) { return EXPRESSION; }

extern "C" __global__ void elementwise(float* out, const float* __restrict__ a, const float* __restrict__ b, float s,
                                       int columns, int out_stride, int a_stride, int b_stride, int b_step) {
    int row = blockIdx.y, column = blockIdx.x * 256 + threadIdx.x;
    if (column >= columns) return;
    float x = a[(long long)row * a_stride + column];
    float y = b == nullptr ? 0.0f : b[(long long)row * b_stride + column * b_step];
    out[(long long)row * out_stride + column] = value(x, y, s);
}
