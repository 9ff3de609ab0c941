// Products of bfloat16 matrices by AMX: a tile of 16 x 32 numbers times one of 32 x 16, added to 16 x 16 float32 sums.
//
// The second factor's tiles hold pairs of rows, [16 pairs, 16 columns, 2]. Six tiles of sums, 32 rows and 48 columns,
// are added to at once, which hides the latency of a product and uses each loaded tile two or three times.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "lanes.hpp"

namespace {

constexpr int64_t TILE = 16, DEPTH = 32; // rows and columns of sums; numbers that a step multiplies
constexpr int64_t ROW_TILES = 2, COLUMN_TILES = 3;

// Linux lets a process use tiles that asks for them. Returns whether it does.
bool ask_for_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18; // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
}

// Compilers do not see what tiles read: all that was to be written has to be in memory before.
inline void write_to_memory(const void *numbers) { __asm__ volatile("" : : "r"(numbers) : "memory"); }

// While there is one of these, this thread's tiles have 16 rows of 64 bytes.
class TileConfiguration {
  public:
    TileConfiguration() {
        alignas(64) uint8_t bytes[64] = {1}; // the palette, then sizes: two bytes a tile from 16 on, one from 48 on
        for (int tile = 0; tile < 8; ++tile) bytes[16 + 2 * tile] = 64, bytes[48 + tile] = TILE;
        write_to_memory(bytes);
        _tile_loadconfig(bytes);
    }
    ~TileConfiguration() { _tile_release(); }
    TileConfiguration(const TileConfiguration &) = delete;
};

// The first factor: tiles below each other are `tile` numbers apart, and its rows `stride`. Step k begins at steps[k].
struct Left {
    const uint16_t *data;
    int64_t stride, tile;
    const int64_t *steps;
};

// The second factor, in pairs of rows: tiles side by side are `tile` numbers apart, its pairs `stride`, its steps `step`.
struct Right {
    const uint16_t *data;
    int64_t stride, tile, step;
};

#define FOR_TILES(WORK)                                                                                                \
    WORK(0, 0, 0)                                                                                                      \
    if constexpr (COLUMNS > 1) WORK(1, 0, 1)                                                                           \
    if constexpr (COLUMNS > 2) WORK(2, 0, 2)                                                                           \
    if constexpr (ROWS > 1) {                                                                                          \
        WORK(3, 1, 0)                                                                                                  \
        if constexpr (COLUMNS > 1) WORK(4, 1, 1)                                                                       \
        if constexpr (COLUMNS > 2) WORK(5, 1, 2)                                                                       \
    }

// sums [16 rows, 16 columns of tiles] = left * right, added to what is there or to zero
template <int ROWS, int COLUMNS, bool ADD>
void multiply_tiles(float *sums, int64_t sums_stride, const Left &left, const Right &right, int64_t count) {
    const size_t of_left = (size_t)left.stride * 2, of_right = (size_t)right.stride * 2; // in bytes
    const size_t of_sums = (size_t)sums_stride * 4;
#define BEGIN(TILE_, I, J)                                                                                             \
    {                                                                                                                  \
        if constexpr (ADD)                                                                                             \
            _tile_loadd(TILE_, sums + (I)*TILE * sums_stride + (J)*TILE, of_sums);                                     \
        else                                                                                                           \
            _tile_zero(TILE_);                                                                                         \
    }
#define MULTIPLY(TILE_, I, J)                                                                                          \
    {                                                                                                                  \
        if constexpr ((J) == 0) _tile_loadd(6, a + (I)*left.tile, of_left);                                            \
        _tile_loadd(7, b + (J)*right.tile, of_right);                                                                  \
        _tile_dpbf16ps(TILE_, 6, 7);                                                                                   \
    }
#define STORE(TILE_, I, J)                                                                                             \
    { _tile_stored(TILE_, sums + (I)*TILE * sums_stride + (J)*TILE, of_sums); }
    write_to_memory(sums);
    FOR_TILES(BEGIN)
    for (int64_t k = 0; k < count; ++k) {
        const uint16_t *a = left.data + left.steps[k], *b = right.data + k * right.step;
        FOR_TILES(MULTIPLY)
    }
    FOR_TILES(STORE)
    write_to_memory(sums);
#undef BEGIN
#undef MULTIPLY
#undef STORE
}
#undef FOR_TILES

// The same for 1 or 2 tiles below each other, and 1 to 3 side by side.
template <bool ADD>
void multiply_tiles(int64_t rows, int64_t columns, float *sums, int64_t stride, const Left &left, const Right &right,
                    int64_t count) {
    switch (rows * 4 + columns) {
        case 4 + 1: return multiply_tiles<1, 1, ADD>(sums, stride, left, right, count);
        case 4 + 2: return multiply_tiles<1, 2, ADD>(sums, stride, left, right, count);
        case 4 + 3: return multiply_tiles<1, 3, ADD>(sums, stride, left, right, count);
        case 8 + 1: return multiply_tiles<2, 1, ADD>(sums, stride, left, right, count);
        case 8 + 2: return multiply_tiles<2, 2, ADD>(sums, stride, left, right, count);
        case 8 + 3: return multiply_tiles<2, 3, ADD>(sums, stride, left, right, count);
    }
}

} // namespace
