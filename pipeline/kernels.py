"""Pixel operations of RandAugment and colour jitter, compiled by numba: Pillow's results at a tenth of its time.

All take and return contiguous uint8 [H, W, 3]. Point operations, blends and the smoothing filter are Pillow's integer
and float32 arithmetic to the bit. The bicubic ones (Pillow: a = -1, in float64, truncated) are computed in float32,
with 1/1024 added before truncation, since round-off would turn 128 into 127 in flat areas; what is left differs from
Pillow by one grey level in one value of hundreds.

Loops run over flat rows and count in unsigned integers: numba tests a signed index for wrap-around, which keeps LLVM
from using vectors (the horizontal shear took 0.37 ms at 224 pixels with it and takes 0.03).
"""
import math

import numpy as np
from llvmlite import ir
from numba import njit, types, uintp
from numba.core import cgutils
from numba.extending import intrinsic

compiled = njit(cache=True, error_model='numpy')
fused = njit(cache=True, error_model='numpy', fastmath={'contract'})  # with multiply-add, where bits do not count


# ---- Point operations -----------------------------------------------------------------------------------------------

@compiled
def lookup(image, table):
    """Replaces every value by its entry in table, uint8 [3, 256], a row for each channel."""
    out = np.empty_like(image)
    source, target, (red, green, blue) = image.reshape(-1), out.reshape(-1), (table[0], table[1], table[2])
    for pixel in range(source.size // 3):
        r = uintp(3 * pixel)
        g, b = r + uintp(1), r + uintp(2)
        target[r], target[g], target[b] = red[source[r]], green[source[g]], blue[source[b]]
    return out


@compiled
def _histogram(image):
    counts = np.zeros((3, 256), np.int64)
    source, red, green, blue = image.reshape(-1), counts[0], counts[1], counts[2]
    for pixel in range(source.size // 3):
        r = uintp(3 * pixel)
        red[source[r]] += 1
        green[source[r + uintp(1)]] += 1
        blue[source[r + uintp(2)]] += 1
    return counts


@compiled
def auto_contrast(image):
    """Stretches each channel to 0..255 (Pillow's ImageOps.autocontrast without cutoff)."""
    counts = _histogram(image)
    table = np.empty((3, 256), np.uint8)
    for c in range(3):
        low, high = 0, 255
        while low < 255 and counts[c, low] == 0:
            low += 1
        while high > 0 and counts[c, high] == 0:
            high -= 1
        for value in range(256):
            if high <= low:
                table[c, value] = value
            else:
                scale = 255.0 / (high - low)
                table[c, value] = min(max(int(value * scale + -low * scale), 0), 255)
    return lookup(image, table)


@compiled
def equalize(image):
    """Makes the histogram of each channel flat (Pillow's ImageOps.equalize)."""
    counts = _histogram(image)
    table = np.empty((3, 256), np.uint8)
    for c in range(3):
        last = 255
        while last > 0 and counts[c, last] == 0:
            last -= 1
        step = (counts[c].sum() - counts[c, last]) // 255
        below = step // 2
        for value in range(256):
            if step == 0:
                table[c, value] = value
            else:
                table[c, value] = min(below // step, 255)
                below += counts[c, value]
    return lookup(image, table)


@compiled
def relabel(numbers, table):
    """Replaces every number, [H, W] of unsigned integers, by its entry in table, uint8 [65536]."""
    out = np.empty(numbers.shape, np.uint8)
    source, target = numbers.reshape(-1), out.reshape(-1)
    for i in range(source.size):
        target[uintp(i)] = table[uintp(source[uintp(i)])]
    return out


@compiled
def count(labels):
    """How often each label occurs, uint8 [H, W] to int64 [256]."""
    counts = np.zeros((2, 256), np.int64)
    even, odd = counts[0], counts[1]  # neighbours are mostly equal, and one counter would wait for itself
    for y in range(labels.shape[0]):
        row = labels[y]
        for x in range(0, row.size - 1, 2):
            even[row[uintp(x)]] += 1
            odd[row[uintp(x + 1)]] += 1
        if row.size % 2:
            even[row[uintp(row.size - 1)]] += 1
    return even + odd


# ---- Blends ---------------------------------------------------------------------------------------------------------

@compiled
def _blend(base, value, factor):
    """Pillow's Image.blend of two values, beyond them too: float32, truncated."""
    mixed = np.float32(base) + factor * np.float32(value - base)
    return np.uint8(min(max(mixed, np.float32(0)), np.float32(255)))


@compiled
def _grey(r, g, b):
    """Pillow's luma of a pixel."""
    return (r * np.int32(19595) + g * np.int32(38470) + b * np.int32(7471) + np.int32(0x8000)) >> np.int32(16)


@compiled
def brightness(image, factor):
    """Blends with black."""
    table = np.empty((3, 256), np.uint8)
    for value in range(256):
        table[:, value] = _blend(0, value, np.float32(factor))
    return lookup(image, table)


@compiled
def contrast(image, factor):
    """Blends with the mean grey level."""
    source, total = image.reshape(-1), 0
    for pixel in range(source.size // 3):
        r = uintp(3 * pixel)
        total += _grey(np.int32(source[r]), np.int32(source[r + uintp(1)]), np.int32(source[r + uintp(2)]))
    mean = int(total / (source.size // 3) + 0.5)
    table = np.empty((3, 256), np.uint8)
    for value in range(256):
        table[:, value] = _blend(mean, value, np.float32(factor))
    return lookup(image, table)


@compiled
def color(image, factor):
    """Blends with the grey image."""
    out = np.empty_like(image)
    source, target, share = image.reshape(-1), out.reshape(-1), np.float32(factor)
    for pixel in range(source.size // 3):
        r = uintp(3 * pixel)
        g, b = r + uintp(1), r + uintp(2)
        red, green, blue = np.int32(source[r]), np.int32(source[g]), np.int32(source[b])
        grey = _grey(red, green, blue)
        target[r], target[g] = _blend(grey, red, share), _blend(grey, green, share)
        target[b] = _blend(grey, blue, share)
    return out


@compiled
def recolor(image, before, saturation, hue, after):
    """Levels by a table, uint8 [256], then saturation and hue, then levels by another table.

    Hues are whole numbers below 180, saturations below 256, as OpenCV's. Tables in place of divisions and of the six
    parts of the circle take a third of the time.
    """
    out = np.empty_like(image)
    source, target, colors = image.reshape(-1), out.reshape(-1), saturation != 1 or hue != 0
    inverse, chroma, weights = np.zeros(256, np.float32), np.empty(256, np.float32), np.empty((361, 3), np.float32)
    for value in range(256):
        if value:
            inverse[value] = 1 / value
        chroma[value] = min(int(value * saturation), 255) / 255
    for angle in range(361):
        for c in range(3):  # how much of the chroma a channel lacks
            k = (5 - 2 * c + (angle + hue) / 30) % 6
            weights[angle, c] = max(0, min(k, 4 - k, 1))
    half, flat = np.float32(0.5), weights.reshape(-1)
    for pixel in range(source.size // 3):
        r = uintp(3 * pixel)
        g, b = r + uintp(1), r + uintp(2)
        red, green, blue = np.int32(before[source[r]]), np.int32(before[source[g]]), np.int32(before[source[b]])
        if colors:
            high, low = max(red, green, blue), min(red, green, blue)
            part = np.float32(30) * inverse[uintp(high - low)]
            angle = (np.float32(green - blue) * part if high == red else
                     np.float32(60) + np.float32(blue - red) * part if high == green else
                     np.float32(120) + np.float32(red - green) * part)  # from -30 to 150
            place = uintp(3) * uintp(angle + np.float32(180.5))
            lacks = np.float32(high) * chroma[uintp(np.float32(255 * (high - low)) * inverse[uintp(high)] + half)]
            level = np.float32(high) + half
            red = np.int32(level - lacks * flat[place])
            green = np.int32(level - lacks * flat[place + uintp(1)])
            blue = np.int32(level - lacks * flat[place + uintp(2)])
        target[r], target[g], target[b] = after[uintp(red)], after[uintp(green)], after[uintp(blue)]
    return out


@compiled
def _sharpen_row(above, row, below, target, factor):
    for i in range(target.size):
        k = uintp(i)
        m, n = k + uintp(3), k + uintp(6)
        total = (np.int32(above[k]) + np.int32(above[m]) + np.int32(above[n])
                 + np.int32(row[k]) + np.int32(5) * np.int32(row[m]) + np.int32(row[n])
                 + np.int32(below[k]) + np.int32(below[m]) + np.int32(below[n]))
        smooth = (np.int32(2) * total + np.int32(13)) // np.int32(26)  # a rounded thirteenth; it has no ties
        target[k] = _blend(smooth, np.int32(row[m]), factor)


@compiled
def sharpness(image, factor):
    """Blends with the image smoothed by Pillow's 3x3 filter (1 around, 5 in the middle), which leaves the border."""
    out = image.copy()
    height, width, _ = image.shape
    for y in range(1, height - 1):
        _sharpen_row(image[y - 1].reshape(-1), image[y].reshape(-1), image[y + 1].reshape(-1),
                     out[y].reshape(-1)[3:3 * width - 3], np.float32(factor))
    return out


# ---- Geometry -------------------------------------------------------------------------------------------------------

@compiled
def mirror(image):
    """Left and right exchanged."""
    out = np.empty_like(image)
    height, width, _ = image.shape
    for y in range(height):
        source, target = image[y].reshape(-1), out[y].reshape(-1)
        for x in range(width):
            i, k = uintp(3 * x), uintp(3 * (width - 1 - x))
            target[i], target[i + uintp(1)] = source[k], source[k + uintp(1)]
            target[i + uintp(2)] = source[k + uintp(2)]
    return out


@compiled
def transpose(image):
    """Rows and columns exchanged: a vertical operation is a horizontal one between two of these."""
    height, width, _ = image.shape
    out = np.empty((width, height, 3), np.uint8)
    for y in range(height):
        for x in range(width):
            for c in range(3):
                out[x, y, c] = image[y, x, c]
    return out


@fused
def _weights(distance):
    """Pillow's cubic (a = -1) at the four neighbours of a point so far beyond the second."""
    d, one = np.float32(distance), np.float32(1)
    d2, d3 = d * d, d * d * d
    return -d + d2 + d2 - d3, one - d2 - d2 + d3, d + d2 - d3, d3 - d2


@compiled
def _byte(value):
    return np.uint8(min(max(value + np.float32(1 / 1024), np.float32(0)), np.float32(255)))


@fused
def _filter_row(source, target, w1, w2, w3, w4):
    for i in range(target.size):
        k = uintp(i)
        target[k] = _byte(w1 * source[k] + w2 * source[k + uintp(3)] + w3 * source[k + uintp(6)]
                          + w4 * source[k + uintp(9)])


@fused
def shift_rows(image, slope, offset, fill):
    """Moves row y left by slope * (y + 1/2) + offset pixels: the horizontal shear and translation.

    What comes from outside is fill, uint8 [3]; the filter's neighbours outside repeat the border.
    """
    height, width, _ = image.shape
    out = np.empty_like(image)
    padded = np.empty(3 * (width + 8), np.float32)
    inner = padded[12:12 + 3 * width]
    for y in range(height):
        shift = slope * (y + 0.5) + offset
        whole = math.floor(shift)
        w1, w2, w3, w4 = _weights(shift - whole)
        # The pixels whose x + 1/2 + shift lies in [0, width)
        first = min(max(math.ceil(-0.5 - shift), 0), width)
        last = min(max(math.ceil(width - 0.5 - shift), first), width)
        for x in range(first):
            out[y, x] = fill
        for x in range(last, width):
            out[y, x] = fill
        if last > first:
            source = image[y].reshape(-1)
            for i in range(3 * width):
                inner[uintp(i)] = source[uintp(i)]
            for i in range(12):
                padded[i] = inner[i % 3]
                padded[12 + 3 * width + i] = inner[3 * width - 3 + i % 3]
            start = 3 * (first + whole + 3)
            _filter_row(padded[start:start + 3 * (last - first) + 9], out[y].reshape(-1)[3 * first:3 * last],
                        w1, w2, w3, w4)
    return out


@fused
def affine(image, a, b, c, d, e, f, fill):
    """Pillow's bicubic Image.transform: output (x, y) is the input at (a x + b y + c, d x + e y + f); fill beyond."""
    height, width, _ = image.shape
    out = np.empty_like(image)
    padded = np.zeros((height + 4, 4 * (width + 4)), np.float32)
    for y in range(height + 4):
        source, target = image[min(max(y - 2, 0), height - 1)].reshape(-1), padded[y]
        for x in range(width + 4):
            i, k = uintp(4 * x), uintp(3 * min(max(x - 2, 0), width - 1))
            target[i], target[i + uintp(1)] = source[k], source[k + uintp(1)]
            target[i + uintp(2)] = source[k + uintp(2)]
    flat, stride = padded.reshape(-1), uintp(4 * (width + 4))
    for y in range(height):
        target = out[y].reshape(-1)
        for x in range(width):
            i = uintp(3 * x)
            xin, yin = a * (x + 0.5) + b * (y + 0.5) + c, d * (x + 0.5) + e * (y + 0.5) + f
            if not (0 <= xin < width and 0 <= yin < height):
                target[i], target[i + uintp(1)], target[i + uintp(2)] = fill[0], fill[1], fill[2]
                continue
            # The first of four neighbours; the padding's two pixels keep both numbers from 0 on
            column, row = int(xin + 0.5), int(yin + 0.5)
            w1, w2, w3, w4 = _weights(xin + 0.5 - column)
            down, first = _weights(yin + 0.5 - row), uintp(row) * stride + uintp(4 * column)
            for channel in range(3):
                total, k = np.float32(0), first + uintp(channel)
                for weight in down:
                    total += weight * (w1 * flat[k] + w2 * flat[k + uintp(4)] + w3 * flat[k + uintp(8)]
                                       + w4 * flat[k + uintp(12)])
                    k += stride
                target[i + uintp(channel)] = _byte(total)
    return out


# ---- Resizing -------------------------------------------------------------------------------------------------------

BITS = 22  # of the fraction in Pillow's weights


@compiled
def _taps(size, out_size, first, count, cubic):
    """Pillow's antialiasing weights for `count` of `out_size` output pixels from `first` on, as whole numbers.

    Returns:
        the first input pixel of each, their number, and their weights, int32 [count, K]; of a cubic (a = -1/2) or a
        triangle, computed in Pillow's order, for its rounding.
    """
    scale = size / out_size
    wide = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * wide
    length = math.ceil(support) * 2 + 1
    starts, lengths = np.empty(count, np.int64), np.empty(count, np.int64)
    weights, exact = np.zeros((count, length), np.int32), np.empty(length)
    for i in range(count):
        centre, total = (first + i + 0.5) * scale, 0.0
        low = max(int(centre - support + 0.5), 0)
        lengths[i] = min(int(centre + support + 0.5), size) - low
        starts[i] = low
        for k in range(lengths[i]):
            x = abs((k + low - centre + 0.5) * (1.0 / wide))
            if not cubic:
                exact[k] = 1.0 - x if x < 1.0 else 0.0
            elif x < 1.0:
                exact[k] = (1.5 * x - 2.5) * x * x + 1
            else:
                exact[k] = (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2.0 else 0.0
            total += exact[k]
        for k in range(lengths[i]):
            weight = exact[k] / total * (1 << BITS)
            weights[i, k] = int(weight - 0.5) if weight < 0 else int(weight + 0.5)
    return starts, lengths, weights


def _filter_of(pieces, size):
    """A filter's sum over neighbours for `pieces` x `size` bytes at once, rounded and stored.

    Written out in LLVM's words, since LLVM keeps neither the sums nor the weight in registers by itself: a test image
    takes 1.4 times as long without.
    Arguments of what it returns: source, uint8 [N], the place of the first byte in it, and the way to the next piece
    and to the next neighbour; weights, int32 [K], and how many of them count; target, uint8 [M], the place of the first
    byte there, and the way to the next piece.
    """
    lanes, word = pieces * size, ir.IntType(8 * size)
    whole, byte = ir.VectorType(ir.IntType(32), lanes), ir.VectorType(ir.IntType(8), lanes)
    words = ir.VectorType(word, pieces)

    @intrinsic
    def weighted(_typing, source, first, across, step, weights, length, target, place, down):
        def generate(context, builder, signature, arguments):
            inputs, factors, outputs = (
                context.make_array(signature.args[i])(context, builder, arguments[i]).data for i in (0, 4, 6))

            def places(array, start, way):
                positions = [builder.add(start, builder.mul(way, ir.Constant(way.type, i))) for i in range(pieces)]
                return [builder.bitcast(builder.gep(array, [position]), word.as_pointer()) for position in positions]

            def joined(values, kind):
                vector = ir.Constant(kind, ir.Undefined)
                for i, value in enumerate(values):
                    vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), i))
                return vector

            total = cgutils.alloca_once_value(builder, ir.Constant(whole, [1 << BITS - 1] * lanes))
            with cgutils.for_range(builder, arguments[5]) as loop:
                position = builder.add(arguments[1], builder.mul(loop.index, arguments[3]))
                loads = [builder.load(one, align=1) for one in places(inputs, position, arguments[2])]
                values = builder.zext(builder.bitcast(joined(loads, words), byte), whole)
                weight = joined([builder.load(builder.gep(factors, [loop.index]))], whole)
                weight = builder.shuffle_vector(weight, weight, ir.Constant(whole, [0] * lanes))
                builder.store(builder.add(builder.load(total), builder.mul(values, weight)), total)
            result = builder.ashr(builder.load(total), ir.Constant(whole, [BITS] * lanes))
            for bound, beyond in ((0, '<'), (255, '>')):
                bound = ir.Constant(whole, [bound] * lanes)
                result = builder.select(builder.icmp_signed(beyond, result, bound), bound, result)
            result = builder.bitcast(builder.trunc(result, byte), words)
            for i, one in enumerate(places(outputs, arguments[7], arguments[8])):
                builder.store(builder.extract_element(result, ir.Constant(ir.IntType(32), i)), one, align=1)
            return context.get_dummy_value()

        number = types.intp
        return types.void(source, number, number, number, weights, number, target, number, number), generate
    return weighted


ROWS, STRETCH = 4, 32  # rows of pixels, and bytes of a row, that are filtered at once
_filter_pixels, _filter_stretch = _filter_of(ROWS, 4), _filter_of(1, STRETCH)


@compiled
def resized_crop(image, height, width, top, left, rows, columns, cubic):
    """Part of an image of at least `ROWS` rows, resized by Pillow's bicubic or bilinear filter to [height, width].

    The bits are Pillow's. Only that part is computed, by vectors: the middle 224x224 of 500x375 at 330x248 takes
    0.3 ms, where Pillow and the copies to and from it take 1.8.
    """
    starts, lengths, weights = _taps(image.shape[0], height, top, rows, cubic)
    firsts, counts, factors = _taps(image.shape[1], width, left, columns, cubic)
    in_row, out_row, last = 3 * image.shape[1], 3 * columns, image.shape[0] - ROWS
    row = out_row + 1  # a vector of a pixel has a byte more: of the row's last one, it goes nowhere
    lowest = min(starts[0], last)
    needed = max(starts[rows - 1] + lengths[rows - 1] - lowest, ROWS)
    between, out = np.empty(needed * row + STRETCH, np.uint8), np.empty(rows * out_row + STRETCH, np.uint8)
    source, ending = image.reshape(-1), np.zeros(ROWS * in_row + 1, np.uint8)
    ending[:ROWS * in_row] = source[last * in_row:]
    for group in range(0, needed, ROWS):  # Pillow resizes the rows first, and rounds
        y = min(group, needed - ROWS)
        pixels, start = (source, (lowest + y) * in_row) if lowest + y < last else (ending, 0)
        for x in range(columns):
            _filter_pixels(pixels, start + 3 * firsts[x], in_row, 3, factors[x], counts[x],
                           between, y * row + 3 * x, row)
    for y in range(rows):
        start = (starts[y] - lowest) * row
        for x in range(0, out_row, STRETCH):
            _filter_stretch(between, start + x, 0, row, weights[y], lengths[y], out, y * out_row + x, 0)
    return out[:rows * out_row].reshape(rows, columns, 3)
