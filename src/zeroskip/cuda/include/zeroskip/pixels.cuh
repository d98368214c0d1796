// Pixels of a batch of images numbered through: where pixel `i` lies in an NCHW tensor.
#pragma once

namespace zeroskip {

// Strides of one tensor in elements.  `column` is 1 but for an input that a strided convolution skips through.
struct Plane {
    int image, channel, row, column;
};

// `count` pixels in all, `per_image` of them in an image, `per_row` in a row of it.
struct Pixels {
    int count, per_image, per_row;

    // Divisions are slow, so the usual cases, one image and rows without gaps, do without; and those of unsigned numbers
    // take fewer instructions.  `pixel` is not negative.
    __device__ __forceinline__ int offset(const Plane& plane, int pixel) const {
        int at = 0;
        if (count != per_image) {
            const int image = static_cast<unsigned>(pixel) / static_cast<unsigned>(per_image);
            pixel -= image * per_image;
            at = image * plane.image;
        }
        if (plane.row == per_row * plane.column) return at + pixel * plane.column;
        const int row = static_cast<unsigned>(pixel) / static_cast<unsigned>(per_row);
        return at + row * plane.row + (pixel - row * per_row) * plane.column;
    }
};

}  // namespace zeroskip
